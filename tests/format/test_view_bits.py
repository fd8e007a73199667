"""Old weights for compact deltas: several deltas in sequence, and a rank that holds a slice."""

import itertools

import numpy as np
import pytest
import torch

from hubsync.format.codec import Grid
from hubsync.format.encoding import Encoding
from hubsync.format.parts import Transition, read_delta, write_delta
from hubsync.format.patch import TensorDelta, compose
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import Advanced, ViewBits
from hubsync.kernels.bits import advance, bits_of
from tests.support.toy import TABLE, nudged, patch_between, position_of, view


def part_between(old, new, table=TABLE):
    return bytes(
        write_delta(
            table,
            patch_between(old, new, table),
            Transition("0" * 32, position_of(1, old, table), position_of(2, new, table)),
            encoding=Encoding.COMPACT,
            old=ViewBits(table, old),
        )
    )


def test_compact_deltas_decode_in_sequence_from_the_base() -> None:
    views = [view(0)]
    for seed in range(1, 5):
        views.append(nudged(views[-1], seed))
    old = ViewBits(TABLE, views[0])
    patch = {}
    for before, after in itertools.pairwise(views):
        step = read_delta(part_between(before, after), TABLE, None, Advanced(TABLE, old, patch))
        patch = compose(patch, step)
    assert patch == patch_between(views[0], views[-1])


def test_an_advanced_rectangle_is_one_of_the_patched_weights() -> None:
    before, after = view(0), nudged(view(0), 1)
    advanced = Advanced(TABLE, ViewBits(TABLE, before), patch_between(before, after))
    for index, spec in enumerate(TABLE):
        rows, cols = (slice(size // 3, size - size // 4) for size in spec.matrix)
        expected = bits_of(after[spec.name]).reshape(spec.matrix)[rows, cols]
        assert np.array_equal(advanced.rectangle(index, rows, cols), expected)
    assert torch.equal(before["q"].view(torch.int16), view(0)["q"].view(torch.int16))  # nothing was written


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_ranks_decode_their_slices_from_their_slices(ranks: int, axis: int) -> None:
    table = TensorTable([TensorSpec("w", (2048, 1024), "BF16"), TensorSpec("norm", (1024,), "BF16")])
    rng = np.random.default_rng(0)
    old = {spec.name: (torch.from_numpy(rng.standard_normal(spec.shape)) * 0.02).bfloat16() for spec in table}
    views = [old]
    for seed in (1, 2):
        views.append(nudged(views[-1], seed, 0.01))
    parts = [part_between(a, b, table) for a, b in itertools.pairwise(views)]
    whole = patch_between(views[0], views[-1], table)

    class Rank:
        """Holds a slice of rows or columns of "w", and all of "norm"."""

        def __init__(self, number):
            size = table[0].shape[axis] // ranks
            self.start, self.stop = number * size, (number + 1) * size

        def rectangle(self, index, rows, cols):
            wanted = (rows, cols)[axis]
            if index == 0 and (wanted.stop <= self.start or wanted.start >= self.stop):
                return None
            assert index or (wanted.start >= self.start and wanted.stop <= self.stop)
            return ViewBits(table, old).rectangle(index, rows, cols)

    found = []
    for number in range(ranks):
        patch = {}
        for part in parts:
            patch = compose(patch, read_delta(part, table, None, Advanced(table, Rank(number), patch)))
        assert patch[1] == whole[1]
        found.append(patch[0])
    indices = np.concatenate([delta.indices for delta in found])
    order = np.argsort(indices)
    assert TensorDelta(indices[order], np.concatenate([delta.diffs for delta in found])[order]) == whole[0]
    assert Grid.tiles(2048, 1024).count == 16


def test_lazy_views_are_opened_once_for_each_tensor() -> None:
    tensors, opened = view(0), []

    class Lazy(dict):
        def __getitem__(self, name):
            opened.append(name)
            return tensors[name]

    bits = ViewBits(TABLE, Lazy())
    for index in range(len(TABLE)):
        for _ in range(3):
            bits.rectangle(index, slice(0, 1), slice(0, 1))
    assert opened == [spec.name for spec in TABLE]


def test_a_decoded_patch_applies_to_its_old_weights() -> None:
    before, after = view(3), nudged(view(3), 4)
    for index, delta in read_delta(part_between(before, after), TABLE, None, ViewBits(TABLE, before)).items():
        bits = bits_of(before[TABLE[index].name])
        bits[delta.indices] = advance(bits[delta.indices], delta.diffs)
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before if before[n].dim())
