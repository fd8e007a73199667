"""Read and write single numbers in a string of bits: compiled functions for the other modules of the codec.

Bits are counted from the least significant bit of the first byte. They are held as uint64 words, with a spare word at
the end.
"""

from __future__ import annotations

import numpy as np

from hubsync.kernels.bits import leading_zeros, trailing_zeros
from hubsync.kernels.compiled import compiled

_1, _6, _63 = np.uint64(1), np.uint64(6), np.uint64(63)


def words_of(nbytes: int) -> np.ndarray:
    """Zeroed words for `nbytes` bytes, and a spare one for reads and writes across the end."""
    return np.zeros(nbytes // 8 + 2, np.dtype("<u8"))


def words_from(data: np.ndarray) -> np.ndarray:
    """A copy of `data` (uint8) as words."""
    words = words_of(len(data))
    words.view(np.uint8)[: len(data)] = data
    return words


@compiled
def put(words: np.ndarray, position: int, value: int) -> None:
    """Set the zeroed bits from `position` on to `value`."""
    word, shift = np.uint64(position) >> _6, np.uint64(position) & _63
    words[word] |= np.uint64(value) << shift
    words[word + _1] |= (np.uint64(value) >> _1) >> (_63 - shift)  # in two steps: a shift by 64 is undefined


@compiled
def put_unary(words: np.ndarray, position: int, value: int) -> int:
    """Write `value` zeros and a one. Returns the position behind them."""
    put(words, position + value, 1)
    return position + value + 1


@compiled
def get(words: np.ndarray, position: int, count: int) -> int:
    """Read `count` < 64 bits from `position` on."""
    return int(np.int64(_window(words, position) & ((_1 << np.uint64(count)) - _1)))


@compiled
def next_one(words: np.ndarray, position: int, end: int) -> int:
    """Position of the first set bit in `position .. end`; -1 if all are zero."""
    while position < end:
        window = _window(words, position)
        if window != 0:
            position += int(np.int64(trailing_zeros(window)))
            return position if position < end else -1
        position += 64
    return -1


@compiled
def exponent_of(value: int, k: int) -> int:
    """Exponent of an Exp-Golomb code of order k: position of the leading one of value + 2^k, less k."""
    return 63 - int(np.int64(leading_zeros(np.uint64(value + (1 << k))))) - k


@compiled
def _window(words: np.ndarray, position: int) -> np.uint64:
    """The 64 bits from `position` on."""
    word, shift = np.uint64(position) >> _6, np.uint64(position) & _63
    return (words[word] >> shift) | ((words[word + _1] << _1) << (_63 - shift))
