"""`benchmarks.sizing` finds the update that was made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.sizing import measure
from benchmarks.snapshots import Pair
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import bits_of


def test_finds_the_mean_update_of_a_step() -> None:
    rng = np.random.default_rng(0)
    old = rng.standard_normal(2_000_000, np.float32) * np.float32(0.02)
    new = old + np.float32(4e-7) * rng.choice([-1, 1], len(old)).astype(np.float32)
    bits = [bits_of(torch.from_numpy(weights).bfloat16()) for weights in (old, new)]
    row = measure(Pair("a step", TensorTable([TensorSpec("w", (len(old),), "BF16")]), *bits), 1e-6)
    assert row.r == pytest.approx(0.4, rel=0.02)
    assert row.changed < row.thrice < row.tenfold
