"""Boxes: rectangles of a tensor, counted in the coordinates of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


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

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    def first_in(self, full: tuple[int, ...]) -> int | None:
        """Flat index of its first element in a tensor of shape `full`; None if its elements are not consecutive."""
        counted = self._counted(full)
        leading = next((d for d, size in enumerate(self.shape) if size > 1), len(self.shape)) + 1
        if self.shape[leading:] != counted[leading:]:
            return None
        return sum(at * stride for at, stride in zip(self.offset, strides(counted), strict=True))

    def globally(self, full: tuple[int, ...], indices: np.ndarray) -> np.ndarray:
        """Flat indices in a tensor of shape `full` of the box's elements, given by their numbers in it (int64[n])."""
        rest, out = indices, np.zeros_like(indices)
        dimensions = zip(self.offset, strides(self.shape), strides(self._counted(full)), strict=True)
        for offset, inner, outer in dimensions:
            at, rest = np.divmod(rest, inner)
            out += (at + offset) * outer
        return out

    def _counted(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor in the dimensions of the box."""
        return full if len(self.shape) == len(full) else (math.prod(full),)


Boxes = tuple[Box, ...]
"""What a rank holds of a tensor: boxes with elements, in the order in which the rank's elements are counted."""


def strides(shape: Sequence[int]) -> list[int]:
    """Elements between neighbours in each dimension of a contiguous tensor."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def with_elements(boxes: Iterable[Box]) -> Boxes:
    """Those of the boxes that have elements."""
    return tuple(box for box in boxes if box.numel)


def joined(boxes: Sequence[Box]) -> Boxes:
    """The same elements in the same order in as few boxes as possible."""
    found: list[Box] = []
    for box in boxes:
        stacked = _stacked(found[-1], box) if found else None
        if stacked is None:
            found.append(box)
        else:
            found[-1] = stacked
    return tuple(found)


def intersection(left: Box, right: Box) -> Box:
    """The common elements of two boxes with the same number of dimensions."""
    sides = list(zip(left.offset, left.shape, right.offset, right.shape, strict=True))
    offset = tuple(max(a, b) for a, _, b, _ in sides)
    stops = (min(a + m, b + n) for a, m, b, n in sides)
    return Box(offset, tuple(max(stop - first, 0) for first, stop in zip(offset, stops, strict=True)))


def first_overlap(boxes: Sequence[Box], full: tuple[int, ...]) -> tuple[int, int] | None:
    """Numbers of two boxes of a tensor of shape `full` that have a common element; None if there are none.

    Boxes of several kinds, runs and scattered rectangles, are not compared.
    """
    firsts = [box.first_in(full) for box in boxes]
    if None not in firsts:
        boxes = [Box((first or 0,), (box.numel,)) for first, box in zip(firsts, boxes, strict=True)]
    elif any(len(box.shape) != len(full) for box in boxes):
        return None
    dimensions = range(len(boxes[0].shape)) if boxes else ()
    along = max(dimensions, key=lambda dim: len({box.offset[dim] for box in boxes}), default=0)
    active: list[int] = []
    for number in sorted(range(len(boxes)), key=lambda number: boxes[number].offset[along]):
        begin = boxes[number].offset[along]
        active = [other for other in active if begin < boxes[other].offset[along] + boxes[other].shape[along]]
        for other in active:
            if intersection(boxes[number], boxes[other]).numel:
                return min(number, other), max(number, other)
        active.append(number)
    return None


def _stacked(upper: Box, lower: Box) -> Box | None:
    """The box of the elements of two, if they follow each other in it in row-major order; else None."""
    along = next((dim for dim, (a, b) in enumerate(zip(upper.offset, lower.offset, strict=True)) if a != b), None)
    if along is None or math.prod(upper.shape[:along]) != 1 or upper.shape[:along] != lower.shape[:along]:
        return None
    after = along + 1
    rest = upper.offset[after:], upper.shape[after:]
    if rest != (lower.offset[after:], lower.shape[after:]):
        return None
    if upper.offset[along] + upper.shape[along] != lower.offset[along]:
        return None
    size = upper.shape[along] + lower.shape[along]
    return Box(upper.offset, (*upper.shape[:along], size, *upper.shape[after:]))
