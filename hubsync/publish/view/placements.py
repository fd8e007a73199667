"""The rectangles of a DTensor that a process holds, for any combination of placements on a mesh.

torch applies the placements of a mesh from left to right. `Shard(dim)` splits what is held along a dimension into a
chunk for each rank. `_StridedShard(dim, split_factor=n)` first splits it into n groups, and a rank holds one chunk of
each: torch uses it where FSDP2 splits what tensor parallelism has split, transformers for parameters that are fused
(gate and up projections). So a process may hold several runs along a dimension, which its memory holds one after the
other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hubsync.errors import ConfigError

from .boxes import Box

Runs = list[tuple[int, int]]
"""First index and length of runs along a dimension of a tensor, ascending."""


@dataclass(frozen=True)
class Split:
    """A dimension of a mesh splits a dimension of a tensor.

    Attributes:
        dim: dimension of the tensor.
        ranks: number of ranks in the dimension of the mesh.
        rank: this process's coordinate there.
        groups: the tensor is split into so many groups first, and each rank holds a chunk of each.
    """

    dim: int
    ranks: int
    rank: int
    groups: int = 1


def rectangles(name: str, tensor: torch.Tensor) -> list[tuple[Box, Box]]:
    """What this process holds of a DTensor: each box in the tensor, and the same in what `to_local` returns.

    No empty ones. ConfigError for a tensor of another kind, and for placements that are no elements of the tensor.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        raise ConfigError(f"{name} is a {type(tensor).__name__}: of sharded tensors only DTensors are supported")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    splits = []
    for ranks, rank, placement in zip(tensor.device_mesh.shape, coordinate, tensor.placements, strict=True):
        if not placement.is_replicate():
            splits.append(_split(name, tensor.ndim, placement, ranks, rank))
    return list(split_boxes(tuple(tensor.shape), splits))


def split_boxes(shape: Sequence[int], splits: Sequence[Split]) -> Iterator[tuple[Box, Box]]:
    """The boxes of a tensor that are left of it after some splits, each also as a box of the local tensor."""
    runs: list[Runs] = [[(0, size)] for size in shape]
    for split in splits:
        runs[split.dim] = _chosen(runs[split.dim], split)
    starts = [list(itertools.accumulate((size for _, size in held), initial=0)) for held in runs]
    for numbers in itertools.product(*(range(len(held)) for held in runs)):
        chosen = [held[number] for held, number in zip(runs, numbers, strict=True)]
        extent = tuple(size for _, size in chosen)
        if math.prod(extent):
            local = tuple(start[number] for start, number in zip(starts, numbers, strict=True))
            yield Box(tuple(first for first, _ in chosen), extent), Box(local, extent)


def _split(name: str, dimensions: int, placement: Any, ranks: int, rank: int) -> Split:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if not isinstance(placement, (Shard, _StridedShard)):
        raise ConfigError(f"{name} is placed as {placement}: redistribute it to Shard or Replicate placements")
    return Split(placement.dim % dimensions, ranks, rank, getattr(placement, "split_factor", 1))


def _chosen(held: Runs, split: Split) -> Runs:
    """A rank's part of what is held along a dimension. Chunks are those of `torch.chunk`: the last may be empty."""
    found: Runs = []
    size = sum(length for _, length in held)
    for begin, end in _chunks(0, size, split.groups):
        begin, end = _chunks(begin, end, split.ranks)[split.rank]
        position = 0
        for first, length in held:
            start, stop = max(begin - position, 0), min(end - position, length)
            if start < stop:
                found.append((first + start, stop - start))
            position += length
    return _joined(found)


def _chunks(begin: int, end: int, number: int) -> list[tuple[int, int]]:
    step = -(-(end - begin) // number)
    return [(min(begin + step * at, end), min(begin + step * (at + 1), end)) for at in range(number)]


def _joined(runs: Runs) -> Runs:
    """The same indices in as few runs as possible."""
    found: Runs = []
    for first, length in runs:
        if found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((first, length))
    return found
