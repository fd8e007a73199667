"""The bit streams of coded chunks, compiled: separate, measure, write, read. Specified in docs/FORMAT.md.

A chunk is one string of bits, in this order (n changes, m exceptions = changes that are not +-1):

    n x k_gap   low bits of the gaps between changed places
    n           signs, 1 = negative
    m x k_exc   low bits of the gaps between exceptions
    ...         remainders of the exceptions' magnitudes less 2, Exp-Golomb of order k_mag
    ...         all unary numbers, each as zeros and a final 1: n gap quotients, m exception quotients, m exponents

Everything but the magnitude remainders has a fixed width or is unary, so a parallel decoder needs only prefix sums.
Bits are counted from the least significant bit of the first byte. The functions here work on uint64 words with one
spare word at the end, and on *places* (see `grid`).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hubsync.bits import leading_zeros, trailing_zeros

CHANGES, EXCEPTIONS, MAGNITUDE_BITS, UNARY_BITS = range(4)  # columns of a chunk's row
CHUNK_COLUMNS = 4

MAX_K = 31

# What `lay_out` and `read` find wrong.
FINE = 0
COUNTS, PAYLOAD_SHORT = 1, 2
GAP_OUTSIDE, EXCEPTION_OUTSIDE, TOO_LARGE = 3, 4, 5
UNARY_SHORT, UNARY_LONG, MAGNITUDE_SHORT, MAGNITUDE_LONG, PADDING = 6, 7, 8, 9, 10

_1, _6, _63 = np.uint64(1), np.uint64(6), np.uint64(63)


@njit(nogil=True, cache=True)
def separate(
    places: np.ndarray, diffs: np.ndarray, bounds: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The numbers to code. Chunk c holds the changes `bounds[c] .. bounds[c + 1]` and its places begin at `starts[c]`.

    Returns:
        (rows, gaps, exception_gaps, magnitudes): int64[chunks, CHUNK_COLUMNS] with the two counts, int64[n], and two
        int64[m] of the exceptions.
    """
    rows = np.zeros((len(bounds) - 1, CHUNK_COLUMNS), np.int64)
    gaps = np.empty(len(places), np.int64)
    exception_gaps, magnitudes = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
    m = 0
    for c in range(len(rows)):
        previous, previous_exception, first = starts[c] - 1, bounds[c] - 1, m
        for i in range(bounds[c], bounds[c + 1]):
            gaps[i] = places[i] - previous - 1
            previous = places[i]
            magnitude = abs(np.int64(diffs[i]))
            if magnitude != 1:
                exception_gaps[m], magnitudes[m] = i - previous_exception - 1, magnitude - 2
                previous_exception = i
                m += 1
        rows[c, CHANGES], rows[c, EXCEPTIONS] = bounds[c + 1] - bounds[c], m - first
    return rows, gaps, exception_gaps[:m], magnitudes[:m]


@njit(nogil=True, cache=True)
def rice_cost(values: np.ndarray) -> np.ndarray:
    """Bits that non-negative `values` need in a Rice code, int64[MAX_K + 1], for every parameter k."""
    cost = np.zeros(MAX_K + 1, np.int64)
    for first in range(0, len(values), 256):  # a block stays in cache for all k
        block = values[first : first + 256]
        for k in range(MAX_K + 1):
            quotients = 0
            for i in range(len(block)):  # over indices: iterating over values is not vectorised
                quotients += block[i] >> k
            cost[k] += quotients + len(block) * (k + 1)
    return cost


@njit(nogil=True, cache=True)
def exp_golomb_cost(values: np.ndarray) -> np.ndarray:
    """Bits that non-negative `values` need in an Exp-Golomb code, int64[MAX_K + 1], for every order k."""
    cost = np.zeros(MAX_K + 1, np.int64)
    for value in values:
        for k in range(MAX_K + 1):
            cost[k] += 2 * _exponent(value, k) + k + 1
    return cost


@njit(nogil=True, cache=True)
def measure(
    rows: np.ndarray, gaps: np.ndarray, exception_gaps: np.ndarray, magnitudes: np.ndarray, ks: tuple[int, int, int]
) -> None:
    """Fill in the two bit counts of every row that `separate` returned."""
    k_gap, k_exception, k_magnitude = ks
    i, m = 0, 0
    for c in range(len(rows)):
        magnitude_bits, unary_bits = 0, rows[c, CHANGES] + 2 * rows[c, EXCEPTIONS]
        for _ in range(rows[c, CHANGES]):
            unary_bits += gaps[i] >> k_gap
            i += 1
        for _ in range(rows[c, EXCEPTIONS]):
            exponent = _exponent(magnitudes[m], k_magnitude)
            magnitude_bits += exponent + k_magnitude
            unary_bits += (exception_gaps[m] >> k_exception) + exponent
            m += 1
        rows[c, MAGNITUDE_BITS], rows[c, UNARY_BITS] = magnitude_bits, unary_bits


@njit(nogil=True, cache=True)
def write(
    rows: np.ndarray,
    gaps: np.ndarray,
    diffs: np.ndarray,
    exception_gaps: np.ndarray,
    magnitudes: np.ndarray,
    offsets: np.ndarray,
    ks: tuple[int, int, int],
    words: np.ndarray,
) -> None:
    """Write chunk c at byte `offsets[c]` of the zeroed `words`."""
    k_gap, k_exception, k_magnitude = ks
    first, first_exception = 0, 0
    for c in range(len(rows)):
        last, last_exception = first + rows[c, CHANGES], first_exception + rows[c, EXCEPTIONS]
        low = offsets[c] * 8
        sign = low + rows[c, CHANGES] * k_gap
        exception_low = sign + rows[c, CHANGES]
        magnitude_low = exception_low + rows[c, EXCEPTIONS] * k_exception
        unary = magnitude_low + rows[c, MAGNITUDE_BITS]
        for i in range(first, last):
            _put(words, low, gaps[i] & ((1 << k_gap) - 1))
            _put(words, sign, np.int64(diffs[i] < 0))
            unary = _put_unary(words, unary, gaps[i] >> k_gap)
            low += k_gap
            sign += 1
        for i in range(first_exception, last_exception):
            _put(words, exception_low, exception_gaps[i] & ((1 << k_exception) - 1))
            unary = _put_unary(words, unary, exception_gaps[i] >> k_exception)
            exception_low += k_exception
        for i in range(first_exception, last_exception):
            exponent = _exponent(magnitudes[i], k_magnitude)
            bits = exponent + k_magnitude
            _put(words, magnitude_low, magnitudes[i] + (1 << k_magnitude) - (1 << bits))
            unary = _put_unary(words, unary, exponent)
            magnitude_low += bits
        first, first_exception = last, last_exception


@njit(nogil=True, cache=True)
def lay_out(
    rows: np.ndarray, starts: np.ndarray, ks: tuple[int, int, int], available: int
) -> tuple[int, int, np.ndarray]:
    """Check every row against its chunk and the bytes available, before anything is decoded or allocated.

    Returns:
        (FINE, 0, offsets) or (what is wrong, chunk, ...); chunk c holds the bytes `offsets[c] .. offsets[c + 1]`.
    """
    k_gap, k_exception, _ = ks
    offsets = np.zeros(len(rows) + 1, np.int64)
    for c in range(len(rows)):
        n, exceptions, unary_bits = rows[c, CHANGES], rows[c, EXCEPTIONS], rows[c, UNARY_BITS]
        if n > starts[c + 1] - starts[c] or exceptions > n or unary_bits < n + 2 * exceptions:
            return COUNTS, c, offsets
        bits = n * (k_gap + 1) + exceptions * k_exception + rows[c, MAGNITUDE_BITS] + unary_bits
        offsets[c + 1] = offsets[c] + ((bits + 7) >> 3)
        if offsets[c + 1] > available:
            return PAYLOAD_SHORT, c, offsets
    return FINE, 0, offsets


@njit(nogil=True, cache=True)
def read(
    words: np.ndarray,
    rows: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    ks: tuple[int, int, int],
    places: np.ndarray,
    diffs: np.ndarray,
) -> tuple[int, int]:
    """Decode every chunk into `places` and `diffs`. Returns (FINE, 0) or (what is wrong, chunk).

    `lay_out` has checked the rows; everything that depends on the bits themselves is checked here, before it is used.
    """
    k_gap, k_exception, k_magnitude = ks
    width = 8 * diffs.itemsize
    largest = 1 << (width - 1)
    done = 0
    for c in range(len(rows)):
        n, exceptions = rows[c, CHANGES], rows[c, EXCEPTIONS]
        low = offsets[c] * 8
        sign = low + n * k_gap
        exception_low = sign + n
        magnitude_low = exception_low + exceptions * k_exception
        unary = magnitude_low + rows[c, MAGNITUDE_BITS]
        magnitude_end, end = unary, unary + rows[c, UNARY_BITS]

        place = starts[c] - 1
        for i in range(done, done + n):
            stop = _next_one(words, unary, end)
            if stop < 0:
                return UNARY_SHORT, c
            quotient, room = stop - unary, starts[c + 1] - place - 2
            unary = stop + 1
            if quotient > room >> k_gap:
                return GAP_OUTSIDE, c
            gap = (quotient << k_gap) | _get(words, low, k_gap)
            if gap > room:
                return GAP_OUTSIDE, c
            low += k_gap
            place += gap + 1
            places[i] = place
            diffs[i] = 1 - 2 * _get(words, sign, 1)
            sign += 1

        # The exponents follow the quotients of all exceptions: find where they begin, then read both side by side.
        exponents = unary
        for _ in range(exceptions):
            exponents = _next_one(words, exponents, end) + 1
            if exponents == 0:
                return UNARY_SHORT, c
        at = done - 1
        for _ in range(exceptions):
            stop = _next_one(words, unary, end)
            quotient, room = stop - unary, done + n - at - 2
            unary = stop + 1
            if quotient > room >> k_exception:
                return EXCEPTION_OUTSIDE, c
            gap = (quotient << k_exception) | _get(words, exception_low, k_exception)
            if gap > room:
                return EXCEPTION_OUTSIDE, c
            exception_low += k_exception
            at += gap + 1

            stop = _next_one(words, exponents, end)
            if stop < 0:
                return UNARY_SHORT, c
            bits = stop - exponents + k_magnitude
            exponents = stop + 1
            if bits > width:
                return TOO_LARGE, c
            if magnitude_low + bits > magnitude_end:
                return MAGNITUDE_SHORT, c
            magnitude = ((1 << bits) | _get(words, magnitude_low, bits)) - (1 << k_magnitude) + 2
            magnitude_low += bits
            if magnitude > largest or (magnitude == largest and diffs[at] > 0):
                return TOO_LARGE, c
            diffs[at] *= magnitude
        if exponents != end:
            return UNARY_LONG, c
        if magnitude_low != magnitude_end:
            return MAGNITUDE_LONG, c
        if end & 7 and _get(words, end, 8 - (end & 7)) != 0:
            return PADDING, c
        done += n
    return FINE, 0


@njit(nogil=True, cache=True)
def _exponent(value: int, k: int) -> int:
    """Exponent of an Exp-Golomb code of order k: position of the leading one of value + 2^k, less k."""
    return 63 - int(np.int64(leading_zeros(np.uint64(value + (1 << k))))) - k


@njit(nogil=True, cache=True)
def _put(words: np.ndarray, position: int, value: int) -> None:
    """Or `value` into the zeroed bits from `position` on."""
    word, shift = np.uint64(position) >> _6, np.uint64(position) & _63
    words[word] |= np.uint64(value) << shift
    words[word + _1] |= (np.uint64(value) >> _1) >> (_63 - shift)  # in two steps: a shift by 64 is undefined


@njit(nogil=True, cache=True)
def _put_unary(words: np.ndarray, position: int, value: int) -> int:
    """`value` zeros and a one. Returns the position behind it."""
    _put(words, position + value, 1)
    return position + value + 1


@njit(nogil=True, cache=True)
def _window(words: np.ndarray, position: int) -> np.uint64:
    """The 64 bits from `position` on."""
    word, shift = np.uint64(position) >> _6, np.uint64(position) & _63
    return (words[word] >> shift) | ((words[word + _1] << _1) << (_63 - shift))


@njit(nogil=True, cache=True)
def _get(words: np.ndarray, position: int, count: int) -> int:
    """`count` < 64 bits from `position` on."""
    return int(np.int64(_window(words, position) & ((_1 << np.uint64(count)) - _1)))


@njit(nogil=True, cache=True)
def _next_one(words: np.ndarray, position: int, end: int) -> int:
    """Position of the first set bit in `position .. end`, -1 if there is none."""
    while position < end:
        window = _window(words, position)
        if window != 0:
            position += int(np.int64(trailing_zeros(window)))
            return position if position < end else -1
        position += 64
    return -1
