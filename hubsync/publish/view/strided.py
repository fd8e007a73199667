"""Tensors of a checkpoint that lie in a part of a live one: no copies, wherever the live one is held.

A model may hold as one parameter what its checkpoint has as many tensors (the experts of a layer, say). Each of those
is published as an `Excerpt`: a strided view of the parameter, made anew from its memory whenever somebody looks at it.
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

from .shards import Box, Shard, held_box, local_part

_LONGEST = 1 << 28  # elements of several tensors that are looked at together: bounds the memory for their cast


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in another, counted in that one's elements in row-major order.

    Attributes:
        shape: of the tensor that lies there.
        stride: from one of its elements to the next, in each dimension.
        offset: of its first element.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in a row."""
        expected = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        return all(
            size == 1 or stride == own for size, stride, own in zip(self.shape, self.stride, expected, strict=True)
        )

    @cached_property
    def stop(self) -> int:
        """Behind its last element."""
        if 0 in self.shape:
            return self.offset
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True)) + 1

    def within(self, start: int, stop: int) -> Box | None:
        """The part of it that lies in these elements of the other tensor: rows, or a run; None if that is scattered."""
        if start <= self.offset and self.stop <= stop:
            return Shard.whole(self.shape).box
        if stop <= self.offset or self.stop <= start:
            return Box((0,) * len(self.shape), (0,) * len(self.shape))
        if not self.is_contiguous:
            return None
        row = math.prod(self.shape[1:])
        first, end = max(start - self.offset, 0), min(stop, self.stop) - self.offset
        if first % row or end % row:
            return Box((first,), (end - first,))
        return Box((first // row, *(0,) * (len(self.shape) - 1)), ((end - first) // row, *self.shape[1:]))


class Excerpt(torch.Tensor):
    """A published tensor that lies in a part of a live one. It has its shape and dtype, and no memory of its own.

    `shards.local_part` gives what this process holds of it; other operations are refused.

    Attributes:
        whole: the live parameter or buffer.
        place: where in it the tensor lies.
        box: what this process holds of the tensor.
        start: the first element of that, among those that this process holds of `whole`.

    Raises:
        ConfigError: the live tensor is sharded so that nobody holds such a part of it in one piece.
    """

    whole: torch.Tensor
    place: Place
    box: Box
    start: int

    @staticmethod
    def __new__(cls, name: str, whole: torch.Tensor, place: Place) -> Excerpt:
        made: Excerpt = torch.Tensor._make_wrapper_subclass(
            cls, place.shape, dtype=whole.dtype, device=whole.device, requires_grad=whole.requires_grad
        )
        made.whole, made.place = whole, place
        made.box, made.start = _held(name, whole, place)
        return made

    def __init__(self, name: str, whole: torch.Tensor, place: Place):
        """All is done in `__new__`, as torch wants it."""

    def to_local(self) -> torch.Tensor:
        """What this process holds of it, in the memory of the live tensor."""
        local = local_part(self.whole)
        if self.box.numel == 0:
            return local.new_empty(self.box.shape)
        return local.as_strided(self.box.shape, _strides_of(self.box, self.place), local.storage_offset() + self.start)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} on a part of a live tensor: take its local_part")


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """The live parameter or buffer that a published tensor lies in, or is."""
    return tensor.whole if isinstance(tensor, Excerpt) else tensor


def row_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The live tensor in which the elements of a published one lie in a row, and the first of what is held there.

    The published tensor itself, and 0, if it is scattered, or no part of another.
    """
    if isinstance(tensor, Excerpt) and tensor.place.is_contiguous:
        return tensor.whole, tensor.start
    return tensor, 0


@dataclass(frozen=True)
class Stretch:
    """Elements of a live tensor in a row, and the published tensors that lie in them.

    Attributes:
        indices: of these tensors in the table.
        starts: int64[tensors], the element of the stretch with which each begins.
        stops: int64[tensors], and behind which each ends.
    """

    indices: tuple[int, ...]
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[tuple[int, int, int]]) -> Stretch:
        """Of tensors as (index, start, stop)."""
        indices, starts, stops = zip(*parts, strict=True)
        return cls(indices, np.array(starts, np.int64), np.array(stops, np.int64))

    def split(self, elements: np.ndarray) -> Iterator[tuple[int, slice, int]]:
        """For each tensor that some of these elements (int64, ascending) lie in: its index, which ones, its start."""
        firsts, lasts = np.searchsorted(elements, self.starts), np.searchsorted(elements, self.stops)
        for number in np.flatnonzero(firsts < lasts).tolist():
            yield self.indices[number], slice(firsts[number], lasts[number]), int(self.starts[number])


def stretches_of(live: Sequence[torch.Tensor], shards: Sequence[Shard]) -> list[tuple[int, Stretch]]:
    """What this process owns of published tensors, in as few rows of elements as possible.

    Args:
        live: the published tensors, in the table's order.
        shards: what is owned of each.

    Returns:
        Each stretch, and where it begins in what is held of the live tensor that `row_of` says.
    """
    rows: list[list[tuple[int, int, int]]] = []
    last: torch.Tensor | None = None  # what the last row lies in
    for index, (tensor, shard) in enumerate(zip(live, shards, strict=True)):
        whole, offset = row_of(tensor)
        start = offset + shard.start
        if last is whole and shard.numel == 0:
            start = rows[-1][-1][2]
        if last is not whole or start != rows[-1][-1][2] or start + shard.numel - rows[-1][0][1] > _LONGEST:
            rows.append([])
        rows[-1].append((index, start, start + shard.numel))
        last = whole
    return [
        (row[0][1], Stretch.of([(index, start - row[0][1], stop - row[0][1]) for index, start, stop in row]))
        for row in rows
    ]


def _held(name: str, whole: torch.Tensor, place: Place) -> tuple[Box, int]:
    """What this process holds of a part of a live tensor, and where that begins in what it holds of the tensor."""
    if not local_part(whole).is_contiguous():
        raise ConfigError(f"{name} is published from a part of a parameter whose memory is not contiguous: make it so")
    held = held_box(name, whole)
    if held.numel == 0:
        return Box((0,) * len(place.shape), (0,) * len(place.shape)), 0
    start = Shard(tuple(whole.shape), held, 0, held.numel).first
    box = None if start is None else place.within(start, start + held.numel)
    if start is None or box is None:
        raise ConfigError(
            f"{name} is a part of a parameter {list(whole.shape)}, of which this process holds no whole rows but "
            f"{list(held.shape)}: shard its first dimension (the experts, as `fully_shard` does), or use DDP"
        )
    if box.numel == 0:
        return box, 0
    return box, place.offset + sum(
        at * step for at, step in zip(box.offset, _strides_of(box, place), strict=True)
    ) - start


def _strides_of(box: Box, place: Place) -> tuple[int, ...]:
    """From one element of what is held to the next, in each dimension of the box."""
    return place.stride if len(box.shape) == len(place.stride) else (1,)
