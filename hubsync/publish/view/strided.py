"""Checkpoint tensors that are parts of a live tensor, without copies.

A model may hold many checkpoint tensors as one parameter, for example all experts of a layer. Each of them is published
as a `StridedView`: a strided view of the parameter, computed from its memory at each access.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hubsync.errors import ConfigError

from .boxes import Box, Boxes, intersection, strides, with_elements
from .pieces import Pieces, is_buffer, pieces_of
from .shards import Shard, held_boxes, local_part

_LONGEST = 1 << 28  # elements of several tensors that are compared together: bounds the memory for their cast


@dataclass(frozen=True)
class Place:
    """The position of a tensor in a larger one, counted in the larger one's elements in row-major order.

    Attributes:
        shape: shape of the tensor.
        stride: distance from one of its elements to the next, in each dimension.
        offset: position of its first element.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether its elements are consecutive."""
        expected = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        return all(
            size == 1 or stride == own for size, stride, own in zip(self.shape, self.stride, expected, strict=True)
        )

    @cached_property
    def _has_whole_rows(self) -> bool:
        """Whether the elements of each of its rows are consecutive, in any order, and the rows too."""
        row = math.prod(self.shape[1:])
        inside = sum((size - 1) * stride for size, stride in zip(self.shape[1:], self.stride[1:], strict=True)) + 1
        return len(self.shape) > 0 and self.stride[0] == row == inside

    @cached_property
    def stop(self) -> int:
        """Position after its last element."""
        if 0 in self.shape:
            return self.offset
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True)) + 1

    def within(self, start: int, stop: int) -> Box | None:
        """Its part in elements `start .. stop` of the larger tensor: rows, or a run; None if it is scattered."""
        if start <= self.offset and self.stop <= stop:
            return Box.whole(self.shape)
        if stop <= self.offset or self.stop <= start:
            return Box((0,) * len(self.shape), (0,) * len(self.shape))
        if not self._has_whole_rows:
            return None
        row = math.prod(self.shape[1:])
        first, end = max(start - self.offset, 0), min(stop, self.stop) - self.offset
        if first % row or end % row:
            return Box((first,), (end - first,)) if self.is_contiguous else None
        return Box((first // row, *(0,) * (len(self.shape) - 1)), ((end - first) // row, *self.shape[1:]))


class StridedView(torch.Tensor):
    """A published tensor that is a part of a live one. It has the published shape and dtype, and no memory.

    `shards.local_part` returns the elements that this process holds. All other operations raise TypeError.

    Attributes:
        whole: the live parameter or buffer.
        place: position of the tensor in `whole`.
        box: the part of the tensor that this process holds.
        start: the first element of `box`, among the elements that this process holds of `whole`.

    Raises:
        ConfigError: the live tensor is sharded so that no process holds such a part of it in one piece.
    """

    whole: torch.Tensor
    place: Place
    box: Box
    start: int

    @staticmethod
    def __new__(cls, name: str, whole: torch.Tensor, place: Place) -> StridedView:
        made: StridedView = torch.Tensor._make_wrapper_subclass(
            cls, place.shape, dtype=whole.dtype, device=whole.device, requires_grad=whole.requires_grad
        )
        made.whole, made.place = whole, place
        made.box, made.start = _held(name, whole, place)
        return made

    def __init__(self, name: str, whole: torch.Tensor, place: Place):
        """`__new__` does everything: torch requires it for wrapper subclasses."""

    @property
    def boxes(self) -> Boxes:
        return with_elements([self.box])

    def to_local(self) -> torch.Tensor:
        """The elements that this process holds, in the memory of the live tensor."""
        local = local_part(self.whole)
        if self.box.numel == 0:
            return local.new_empty(self.box.shape)
        return local.as_strided(self.box.shape, _strides_of(self.box, self.place), local.storage_offset() + self.start)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} on a part of a live tensor: take its local_part")


def part_of(name: str, whole: torch.Tensor, place: Place) -> torch.Tensor:
    """A published tensor that is a part of a live one, of which this process may hold anything.

    ConfigError if what it holds of the part is neither rows, nor a run of elements, nor rectangles.
    """
    if hasattr(whole, "to_local") and _rows_of(name, whole, place) is None:
        held = _rectangles(name, whole, place)
        if held is not None:
            return Pieces(place.shape, held, whole, is_buffer(whole))
    return StridedView(name, whole, place)


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """The live parameter or buffer that contains a published tensor, or that is the published tensor."""
    return tensor.whole if isinstance(tensor, StridedView) else tensor


def row_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The live tensor that holds a published one as consecutive elements, and the first held element in it.

    The published tensor itself and 0, if it is scattered or no part of another tensor.
    """
    if isinstance(tensor, StridedView) and tensor.place.is_contiguous:
        return tensor.whole, tensor.start
    return tensor, 0


@dataclass(frozen=True)
class ElementRun:
    """Consecutive elements of a live tensor, and the published tensors in them.

    Attributes:
        indices: table indices of these tensors.
        starts: int64[tensors], the first element of each, counted in the run.
        stops: int64[tensors], the end of each (exclusive).
    """

    indices: tuple[int, ...]
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[tuple[int, int, int]]) -> ElementRun:
        """The run of tensors given as (index, start, stop)."""
        indices, starts, stops = zip(*parts, strict=True)
        return cls(indices, np.array(starts, np.int64), np.array(stops, np.int64))

    def is_one_tensor(self, last: int) -> bool:
        """Whether elements up to `last` all belong to one tensor, which starts with the run."""
        return int(self.starts[0]) == 0 and last < int(self.stops[0])

    def split(self, elements: np.ndarray) -> Iterator[tuple[int, slice, int]]:
        """For each tensor with some of these elements (int64, ascending): its index, their slice, its start."""
        firsts, lasts = np.searchsorted(elements, self.starts), np.searchsorted(elements, self.stops)
        for number in np.flatnonzero(firsts < lasts).tolist():
            yield self.indices[number], slice(firsts[number], lasts[number]), int(self.starts[number])


def element_runs(
    live: Sequence[torch.Tensor], shards: Sequence[Shard], dtypes: Sequence[torch.dtype]
) -> list[tuple[int, ElementRun]]:
    """The elements of published tensors that this process owns, as few runs as possible.

    Args:
        live: the published tensors, in the table's order.
        shards: the elements owned of each.
        dtypes: the dtype that each is published in. A run has one.

    Returns:
        Each run with its first element, counted in what this process holds of the live tensor that `row_of` returns.
    """
    rows: list[list[tuple[int, int, int]]] = []
    last: torch.Tensor | None = None  # the tensor of the last row
    for index, (tensor, shard, dtype) in enumerate(zip(live, shards, dtypes, strict=True)):
        whole, offset = row_of(tensor)
        if index and dtype != dtypes[index - 1]:
            last = None
        start = offset + shard.start
        if last is whole and shard.numel == 0:
            start = rows[-1][-1][2]
        if last is not whole or start != rows[-1][-1][2] or start + shard.numel - rows[-1][0][1] > _LONGEST:
            rows.append([])
        rows[-1].append((index, start, start + shard.numel))
        last = whole
    return [
        (row[0][1], ElementRun.of([(index, start - row[0][1], stop - row[0][1]) for index, start, stop in row]))
        for row in rows
    ]


def _held(name: str, whole: torch.Tensor, place: Place) -> tuple[Box, int]:
    """The part of a published tensor that this process holds, and its first element in what it holds of `whole`."""
    if not local_part(whole).is_contiguous():
        raise ConfigError(
            f"{name} is a part of a parameter whose memory is not contiguous: make the parameter contiguous"
        )
    held = _rows_of(name, whole, place)
    if held is None:
        shapes = [list(box.shape) for box in held_boxes(name, whole)]
        raise ConfigError(
            f"{name} is a part of a parameter {list(whole.shape)}, and this process holds {shapes} of it, no whole "
            "rows: shard its first dimension (the experts, as `fully_shard` does), or use DDP"
        )
    return held


def _rows_of(name: str, whole: torch.Tensor, place: Place) -> tuple[Box, int] | None:
    """`_held`, if this process holds consecutive elements of `whole`, and rows or a run of the part; else None."""
    boxes = held_boxes(name, whole)
    if not boxes:
        return Box((0,) * len(place.shape), (0,) * len(place.shape)), 0
    start = boxes[0].first_in(tuple(whole.shape)) if len(boxes) == 1 else None
    box = None if start is None else place.within(start, start + boxes[0].numel)
    if start is None or box is None:
        return None
    if box.numel == 0:
        return box, 0
    return box, place.offset + sum(
        at * step for at, step in zip(box.offset, _strides_of(box, place), strict=True)
    ) - start


def _rectangles(name: str, whole: torch.Tensor, place: Place) -> list[tuple[Box, torch.Tensor]] | None:
    """The rectangles of a published tensor that this process holds of `whole`, each with its memory.

    None if a dimension of the published tensor is not one of `whole`.
    """
    dims = _dimensions(tuple(whole.shape), place)
    if dims is None:
        return None
    first = _coordinates(place.offset, whole.shape)
    lengths = [place.shape[dims.index(dim)] if dim in dims else 1 for dim in range(whole.ndim)]
    part = Box(tuple(first), tuple(lengths))  # in `whole`
    found = []
    for box, held in pieces_of(name, whole):
        shared = intersection(box, part)
        if shared.numel == 0:
            continue
        offset = tuple(0 if dim is None else shared.offset[dim] - first[dim] for dim in dims)
        extent = tuple(1 if dim is None else shared.shape[dim] for dim in dims)
        step = [1 if dim is None else held.stride(dim) for dim in dims]
        inside = zip(shared.offset, box.offset, held.stride(), strict=True)
        begin = int(held.storage_offset()) + sum((at - start) * stride for at, start, stride in inside)
        found.append((Box(offset, extent), held.as_strided(extent, step, begin)))
    return found


def _dimensions(shape: tuple[int, ...], place: Place) -> list[int | None] | None:
    """The dimension of a larger tensor that each dimension of a part of it lies in; None for one of size 1.

    None if there is no such dimension, because the part merges several or skips elements.
    """
    if 0 in shape or 0 in place.shape:
        return None
    steps = strides(shape)
    first = _coordinates(place.offset, shape)
    found: list[int | None] = []
    for size, stride in zip(place.shape, place.stride, strict=True):
        fitting = [dim for dim, step in enumerate(steps) if step == stride and first[dim] + size <= shape[dim]]
        if size > 1 and not fitting:
            return None
        found.append(fitting[0] if size > 1 else None)
    return found


def _coordinates(index: int, shape: Sequence[int]) -> list[int]:
    """Of an element, given by its flat index in a tensor."""
    return [index // step % size for size, step in zip(shape, strides(shape), strict=True)]


def _strides_of(box: Box, place: Place) -> tuple[int, ...]:
    """Distance from one held element to the next, in each dimension of the box."""
    return place.stride if len(box.shape) == len(place.stride) else (1,)
