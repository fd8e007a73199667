"""Shards: which elements of each tensor each rank publishes. All ranks compute the same partition of the view.

A rank holds boxes of every tensor, rectangles in any number of dimensions: the whole tensor in data parallel training,
rows under FSDP2, any rectangle under other DTensor placements, several where columns are interleaved, a run of elements
under ZeRO-3, none of a tensor of another pipeline stage. Two ranks hold the same boxes of a tensor, or no common
element. Ranks that hold the same are replicas and divide it: all boxes that the same ranks hold are concatenated, and
split into pieces of equal length. So every element has one owner, replicas have equal work, and few tensors are split.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hubsync.errors import ConfigError

from . import placements
from .boxes import Box, Boxes, first_overlap, with_elements

_SHOWN = 4  # boxes in a message
_ALIGNED = 64  # elements; pieces start where comparisons by words and vectors do
_AT_ONCE = 1 << 22  # elements whose indices are held at a time


@dataclass(frozen=True)
class Shard:
    """The elements of a tensor that one rank owns: `start .. stop` of its concatenated boxes, each in row-major order.

    Attributes:
        full: shape of the tensor in the checkpoint.
        boxes: the parts of the tensor that the rank holds.
    """

    full: tuple[int, ...]
    boxes: Boxes
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Shard:
        """The whole tensor."""
        return cls(tuple(shape), (Box.whole(shape),), 0, math.prod(shape))

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @cached_property
    def first(self) -> int | None:
        """Flat index of the first owned element, if the owned elements are consecutive in the tensor; else None."""
        if len(self._owned) != 1:
            return None if self._owned else 0
        begin, box = self._owned[0]
        first = box.first_in(self.full)
        return None if first is None else first + self.start - begin

    def globally(self, indices: np.ndarray) -> np.ndarray:
        """Flat indices in the tensor of owned elements, given by their numbers from 0 (both int64[n]).

        `indices` ascend. The result ascends if there is one box.
        """
        if self.first is not None:
            return indices + self.first if self.first else indices
        held = indices + self.start
        ends = np.searchsorted(held, [begin + box.numel for begin, box in self._owned]).tolist()
        starts = [0, *ends[:-1]]
        found = [
            box.globally(self.full, held[start:end] - begin)
            for (begin, box), start, end in zip(self._owned, starts, ends, strict=True)
        ]
        return np.concatenate(found) if len(found) > 1 else found[0]

    @cached_property
    def _owned(self) -> list[tuple[int, Box]]:
        """The boxes with owned elements, each with the number of its first element among those of all boxes."""
        begins = itertools.accumulate((box.numel for box in self.boxes), initial=0)
        return [
            (begin, box)
            for begin, box in zip(begins, self.boxes, strict=False)
            if begin < self.stop and self.start < begin + box.numel
        ]

    def pieces(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first, last, flat indices in the tensor) of owned elements, a few million at a time."""
        for first in range(0, self.numel, _AT_ONCE):
            last = min(first + _AT_ONCE, self.numel)
            yield first, last, self.globally(np.arange(first, last, dtype=np.int64))


def held_boxes(name: str, tensor: torch.Tensor) -> Boxes:
    """The parts of a live tensor that this rank holds. ConfigError for placements of DTensors that hold no elements."""
    known = getattr(tensor, "boxes", None)
    if isinstance(known, tuple):  # a StridedView, Pieces or a Partition
        return known
    if not hasattr(tensor, "to_local"):
        return with_elements([Box.whole(tensor.shape)])
    boxes = tuple(box for box, _ in placements.rectangles(name, tensor))
    require_held(name, tensor, boxes)
    return boxes


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a live tensor that this process holds: all, or the local part of a DTensor. No collective."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def require_held(name: str, tensor: torch.Tensor, boxes: Boxes) -> None:
    """ConfigError unless this process holds these boxes of a live tensor."""
    pieces, expected = getattr(tensor, "pieces", None), [list(box.shape) for box in boxes]
    if pieces is None:
        held = [list(local_part(tensor).shape)]
        is_same = held == expected or (not boxes and math.prod(held[0]) == 0)
    else:
        held = [list(box.shape) for box, _ in pieces]
        is_same = held_boxes(name, tensor) == boxes
    if not is_same:
        raise ConfigError(
            f"{name} is held in this process as {_shapes(held)} instead of {_shapes(expected)}: publish after an "
            "optimizer step, while parameters are sharded as they were when the engine was made"
        )


def divide(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    held: Sequence[Sequence[Boxes]],
    whole: Collection[int] = (),
) -> list[list[Shard]]:
    """Rank -> the elements of each tensor that it owns. Every element has exactly one owner.

    Args:
        names, shapes: names and shapes of the tensors.
        held: rank -> the boxes of each tensor that it holds. Equal arguments give equal results on every rank.
        whole: indices of tensors that are not split among replicas: the lowest rank that holds one owns it.

    Raises:
        ConfigError: an element is held by no rank, or the elements that two ranks hold are neither the same nor
            disjoint.
    """
    owned = [[Shard(shape, boxes, 0, 0) for shape, boxes in zip(shapes, held_by, strict=True)] for held_by in held]
    lines: dict[tuple[int, ...], list[tuple[int, Boxes]]] = {}
    for index, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        holders: dict[Boxes, list[int]] = {}
        for rank, held_by in enumerate(held):
            if held_by[index]:
                holders.setdefault(held_by[index], []).append(rank)
        _require_all_once(name, shape, holders)
        for boxes, ranks in holders.items():
            lines.setdefault(tuple(ranks[:1] if index in whole else ranks), []).append((index, boxes))
    for replicas, line in lines.items():
        for index, rank, shard in _cut(line, replicas, shapes):
            owned[rank][index] = shard
    return owned


def _cut(
    line: Sequence[tuple[int, Boxes]], replicas: Sequence[int], shapes: Sequence[tuple[int, ...]]
) -> Iterator[tuple[int, int, Shard]]:
    """Split concatenated boxes into a piece of equal length for each replica."""
    sizes, position = [sum(box.numel for box in boxes) for _, boxes in line], 0
    cuts = [sum(sizes) * number // len(replicas) for number in range(len(replicas) + 1)]
    for (index, boxes), size in zip(line, sizes, strict=True):
        ends = [min(max(_round_up(cut - position), 0), size) for cut in cuts]
        for rank, start, stop in zip(replicas, ends[:-1], ends[1:], strict=True):
            if start < stop:
                yield index, rank, Shard(shapes[index], boxes, start, stop)
        position += size


def _round_up(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def _require_all_once(name: str, shape: tuple[int, ...], holders: dict[Boxes, list[int]]) -> None:
    """ConfigError unless every element of a tensor is in the boxes of exactly one of these holders."""
    every = [(box, ranks[0]) for boxes, ranks in holders.items() for box in boxes]
    overlap = first_overlap([box for box, _ in every], shape)
    if overlap is not None:
        left, right = (f"{_described(box)} of rank {rank}" for box, rank in (every[number] for number in overlap))
        raise ConfigError(
            f"{left} and {right} of {name} {list(shape)} overlap: two ranks must hold the same elements of a tensor, "
            "or none in common"
        )
    total = sum(box.numel for box, _ in every)
    if total != math.prod(shape):
        listed = ", ".join(_described(box) for box, _ in every[:_SHOWN]) + ", ..." * (len(every) > _SHOWN)
        raise ConfigError(
            f"the ranks together hold {total} of the {math.prod(shape)} elements of {name} {list(shape)} "
            f"({listed or 'nothing'}): every rank of the process group must make an engine of the same model, and "
            "every element must be held by one"
        )


def _described(box: Box) -> str:
    return f"{list(box.shape)} at {list(box.offset)}"


def _shapes(shapes: Sequence[list[int]]) -> str:
    return " and ".join(map(str, shapes)) or "nothing"
