"""Regions: exact correspondences between elements of one checkpoint tensor and elements of one piece of live memory.

Two kinds are enough. A `Block` is strided on both sides and costs a few integers, whatever its size: slices, fused
projections, transposed weights. A `Scatter` lists every element. Both map checkpoint indices to live offsets, and list
the region's elements, on either side, in one common order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal, TypeAlias

import numpy as np
import torch


@dataclass(frozen=True)
class Block:
    """A strided block of one checkpoint tensor and the strided block of live memory it lands in.

    Element (c0, c1, ...) with `c < sizes` is element `source + sum(c * source_strides)` of the checkpoint tensor and
    element `target + sum(c * target_strides)` of the live storage. Dimensions are sorted by source stride, falling, and
    nested (each stride spans the dimensions after it), so both directions can be computed by division.
    """

    storage: int
    sizes: tuple[int, ...]
    source: int
    source_strides: tuple[int, ...]
    target: int
    target_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def source_key(self) -> tuple:
        """Identifies the checkpoint elements; equal for equal elements, also from another process."""
        return self.source, self.sizes, self.source_strides

    @property
    def contiguous(self) -> bool:
        """Is it one run of consecutive elements on both sides?"""
        return len(self.sizes) == 1 and self.source_strides == self.target_strides == (1,)

    @property
    def run(self) -> int:
        """Elements that are consecutive on both sides."""
        return self.sizes[-1] if self.source_strides[-1] == self.target_strides[-1] == 1 else 1

    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The first element of each run in the checkpoint tensor and in live memory, int64 both, in block order."""
        first = np.arange(0, self.numel, self.run)
        return self.indices(first), self.offsets(first)

    @property
    def source_extent(self) -> tuple[int, int]:
        """Half-open range of checkpoint elements that contains the block."""
        return self.source, self.source + span(self.sizes, self.source_strides)

    @property
    def target_extent(self) -> tuple[int, int]:
        """Half-open range of live elements that contains the block."""
        return self.target, self.target + span(self.sizes, self.target_strides)

    def pieces(self, limit: int) -> Iterator[Block]:
        """The same block in parts of at most `limit` elements, in order."""
        inner = math.prod(self.sizes[1:])
        if self.numel <= limit:
            yield self
        elif inner > limit:
            for row in range(self.sizes[0]):
                yield from self._slice(row, row + 1)._squeezed().pieces(limit)
        else:
            rows = limit // inner
            for first in range(0, self.sizes[0], rows):
                yield self._slice(first, min(first + rows, self.sizes[0]))

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the ascending checkpoint `indices` are in it: (their positions, their live offsets), int64."""
        low, high = self.source_extent
        first, last = (int(place) for place in np.searchsorted(indices, (low, high)))
        rest = indices[first:last] - low
        if self.contiguous:
            return np.arange(first, last), rest + self.target
        inside = np.ones(len(rest), dtype=bool)
        offsets = np.full(len(rest), self.target, dtype=np.int64)
        for size, source, target in zip(self.sizes, self.source_strides, self.target_strides, strict=True):
            coordinate = rest if source == 1 else rest // source
            if source != 1:
                rest = rest - coordinate * source
            inside &= coordinate < size
            offsets += coordinate * target
        if self.source_strides[-1] != 1:
            inside &= rest == 0
        positions = np.flatnonzero(inside)
        return positions + first, offsets[positions]

    def gather_source(self, flat: torch.Tensor) -> torch.Tensor:
        """The block's elements out of a flat checkpoint tensor, in block order, 1-D."""
        return flat.as_strided(self.sizes, self.source_strides, flat.storage_offset() + self.source).reshape(-1)

    def gather_live(self, flat: torch.Tensor) -> torch.Tensor:
        """The block's elements out of the flat live storage, in block order, 1-D."""
        return flat.as_strided(self.sizes, self.target_strides, flat.storage_offset() + self.target).reshape(-1)

    def indices(self, ranks: np.ndarray) -> np.ndarray:
        """Checkpoint indices of the block's `ranks`-th elements in block order."""
        return _unravel(ranks, self.sizes, self.source_strides, self.source)

    def offsets(self, ranks: np.ndarray) -> np.ndarray:
        """Live offsets of the block's `ranks`-th elements in block order."""
        return _unravel(ranks, self.sizes, self.target_strides, self.target)

    def _slice(self, first: int, last: int) -> Block:
        return Block(
            self.storage,
            (last - first, *self.sizes[1:]),
            self.source + first * self.source_strides[0],
            self.source_strides,
            self.target + first * self.target_strides[0],
            self.target_strides,
        )

    def _squeezed(self) -> Block:
        """Without the first dimension, which has size 1."""
        return Block(
            self.storage,
            self.sizes[1:],
            self.source,
            self.source_strides[1:],
            self.target,
            self.target_strides[1:],
        )


@dataclass(frozen=True, eq=False)
class Scatter:
    """Elements in no strided order: checkpoint index `sources[k]` (ascending) lands at live offset `targets[k]`.

    Costs 16 bytes an element. Only loaders that concatenate, flip or permute need it.
    """

    storage: int
    sources: np.ndarray
    targets: np.ndarray

    @property
    def numel(self) -> int:
        return len(self.sources)

    @property
    def source_key(self) -> tuple:
        return len(self.sources), hashlib.sha256(self.sources.tobytes()).hexdigest()

    @property
    def contiguous(self) -> bool:
        return False

    @property
    def source_extent(self) -> tuple[int, int]:
        return int(self.sources[0]), int(self.sources[-1]) + 1

    @property
    def target_extent(self) -> tuple[int, int]:
        return int(self.targets.min()), int(self.targets.max()) + 1

    def pieces(self, limit: int) -> Iterator[Scatter]:
        for first in range(0, self.numel, limit):
            yield Scatter(self.storage, self.sources[first : first + limit], self.targets[first : first + limit])

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.minimum(np.searchsorted(self.sources, indices), self.numel - 1)
        positions = np.flatnonzero(self.sources[places] == indices)
        return positions, self.targets[places[positions]]

    def gather_source(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[torch.from_numpy(self.sources).to(flat.device)]

    def gather_live(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[torch.from_numpy(self.targets).to(flat.device)]

    def indices(self, ranks: np.ndarray) -> np.ndarray:
        return self.sources[ranks]

    def offsets(self, ranks: np.ndarray) -> np.ndarray:
        return self.targets[ranks]


Region: TypeAlias = Block | Scatter
Side: TypeAlias = Literal["source", "target"]

_PIECE = 1 << 22  # elements marked at a time


# --- do regions share elements? ---------------------------------------------------------------------


def overlap(regions: Sequence[Region], side: Side, length: int) -> bool:
    """Do any two of these regions share an element of the tensor (or storage) of `length` elements?

    Extents answer it for slices of rows, boxes for slices of columns and stacked experts, whatever their size. Only
    the remaining cases are compared element by element.
    """
    extents = sorted(region.source_extent if side == "source" else region.target_extent for region in regions)
    if all(high <= low for (_, high), (low, _) in pairwise(extents)):
        return False
    boxes = _boxes(regions, side)
    if boxes is not None:
        return any(_boxes_meet(one, other) for one, other in combinations(boxes, 2))
    seen = np.zeros(length, dtype=bool)
    for region in regions:
        for piece in region.pieces(_PIECE):
            ranks = np.arange(piece.numel)
            places = piece.indices(ranks) if side == "source" else piece.offsets(ranks)
            if seen[places].any():
                return True
            seen[places] = True
    return False


_Box: TypeAlias = list[tuple[int, int]]  # a half-open interval for each digit of a position


def _boxes(regions: Sequence[Region], side: Side) -> list[_Box] | None:
    """Every block as a box: positions in the mixed radix system of all strides. None if one of them is no box."""
    views = []
    for region in regions:
        if isinstance(region, Scatter):
            return None
        start, strides = region.source, region.source_strides
        if side == "target":
            start, strides = region.target, region.target_strides
        views.append((start, dict(zip(strides, region.sizes, strict=True))))
    radices = sorted({1}.union(*(dims for _, dims in views)), reverse=True)
    if any(outer % inner for outer, inner in pairwise(radices)):
        return None
    boxes = [_box(start, dims, radices) for start, dims in views]
    return None if any(box is None for box in boxes) else [box for box in boxes if box is not None]


def _box(start: int, dims: dict[int, int], radices: Sequence[int]) -> _Box | None:
    lows, lengths = [], [dims.get(stride, 1) for stride in radices]
    for stride in radices:
        digit, start = divmod(start, stride)
        lows.append(digit)
    for level in range(len(radices) - 1, 0, -1):
        radix = radices[level - 1] // radices[level]
        if lows[level] + lengths[level] <= radix:
            continue
        if lows[level] or lengths[level] % radix or lengths[level - 1] != 1:
            return None  # it runs over the end of a row, and not by whole rows
        lengths[level - 1], lengths[level] = lengths[level] // radix, radix
    return [(low, low + length) for low, length in zip(lows, lengths, strict=True)]


def _boxes_meet(one: _Box, other: _Box) -> bool:
    return all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))


# --- strides ----------------------------------------------------------------------------------------


def span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a strided block, both included; 0 if it is empty."""
    if math.prod(sizes) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def block(
    storage: int,
    sizes: Sequence[int],
    source: int,
    source_strides: Sequence[int],
    target: int,
    target_strides: Sequence[int],
) -> Block | None:
    """The block in canonical form: as few dimensions as possible, nested on both sides. None if it cannot be nested."""
    rows = [row for row in zip(sizes, source_strides, target_strides, strict=True) if row[0] != 1]
    rows.sort(key=lambda row: -row[1])
    merged: list[tuple[int, int, int]] = []
    for size, a, b in rows:
        if merged and merged[-1][1:] == (size * a, size * b):
            merged[-1] = (merged[-1][0] * size, a, b)
        else:
            merged.append((size, a, b))
    merged = merged or [(1, 1, 1)]
    by_target = sorted(merged, key=lambda row: -row[2])
    if not _nested([(size, a) for size, a, _ in merged]) or not _nested([(size, b) for size, _, b in by_target]):
        return None
    dims, sources, targets = zip(*merged, strict=True)
    return Block(storage, dims, source, sources, target, targets)


def _nested(dims: Sequence[tuple[int, int]]) -> bool:
    """Does every stride span all the dimensions after it? Then no two coordinates meet, and division finds them."""
    inner = 1
    for size, stride in reversed(dims):
        if stride < inner:
            return False
        inner = size * stride
    return True


def _unravel(ranks: np.ndarray, sizes: Sequence[int], strides: Sequence[int], start: int) -> np.ndarray:
    places = np.full(len(ranks), start, dtype=np.int64)
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        places += ranks % size * stride
        ranks = ranks // size
    return places
