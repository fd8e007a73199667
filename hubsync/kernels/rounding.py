"""Compare float32 weights with their old bfloat16 view, without holding the whole new view.

Rounding is torch's: to nearest, ties to even. The pattern that torch rounds a NaN to depends on its place in memory and
on the processor. So these kernels only report that a NaN is present, and the caller casts the tensor with torch.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import trailing_zeros
from .compiled import compiled

_BLOCK = 1 << 12  # elements that fit the L1 cache with their flags
_CAPACITY = 1 << 14  # changes that the first lists hold

_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_HALF, _1, _16, _31 = np.uint32(0x7FFF), np.uint32(1), np.uint32(16), np.uint32(31)


def round_into(out: np.ndarray, values: np.ndarray) -> bool:
    """Write the bfloat16 patterns of float32 patterns. If there is a NaN, return False; `out` is then undefined.

    Args:
        out: uint16[n].
        values: uint32[n].
    """
    return bool(_round(values, out))


def changes(values: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Elements whose float32 pattern rounds to another bfloat16 pattern than the old one; None if there is a NaN.

    Args:
        values: uint32[n].
        old: uint16[n].

    Returns:
        (indices, new): int64 ascending, and the new bfloat16 patterns there. Memory is O(changes).
    """
    indices, new = np.empty(_CAPACITY, np.int64), np.empty(_CAPACITY, np.uint16)
    flags = np.empty(_BLOCK, np.uint8)
    start, found = 0, 0
    while start < len(values):
        if len(indices) - found < _BLOCK:
            indices, new = (_resized(array, found, 2 * len(indices)) for array in (indices, new))
        start, found = _changes(values, old, start, flags, flags.view(np.uint64), indices, new, found)
        if start < 0:
            return None
    return _resized(indices, found, found), _resized(new, found, found)


def _resized(array: np.ndarray, used: int, size: int) -> np.ndarray:
    out = np.empty(size, array.dtype)
    out[:used] = array[:used]
    return out


# The loops over elements are this plain, and separate, so that LLVM turns them into vector code.


@njit(nogil=True, inline="always")
def _rounded(value: np.uint32) -> np.uint16:
    return np.uint16(np.uint32(value + ((np.uint32(value >> _16) & _1) + _HALF)) >> _16)


@njit(nogil=True, inline="always")
def _has_nan(values: np.ndarray) -> bool:
    beyond = np.uint32(0)
    for i in range(len(values)):
        beyond |= np.uint32(_INFINITY - (values[i] & _MAGNITUDE))  # below zero, hence with the top bit, for a NaN
    return beyond >> _31 != 0


@compiled
def _round(values: np.ndarray, out: np.ndarray) -> bool:
    for first in range(0, len(values), _BLOCK):
        a, b = values[first : first + _BLOCK], out[first : first + _BLOCK]
        if _has_nan(a):
            return False
        for i in range(len(a)):
            b[i] = _rounded(a[i])
    return True


@compiled
def _changes(
    values: np.ndarray,
    old: np.ndarray,
    start: int,
    flags: np.ndarray,
    flag_words: np.ndarray,
    indices: np.ndarray,
    new: np.ndarray,
    found: int,
) -> tuple[int, int]:
    """List changes from element `start` on, while the lists have space for another block.

    Returns the next element (-1 for a NaN) and the number of changes. A block is first compared without a branch, into
    a byte for each element (`flags`, also viewed as `flag_words`). Then eight flags are tested at once.
    """
    for first in range(start, len(values), _BLOCK):
        if len(indices) - found < _BLOCK:
            return first, found
        a, b = values[first : first + _BLOCK], old[first : first + _BLOCK]
        if _has_nan(a):
            return -1, found
        for i in range(len(a)):
            flags[i] = _rounded(a[i]) != b[i]
        flags[len(a) :] = 0
        for i in range(len(flag_words)):
            eight = flag_words[i]
            while eight != 0:
                at = 8 * i + np.int64(trailing_zeros(eight) >> np.uint64(3))
                indices[found], new[found] = first + at, _rounded(a[at])
                found += 1
                eight &= eight - np.uint64(1)
    return len(values), found
