"""float32 weights compared with their bfloat16 view, without ever holding the whole of the new one.

Rounding is torch's: to nearest, ties to even. What torch makes of a NaN depends on where in memory it is and on the
processor, so these kernels do not try: they say that they have seen one, and the caller has torch cast the tensor.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .bits import trailing_zeros

_BLOCK = 1 << 12  # elements that fit the nearest cache with their flags
_ROOM = 1 << 14  # changes that lists are first made for

_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_HALF, _1, _16, _31 = np.uint32(0x7FFF), np.uint32(1), np.uint32(16), np.uint32(31)


def round_into(out: np.ndarray, values: np.ndarray) -> bool:
    """Write the bfloat16 patterns of float32 patterns. False, and `out` is of no use, if there is a NaN.

    Args:
        out: uint16[n].
        values: uint32[n].
    """
    return bool(_round(values, out))


def changes(values: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Where float32 patterns round to other bfloat16 patterns than the old ones; None if there is a NaN.

    Args:
        values: uint32[n].
        old: uint16[n].

    Returns:
        (indices, new): int64 ascending, and the new bfloat16 patterns there. Memory is O(changes).
    """
    indices, new = np.empty(_ROOM, np.int64), np.empty(_ROOM, np.uint16)
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


# The loops over elements stay this plain, and apart, so that LLVM turns them into vector code.


@njit(nogil=True, inline="always")
def _rounded(value: np.uint32) -> np.uint16:
    return np.uint16(np.uint32(value + ((np.uint32(value >> _16) & _1) + _HALF)) >> _16)


@njit(nogil=True, inline="always")
def _has_nan(values: np.ndarray) -> bool:
    beyond = np.uint32(0)
    for i in range(len(values)):
        beyond |= np.uint32(_INFINITY - (values[i] & _MAGNITUDE))  # below zero, hence with the top bit, for a NaN
    return beyond >> _31 != 0


@njit(nogil=True, cache=True)
def _round(values: np.ndarray, out: np.ndarray) -> bool:
    for first in range(0, len(values), _BLOCK):
        a, b = values[first : first + _BLOCK], out[first : first + _BLOCK]
        if _has_nan(a):
            return False
        for i in range(len(a)):
            b[i] = _rounded(a[i])
    return True


@njit(nogil=True, cache=True)
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
    """Go on from element `start` while there is room for the changes of a block.

    Returns where it stopped (-1: a NaN), and how many changes there are. A block is first compared without a branch,
    into a byte for each element (`flags`, also seen as `flag_words`), of which eight are looked at together.
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
