"""Shards: which elements of each tensor each rank publishes. All ranks compute the same partition of the view.

A rank holds one box of every tensor, a rectangle in any number of dimensions: the whole tensor in data parallel
training, rows under FSDP2, any rectangle under other DTensor placements, a run of elements under ZeRO-3. Ranks that
hold the same box are replicas and divide it: all boxes that the same ranks hold are concatenated, and split into pieces
of equal length. So every element has one owner, replicas have equal work, and few tensors are split.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hubsync.errors import ConfigError

_ALIGNED = 64  # elements; pieces start where comparisons by words and vectors do
_AT_ONCE = 1 << 22  # elements whose indices are held at a time


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor: its offset and its shape.

    A box with one dimension is a run of elements in row-major order, whatever the tensor's dimensions are.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """The elements of a tensor that one rank owns: `start .. stop` of its box, in row-major order.

    Attributes:
        full: shape of the tensor in the checkpoint.
        box: the part of the tensor that the rank holds.
    """

    full: tuple[int, ...]
    box: Box
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Shard:
        """The whole tensor."""
        full = tuple(shape)
        return cls(full, Box((0,) * len(full), full), 0, math.prod(full))

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @cached_property
    def first(self) -> int | None:
        """Flat index of the first owned element, if the owned elements are consecutive in the tensor; else None."""
        full = self._counted
        leading = next((d for d, size in enumerate(self.box.shape) if size > 1), len(self.box.shape)) + 1
        if self.box.shape[leading:] != full[leading:]:
            return None
        return self.start + sum(at * stride for at, stride in zip(self.box.offset, _strides(full), strict=True))

    def globally(self, indices: np.ndarray) -> np.ndarray:
        """Flat indices in the tensor of owned elements, given by their numbers from 0 (both int64[n], ascending)."""
        if self.first is not None:
            return indices + self.first if self.first else indices
        rest, out = indices + self.start, np.zeros_like(indices)
        dimensions = zip(self.box.offset, _strides(self.box.shape), _strides(self._counted), strict=True)
        for offset, inner, outer in dimensions:
            at, rest = np.divmod(rest, inner)
            out += (at + offset) * outer
        return out

    @property
    def _counted(self) -> tuple[int, ...]:
        """Shape of the tensor in the dimensions of the box."""
        return self.full if len(self.box.shape) == len(self.full) else (math.prod(self.full),)

    def pieces(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first, last, flat indices in the tensor) of owned elements, a few million at a time."""
        for first in range(0, self.numel, _AT_ONCE):
            last = min(first + _AT_ONCE, self.numel)
            yield first, last, self.globally(np.arange(first, last, dtype=np.int64))


def box_of(shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], sharded: Sequence[int | None]) -> Box:
    """The part of a tensor that the rank at a coordinate of a device mesh holds.

    Args:
        shape: shape of the whole tensor.
        mesh: number of ranks in each dimension of the mesh.
        coordinate: the rank's coordinate in the mesh.
        sharded: for each dimension of the mesh, the dimension of the tensor that is split over it, as `torch.chunk`
            splits (the last pieces may be smaller, or empty); None where the tensor is replicated.
    """
    offset, extent = [0] * len(shape), list(shape)
    for ranks, rank, dim in zip(mesh, coordinate, sharded, strict=True):
        if dim is None:
            continue
        size = -(-extent[dim] // ranks)
        first = min(rank * size, extent[dim])
        offset[dim] += first
        extent[dim] = min(size, extent[dim] - first)
    return Box(tuple(offset), tuple(extent))


def held_box(name: str, tensor: torch.Tensor) -> Box:
    """The part of a live tensor that this rank holds. ConfigError for placements that are no rectangle."""
    known = getattr(tensor, "box", None)
    if isinstance(known, Box):  # a StridedView or a Partition
        return known
    if not hasattr(tensor, "to_local"):
        return Shard.whole(tensor.shape).box
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Sharded

    if not isinstance(tensor, DTensor):
        raise ConfigError(f"{name} is a {type(tensor).__name__}: of sharded tensors only DTensors are supported")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return Box((0,) * tensor.ndim, (0,) * tensor.ndim)
    sharded: list[int | None] = []
    for placement in tensor.placements:
        if type(placement) not in (Replicate, Sharded):
            raise ConfigError(
                f"{name} is placed as {placement}: only Shard and Replicate are supported (FSDP2 combined with tensor "
                "parallelism on the same dimension is not)"
            )
        sharded.append(placement.dim if isinstance(placement, Sharded) else None)
    box = box_of(tensor.shape, tuple(tensor.device_mesh.shape), coordinate, sharded)
    require_held(name, tensor, box)
    return box


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a live tensor that this process holds: all, or the local part of a DTensor. No collective."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def require_held(name: str, tensor: torch.Tensor, box: Box) -> None:
    """ConfigError unless this process holds this box of a live tensor."""
    held = tuple(local_part(tensor).shape)
    if held != box.shape and box.numel + math.prod(held) > 0:
        raise ConfigError(
            f"{name} is held in this process as {list(held)} instead of {list(box.shape)}: publish after an optimizer "
            "step, while parameters are sharded as they were when the engine was made"
        )


def divide(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    held: Sequence[Sequence[Box]],
    whole: Collection[int] = (),
) -> list[list[Shard]]:
    """Rank -> the elements of each tensor that it owns. Every element has exactly one owner.

    Args:
        names, shapes: names and shapes of the tensors.
        held: rank -> the box of each tensor that it holds. Equal arguments give equal results on every rank.
        whole: indices of tensors whose boxes are not split: the lowest rank that holds one owns it.

    Raises:
        ConfigError: the boxes of a tensor do not add up to the whole tensor.
    """
    owned = [[Shard(shape, box, 0, 0) for shape, box in zip(shapes, boxes, strict=True)] for boxes in held]
    lines: dict[tuple[int, ...], list[tuple[int, Box]]] = {}
    for index, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        holders: dict[Box, list[int]] = {}
        for rank, boxes in enumerate(held):
            if boxes[index].numel:
                holders.setdefault(boxes[index], []).append(rank)
        if sum(box.numel for box in holders) != math.prod(shape):
            raise ConfigError(
                f"the ranks together do not hold {name} {list(shape)} exactly once, but {_listed(holders)}: "
                "every rank of the process group must make an engine of the same model"
            )
        for box, ranks in holders.items():
            lines.setdefault(tuple(ranks[:1] if index in whole else ranks), []).append((index, box))
    for replicas, line in lines.items():
        for index, rank, shard in _cut(line, replicas, shapes):
            owned[rank][index] = shard
    return owned


def _cut(
    line: Sequence[tuple[int, Box]], replicas: Sequence[int], shapes: Sequence[tuple[int, ...]]
) -> Iterator[tuple[int, int, Shard]]:
    """Split concatenated boxes into a piece of equal length for each replica."""
    total, position = sum(box.numel for _, box in line), 0
    cuts = [total * number // len(replicas) for number in range(len(replicas) + 1)]
    for index, box in line:
        ends = [min(max(_round_up(cut - position), 0), box.numel) for cut in cuts]
        for rank, start, stop in zip(replicas, ends[:-1], ends[1:], strict=True):
            if start < stop:
                yield index, rank, Shard(shapes[index], box, start, stop)
        position += box.numel


def _round_up(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _listed(holders: dict[Box, list[int]]) -> str:
    return ", ".join(f"{list(box.shape)} at {list(box.offset)}" for box in list(holders)[:4]) or "nothing"
