"""Shards: every element of a model has exactly one owner, in every sharding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as Sharded
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from hubsync.errors import ConfigError
from hubsync.format.digest import Digest, digest_range, tensor_seed
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view import shards
from hubsync.publish.view.shards import Box, Shard, box_of, divide

SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)


def run_of(shape: tuple[int, ...], rank: int, ranks: int) -> Box:
    """As DeepSpeed ZeRO-3 partitions a parameter: equal runs, the last ones shorter, or empty."""
    total, size = math.prod(shape), -(-math.prod(shape) // ranks)
    start = min(rank * size, total)
    return Box((start,), (min(size, total - start),))


def held_of(numbered: np.ndarray, box: Box) -> np.ndarray:
    """The elements of an array in a box, in order."""
    if len(box.shape) != numbered.ndim:
        numbered = numbered.reshape(-1)
    return numbered[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].reshape(-1)


@st.composite
def spreads(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[list[Box]]]:
    """Shapes of some tensors, and the boxes that each rank of a mesh holds: sharded or replicated over each dimension,
    or split into runs of elements."""
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
    sharded = [
        [draw(st.sampled_from([None, *range(len(shape))])) for _ in mesh]
        for shape in shapes
    ]  # fmt: skip
    runs = [draw(st.booleans()) for _ in shapes]
    held = [
        [
            run_of(shape, rank, math.prod(mesh)) if run else box_of(shape, mesh, coordinate, dims)
            for shape, dims, run in zip(shapes, sharded, runs, strict=True)
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
def test_every_element_is_owned_exactly_once(spread: tuple[list[tuple[int, ...]], list[list[Box]]]) -> None:
    shapes, held = spread
    counts = [np.zeros(math.prod(shape), int) for shape in shapes]
    for owned in divide(names_of(shapes), shapes, held):
        for count, shard in zip(counts, owned, strict=True):
            count[shard.globally(np.arange(shard.numel))] += 1
    assert all((count == 1).all() for count in counts)


@given(spreads())
def test_a_rank_owns_only_held_elements_in_order(
    spread: tuple[list[tuple[int, ...]], list[list[Box]]],
) -> None:
    shapes, held = spread
    for boxes, owned in zip(held, divide(names_of(shapes), shapes, held), strict=True):
        for shape, box, shard in zip(shapes, boxes, owned, strict=True):
            numbered = np.arange(math.prod(shape)).reshape(shape)
            local = held_of(numbered, box)
            mine = local[shard.start : shard.stop]
            assert shard.globally(np.arange(shard.numel)).tolist() == mine.tolist()
            assert [at for *_, piece in shard.pieces() for at in piece] == mine.tolist()
            if shard.numel and shard.first is not None:
                assert mine.tolist() == list(range(shard.first, shard.first + shard.numel))


@given(spreads())
def test_replicas_share_the_work_equally(spread: tuple[list[tuple[int, ...]], list[list[Box]]]) -> None:
    shapes, held = spread
    owned = divide(names_of(shapes), shapes, held)
    work: dict[tuple[Box, ...], list[int]] = {}
    for boxes, own in zip(held, owned, strict=True):
        work.setdefault(tuple(boxes), []).append(sum(shard.numel for shard in own))
    if len(work) == 1:  # all ranks hold the same
        (counts,) = work.values()
        assert max(counts) - min(counts) <= 1


@given(st.data())
def test_boxes_equal_the_shards_of_torch(data: st.DataObject) -> None:
    mesh = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    shape = data.draw(SHAPES)
    sharded = [data.draw(st.sampled_from([None, *range(len(shape))])) for _ in mesh]
    coordinate = [data.draw(st.integers(0, ranks - 1)) for ranks in mesh]
    placements: list[Any] = [Replicate() if dim is None else Sharded(dim) for dim in sharded]
    box = box_of(shape, mesh, coordinate, sharded)
    theirs, offset = _compute_local_shape_and_global_offset(shape, tuple(mesh), coordinate, placements)
    assert box.shape == tuple(theirs)
    if box.numel:  # the offset of an empty box does not matter
        assert box.offset == tuple(offset)


@given(spreads(), st.integers(0, 1 << 32))
def test_changes_and_digests_of_ranks_add_up_to_the_whole(
    spread: tuple[list[tuple[int, ...]], list[list[Box]]], seed: int
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
        live = {name: _held(old[name], box) for name, box in zip(names, boxes, strict=True)}
        snapshot = Snapshot(live, table, shards=own)
        before += snapshot.digest
        for name, box in zip(names, boxes, strict=True):
            live[name].copy_(_held(new[name], box))
        detected = snapshot.detect()
        snapshot.advance(detected)
        assert not snapshot.detect().changes
        after += snapshot.digest
        for index, delta in detected.patch.items():
            found[names[index]] += delta.indices.tolist()
    for name in names:
        assert sorted(found[name]) == np.flatnonzero(old[name] != new[name]).tolist()
    assert (before, after) == (_digest(old), _digest(new))


def test_ranks_that_do_not_hold_the_whole_tensor_are_refused() -> None:
    half = Box((0, 0), (2, 3))
    with pytest.raises(ConfigError, match=r"do not hold w \[4, 3\] exactly once, but \[2, 3\] at \[0, 0\]"):
        divide(["w"], [(4, 3)], [[half], [half]])


def test_a_parameter_sharded_differently_than_before_is_refused() -> None:
    live = {"w": torch.zeros(2, 3)}
    own = [Shard((4, 3), Box((0, 0), (2, 3)), 0, 6)]
    snapshot = Snapshot(live, TensorTable([TensorSpec("w", (4, 3), "F32")]), shards=own)
    with pytest.raises(ConfigError, match=r"w is held in this process as \[4, 3\] instead of \[2, 3\]"):
        snapshot.follow({"w": torch.zeros(4, 3)})


def _held(bits: np.ndarray, box: Box) -> torch.Tensor:
    return torch.from_numpy(np.array(held_of(bits, box)).reshape(box.shape)).view(torch.bfloat16)


def _digest(view: dict[str, np.ndarray]) -> Digest:
    return sum((digest_range(tensor_seed(name), bits.reshape(-1)) for name, bits in view.items()), Digest())
