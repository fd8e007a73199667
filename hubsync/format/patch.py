"""Deltas in memory: changed elements, and by how many steps each changes; or new values of a whole tensor.

Changes are signed steps modulo 2^width (`kernels.bits.difference`). So they form a group: `compose` adds, `invert`
negates. New values of a whole tensor replace whatever was before them: after anything they are the new values, a change
after them gives new values, and they have no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubsync.errors import FormatError
from hubsync.kernels.bits import SIGNED, UNSIGNED, advance, find_changes
from hubsync.kernels.compiled import compiled

from .table import TensorTable


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """The changed elements of one tensor.

    Attributes:
        indices: int64[n], strictly ascending flat row-major indices in checkpoint coordinates.
        diffs: int8/16/32[n], non-zero steps between ordered integers, modulo 2^width.
    """

    indices: np.ndarray
    diffs: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorDelta):
            return NotImplemented
        return (
            self.diffs.dtype == other.diffs.dtype
            and np.array_equal(self.indices, other.indices)
            and np.array_equal(self.diffs, other.diffs)
        )


@dataclass(frozen=True, eq=False)
class TensorValues:
    """New values of a whole tensor, whatever it holds now. An absolute record of a delta part.

    Attributes:
        patterns: uint8/16/32[numel], bit patterns in row-major order.
    """

    patterns: np.ndarray

    def __len__(self) -> int:
        return len(self.patterns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorValues):
            return NotImplemented
        return self.patterns.dtype == other.patterns.dtype and np.array_equal(self.patterns, other.patterns)


Patch = dict[int, TensorDelta | TensorValues]
"""Table index -> changes or new values of the tensor. A tensor without changes has no entry."""


def compose(first: Patch, second: Patch) -> Patch:
    """The patch equal to `first`, then `second`. Elements that return to their old value are dropped."""
    out = {}
    for index in sorted(first.keys() | second.keys()):
        if index in first and index in second:
            delta = _then(first[index], second[index])
        else:
            delta = first[index] if index in first else second[index]
        if len(delta):
            out[index] = delta
    return out


def invert(patch: Patch) -> Patch:
    """The patch that undoes `patch`: `compose(patch, invert(patch)) == {}`.

    FormatError if it holds new values of a whole tensor: nothing says what was there before.
    """
    out: Patch = {}
    for index, delta in patch.items():
        if isinstance(delta, TensorValues):
            raise FormatError(f"patch: tensor {index} has new values, which cannot be undone")
        out[index] = TensorDelta(delta.indices, -delta.diffs)
    return out


def changed(patch: Patch) -> int:
    """Number of changed elements; all elements of a tensor with new values."""
    return sum(map(len, patch.values()))


def absolute(patch: Patch) -> int:
    """Number of tensors with new values. A patch without any can be undone."""
    return sum(isinstance(delta, TensorValues) for delta in patch.values())


def changes_of(delta: TensorDelta | TensorValues, old: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indices, patterns before, patterns after) of the elements of a whole tensor `old` that a delta changes."""
    if isinstance(delta, TensorDelta):
        before = old[delta.indices]
        return delta.indices, before, advance(before, delta.diffs)
    indices, _ = find_changes(old, delta.patterns)
    return indices, old[indices], delta.patterns[indices]


def check(table: TensorTable, patch: Patch) -> None:
    """Raise FormatError unless `patch` is a well-formed patch of views of this table."""
    for index, delta in patch.items():
        if not 0 <= index < len(table):
            raise FormatError(f"patch: tensor {index} is not in a table of {len(table)}")
        spec = table[index]
        if isinstance(delta, TensorValues):
            if delta.patterns.dtype != UNSIGNED[spec.width] or delta.patterns.shape != (spec.numel,):
                raise FormatError(
                    f"patch: {spec.name} needs {spec.numel} new values of {spec.width} bits, "
                    f"not {delta.patterns.dtype}{list(delta.patterns.shape)}"
                )
            continue
        if delta.indices.dtype != np.int64 or delta.diffs.dtype != SIGNED[spec.width]:
            raise FormatError(
                f"patch: {spec.name} ({spec.dtype}) needs int64 indices and {spec.width}-bit signed differences, "
                f"not {delta.indices.dtype} and {delta.diffs.dtype}"
            )
        if delta.indices.ndim != 1 or delta.indices.shape != delta.diffs.shape or len(delta) == 0:
            raise FormatError(f"patch: {spec.name} needs one difference for each index, and at least one")
        if not _is_sound(delta.indices, delta.diffs, spec.numel):
            raise FormatError(
                f"patch: the indices of {spec.name} must ascend strictly within its {spec.numel} elements, "
                "and no difference may be zero"
            )


def _then(first: TensorDelta | TensorValues, second: TensorDelta | TensorValues) -> TensorDelta | TensorValues:
    if isinstance(second, TensorValues):
        return second
    if isinstance(first, TensorDelta):
        return _add(first, second)
    patterns = first.patterns.copy()
    patterns[second.indices] = advance(patterns[second.indices], second.diffs)
    return TensorValues(patterns)


def _add(first: TensorDelta, second: TensorDelta) -> TensorDelta:
    if first.diffs.dtype != second.diffs.dtype:
        raise FormatError(f"patch: cannot add {second.diffs.dtype} differences to {first.diffs.dtype} ones")
    indices = np.empty(len(first) + len(second), np.int64)
    diffs = np.empty(len(indices), first.diffs.dtype)
    n = _merge(first.indices, first.diffs, second.indices, second.diffs, indices, diffs)
    return TensorDelta(indices[:n].copy(), diffs[:n].copy())


@compiled
def _merge(
    indices_a: np.ndarray,
    diffs_a: np.ndarray,
    indices_b: np.ndarray,
    diffs_b: np.ndarray,
    indices: np.ndarray,
    diffs: np.ndarray,
) -> int:
    """Merge two ascending lists, adding the differences of common elements. Returns the number written."""
    a, b, n = 0, 0, 0
    while a < len(indices_a) or b < len(indices_b):
        if b == len(indices_b) or (a < len(indices_a) and indices_a[a] < indices_b[b]):
            indices[n], diffs[n] = indices_a[a], diffs_a[a]
            a += 1
        elif a == len(indices_a) or indices_b[b] < indices_a[a]:
            indices[n], diffs[n] = indices_b[b], diffs_b[b]
            b += 1
        else:
            indices[n], diffs[n] = indices_a[a], diffs_a[a] + diffs_b[b]
            a += 1
            b += 1
        n += diffs[n] != 0
    return n


@compiled
def _is_sound(indices: np.ndarray, diffs: np.ndarray, numel: int) -> bool:
    previous = -1
    for i in range(len(indices)):
        if indices[i] <= previous or indices[i] >= numel or diffs[i] == 0:
            return False
        previous = indices[i]
    return True
