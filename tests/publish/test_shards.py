"""Shards: every element of a model has exactly one owner, in every sharding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard as Sharded
from torch.distributed.tensor.placement_types import _StridedShard

from hubsync.errors import ConfigError
from hubsync.format.digest import Digest, digest_range, tensor_seed
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view import shards
from hubsync.publish.view.boxes import Box, Boxes, first_overlap, joined, with_elements
from hubsync.publish.view.placements import Split, split_boxes
from hubsync.publish.view.shards import Shard, divide

SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)


Placement = tuple[int, int] | None
"""Dimension of a tensor that is split over a dimension of a mesh, and groups that it is split into before; None where
the tensor is replicated."""


def run_of(shape: tuple[int, ...], rank: int, ranks: int) -> Boxes:
    """As DeepSpeed ZeRO-3 partitions a parameter: equal runs, the last ones shorter, or empty."""
    total, size = math.prod(shape), -(-math.prod(shape) // ranks)
    start = min(rank * size, total)
    return with_elements([Box((start,), (min(size, total - start),))])


def boxes_of(
    shape: tuple[int, ...], mesh: list[int], coordinate: tuple[int, ...], placements: list[Placement]
) -> list[tuple[Box, Box]]:
    splits = [
        Split(placement[0], ranks, rank, placement[1])
        for ranks, rank, placement in zip(mesh, coordinate, placements, strict=True)
        if placement is not None
    ]
    return list(split_boxes(shape, splits))


def held_of(numbered: np.ndarray, boxes: Boxes) -> np.ndarray:
    """The elements of an array in boxes, in order."""
    parts = [numbered.reshape(-1)[:0]]
    for box in boxes:
        array = numbered if len(box.shape) == numbered.ndim else numbered.reshape(-1)
        parts.append(array[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].reshape(-1))
    return np.concatenate(parts)


def placements_of(data: Any, shape: tuple[int, ...], mesh: list[int]) -> list[Placement]:
    """Several dimensions of a mesh may split one of the tensor, with groups or without."""
    options = [None, *((dim, groups) for dim in range(len(shape)) for groups in (1, 1, 2, 3))]
    return [data(st.sampled_from(options)) for _ in mesh]


@st.composite
def spreads(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[list[Boxes]]]:
    """Shapes of some tensors, and the boxes that each rank of a mesh holds: sharded or replicated over each dimension,
    or split into runs of elements."""
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
    placements = [placements_of(draw, shape, mesh) for shape in shapes]
    runs = [draw(st.booleans()) for _ in shapes]
    held = [
        [
            run_of(shape, rank, math.prod(mesh))
            if run
            else joined([box for box, _ in boxes_of(shape, mesh, coordinate, placed)])
            for shape, placed, run in zip(shapes, placements, runs, strict=True)
        ]
        for rank, coordinate in enumerate(np.ndindex(*mesh))
    ]
    return shapes, held


def names_of(shapes: list[tuple[int, ...]]) -> list[str]:
    return [f"t{number}" for number in range(len(shapes))]


@pytest.fixture(autouse=True)
def split_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow splits of the small tensors in these tests."""
    monkeypatch.setattr(shards, "_ALIGNED", 1)
    monkeypatch.setattr(shards, "_AT_ONCE", 5)


@given(spreads())
def test_every_element_is_owned_exactly_once(spread: tuple[list[tuple[int, ...]], list[list[Boxes]]]) -> None:
    shapes, held = spread
    counts = [np.zeros(math.prod(shape), int) for shape in shapes]
    for owned in divide(names_of(shapes), shapes, held):
        for count, shard in zip(counts, owned, strict=True):
            count[shard.globally(np.arange(shard.numel))] += 1
    assert all((count == 1).all() for count in counts)


@given(spreads())
def test_a_rank_owns_only_held_elements_in_order(
    spread: tuple[list[tuple[int, ...]], list[list[Boxes]]],
) -> None:
    shapes, held = spread
    for held_by, owned in zip(held, divide(names_of(shapes), shapes, held), strict=True):
        for shape, boxes, shard in zip(shapes, held_by, owned, strict=True):
            numbered = np.arange(math.prod(shape)).reshape(shape)
            local = held_of(numbered, boxes)
            mine = local[shard.start : shard.stop]
            assert shard.globally(np.arange(shard.numel)).tolist() == mine.tolist()
            assert [at for *_, piece in shard.pieces() for at in piece] == mine.tolist()
            if shard.numel and shard.first is not None:
                assert mine.tolist() == list(range(shard.first, shard.first + shard.numel))


@given(spreads())
def test_replicas_share_the_work_equally(spread: tuple[list[tuple[int, ...]], list[list[Boxes]]]) -> None:
    shapes, held = spread
    owned = divide(names_of(shapes), shapes, held)
    work: dict[tuple[Boxes, ...], list[int]] = {}
    for boxes, own in zip(held, owned, strict=True):
        work.setdefault(tuple(boxes), []).append(sum(shard.numel for shard in own))
    if len(work) == 1:  # all ranks hold the same
        (counts,) = work.values()
        assert max(counts) - min(counts) <= 1


@given(st.data())
def test_boxes_equal_the_shards_of_torch(data: st.DataObject) -> None:
    """torch splits a tensor of numbers, one placement after the other."""
    mesh = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shape = data.draw(SHAPES)
    placements = placements_of(data.draw, shape, mesh)
    coordinate = tuple(data.draw(st.integers(0, ranks - 1)) for ranks in mesh)
    numbered = torch.arange(math.prod(shape)).view(shape)
    local = numbered
    for ranks, rank, placement in zip(mesh, coordinate, placements, strict=True):
        if placement is not None:
            dim, groups = placement
            split: Any = Sharded(dim) if groups == 1 else _StridedShard(dim, split_factor=groups)
            local = split._split_tensor(local, ranks, with_padding=False)[0][rank]
    seen = torch.full_like(local, -1)
    for box, inside in boxes_of(shape, mesh, coordinate, placements):
        at = [tuple(slice(o, o + n) for o, n in zip(b.offset, b.shape, strict=True)) for b in (box, inside)]
        assert torch.equal(numbered[at[0]], local[at[1]])
        seen[at[1]] = local[at[1]]
    assert torch.equal(seen, local), "the boxes are all that is held"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3)), max_size=5))
def test_overlaps_of_rectangles_are_found(drawn: list[tuple[int, int, int, int]]) -> None:
    boxes = [Box((row, column), (rows, columns)) for row, column, rows, columns in drawn]
    counts = np.zeros((6, 6), int)
    for box in boxes:
        counts[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] += 1
    found = first_overlap(boxes, (6, 6))
    assert (found is not None) == (counts > 1).any()
    if found is not None:
        assert len({*held_of(np.arange(36).reshape(6, 6), tuple(boxes[n] for n in found))}) < sum(
            boxes[n].numel for n in found
        )


@given(spreads())
def test_joined_boxes_have_the_same_elements_in_the_same_order(
    spread: tuple[list[tuple[int, ...]], list[list[Boxes]]],
) -> None:
    shapes, held = spread
    for boxes_of_rank in held:
        for shape, boxes in zip(shapes, boxes_of_rank, strict=True):
            if not shape or any(len(box.shape) != len(shape) for box in boxes):
                continue
            rows = [Box((o, *b.offset[1:]), (1, *b.shape[1:])) for b in boxes for o in _first_dimension(b)]
            numbered = np.arange(math.prod(shape)).reshape(shape)
            assert held_of(numbered, joined(rows)).tolist() == held_of(numbered, boxes).tolist()
            assert len(joined(rows)) <= len(boxes)


def _first_dimension(box: Box) -> range:
    return range(box.offset[0], box.offset[0] + box.shape[0])


@given(spreads(), st.integers(0, 1 << 32))
def test_changes_and_digests_of_ranks_add_up_to_the_whole(
    spread: tuple[list[tuple[int, ...]], list[list[Boxes]]], seed: int
) -> None:
    shapes, held = spread
    generator = np.random.default_rng(seed)
    names = names_of(shapes)
    table = TensorTable([TensorSpec(name, shape, "BF16") for name, shape in zip(names, shapes, strict=True)])
    old = {
        name: generator.integers(0, 1 << 16, shape, dtype=np.uint16) for name, shape in zip(names, shapes, strict=True)
    }
    new = {name: bits ^ (generator.random(bits.shape) < 0.3) for name, bits in old.items()}
    found: dict[str, list[int]] = {name: [] for name in names}
    before, after = Digest(), Digest()
    for boxes, own in zip(held, divide(names, shapes, held), strict=True):
        live = {name: _held(old[name], held_by) for name, held_by in zip(names, boxes, strict=True)}
        snapshot = Snapshot(live, table, shards=own)
        before += snapshot.digest
        for name, held_by in zip(names, boxes, strict=True):
            live[name].copy_(_held(new[name], held_by))
        detected = snapshot.detect()
        snapshot.advance(detected)
        assert not snapshot.detect().changes
        after += snapshot.digest
        for index, delta in detected.patch.items():
            found[names[index]] += delta.indices.tolist()
    for name in names:
        assert sorted(found[name]) == np.flatnonzero(old[name] != new[name]).tolist()
    assert (before, after) == (_digest(old), _digest(new))


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([[(0, 2)], [(0, 2)]], r"hold 6 of the 12 elements of w \[4, 3\] \(\[2, 3\] at \[0, 0\]\)"),
        ([[(0, 2)], [(3, 1)]], r"hold 9 of the 12 elements"),
        ([[], []], r"hold 0 of the 12 elements of w \[4, 3\] \(nothing\)"),
        ([[(0, 3)], [(2, 2)]], r"\[3, 3\] at \[0, 0\] of rank 0 and \[2, 3\] at \[2, 0\] of rank 1 of w .* overlap"),
        ([[(0, 2), (3, 1)], [(2, 2)]], r"\[1, 3\] at \[3, 0\] of rank 0 and \[2, 3\] at \[2, 0\] of rank 1 of w"),
        (
            [[(0, 4)], [(0, 2), (3, 1)]],
            r"overlap: two ranks must hold the same elements of a tensor, or none in common",
        ),
    ],
)
def test_ranks_that_do_not_hold_every_element_once_are_refused(held: list[Any], message: str) -> None:
    boxes = [[tuple(Box((row, 0), (rows, 3)) for row, rows in of_rank)] for of_rank in held]
    with pytest.raises(ConfigError, match=message):
        divide(["w"], [(4, 3)], boxes)


def test_a_parameter_sharded_differently_than_before_is_refused() -> None:
    live = {"w": torch.zeros(2, 3)}
    own = [Shard((4, 3), (Box((0, 0), (2, 3)),), 0, 6)]
    snapshot = Snapshot(live, TensorTable([TensorSpec("w", (4, 3), "F32")]), shards=own)
    with pytest.raises(ConfigError, match=r"w is held in this process as \[4, 3\] instead of \[2, 3\]"):
        snapshot.follow({"w": torch.zeros(4, 3)})


def _held(bits: np.ndarray, boxes: Boxes) -> torch.Tensor:
    held = torch.from_numpy(np.array(held_of(bits, boxes))).view(torch.bfloat16)
    return held.reshape(boxes[0].shape) if len(boxes) == 1 else held


def _digest(view: dict[str, np.ndarray]) -> Digest:
    return sum((digest_range(tensor_seed(name), bits.reshape(-1)) for name, bits in view.items()), Digest())
