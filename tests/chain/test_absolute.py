"""Deltas that hold new values of tensors: they replay forwards, are never undone, and merge with other deltas."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader, Compactor, Step
from hubsync.chain.replay import View
from hubsync.errors import FormatError, NoPath, WrongParent
from hubsync.format.patch import TensorValues
from tests.support.history import History


def test_new_values_replay_between_changes(history: History, reader: ChainReader) -> None:
    for absolute in ((), (0,), (), (0, 1), ()):
        history.publish(absolute=absolute)
    plan = history.go(reader, None)
    assert [step.manifest.absolute for step in plan.steps] == [0, 1, 0, 2, 0]


def test_a_rollback_over_new_values_goes_through_an_anchor(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    history.publish()
    older = history.anchor(tmp_path / "anchor").position
    history.publish(absolute=(1,))
    newest = history.publish().position
    assert history.go(reader, newest, newest.version - 1).steps[0].inverse, "changes are undone"
    plan = history.go(reader, newest, older.version, base=False)
    assert plan.anchor is not None
    assert not any(step.inverse for step in plan.steps)


def test_a_rollback_over_new_values_has_no_path_without_an_anchor(history: History, reader: ChainReader) -> None:
    history.publish()
    newest = history.publish(absolute=(1,)).position
    with pytest.raises(NoPath):
        reader.plan(newest, 1, base_available=False)


def test_a_delta_that_hides_its_new_values_is_not_undone(history: History, reader: ChainReader) -> None:
    manifest = history.publish(absolute=(1,))
    view = View(history.table, history.view, manifest.position)
    with pytest.raises(FormatError, match="cannot be undone"):
        view.apply(reader.patch(manifest), Step(replace(manifest, absolute=0), inverse=True))
    view.verify()


def test_new_values_of_another_version_change_nothing(history: History, reader: ChainReader) -> None:
    manifest = history.publish(absolute=(1,))
    patch = reader.patch(manifest)
    values = patch[1]
    assert isinstance(values, TensorValues)
    view = View(history.table, history.base, history.writer.run.origin)
    with pytest.raises(WrongParent):
        view.apply({**patch, 1: TensorValues(values.patterns + 1)}, Step(manifest))
    view.verify()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_version_of_a_random_history_is_reached_from_every_other(
    compact: bool, seed: int, tmp_path: Path
) -> None:
    dice = random.Random(seed)
    bucket = LocalBucket(tmp_path / "bucket", create=True)
    history = History(bucket)
    for number in range(10):
        absolute = tuple(index for index in range(2) if dice.random() < 0.2)
        history.publish(compact=compact and dice.random() < 0.5, absolute=absolute)
        if number % 4 == 1:
            history.anchor(tmp_path / f"anchor{number}")
    reader = history.reader(tmp_path / "cache")
    merged = list(Compactor(bucket, reader, base=history.base).run())
    assert merged
    for delta in merged:
        singles = [
            m for m in reader.manifests() if m.kind == "delta" and delta.parent.version < m.version <= delta.version
        ]
        assert (delta.absolute > 0) == any(single.absolute for single in singles)
    for have in [None, *history.views]:
        for to in history.views:
            history.go(reader, have, to.version)
