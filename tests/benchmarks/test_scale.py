"""The arithmetic of `benchmarks.scale`."""

from __future__ import annotations

import pytest

from benchmarks.scale import RELAY, Model, row
from hubsync.cli import sizing


def test_each_column_counts_the_downloads_of_its_case() -> None:
    model = Model("m", 8_000_000_000, trainer=8, replica=2)
    delta = sizing.DeltaSize(0.01, 10.0, 100_000_000)
    one, many = row(model, 1, 1e9, delta), row(model, 400, 1e9, delta)
    download = 8 * delta.nbytes / 1e9

    assert one.alone == one.shared == one.site == one.relayed
    assert many.shared == pytest.approx(one.shared)
    assert many.alone - many.shared == pytest.approx(3 * download), "four replicas of a host share its link"
    assert many.site - many.shared == pytest.approx(99 * download), "100 hosts share the site's link"
    assert many.relayed - many.shared == pytest.approx(max(0.0, 100 * 8 * delta.nbytes / RELAY - download))
    assert many.hub_bytes == 100 * delta.nbytes


def test_the_fixed_part_is_that_of_hubsync_size() -> None:
    model = Model("m", 4_000_000_000, trainer=1, replica=1)
    delta = sizing.DeltaSize(0.01, 9.7, 48_500_000)
    times = sizing.times(model.parameters, delta, 1e9, round_trip=0.05)
    assert row(model, 1, 1e9, delta).shared == pytest.approx(times.total)
