"""The bits of one chunk, compiled: `write` and `read`. Specified in docs/FORMAT.md.

A chunk holds its changes in *class order*: those of class 0 by ascending rank, then those of class 1, and so on. The
rank of an element is its number among the elements of its class in the chunk. With one class that is its position. Each
class lists either its changed or its unchanged elements by their gaps, whichever are fewer. Sections (n changes):

    ...         low bits of the gaps of all classes
    n           signs, 1 = negative
    ...         quotients of the gaps, unary: zeros and a final 1
    ...         magnitudes

Magnitudes are coded as their distance from the usual magnitude of the class, plane after plane. Plane j lists, of the
changes that are left, those with distance j by their gaps. The tail codes the rest number by number.
"""

from __future__ import annotations

import numpy as np

from hubsync.kernels.compiled import compiled

from .bitio import exponent_of, get, next_one, put, put_unary
from .book import (
    GAP,
    LIST_REST,
    MAX_K,
    MAX_PLANES,
    NO_PLANE,
    PLANES,
    RICE,
    TAIL,
    USUAL,
    fold,
    gap_k,
    listed_count,
    unfold,
)
from .costs import best_shift

# Results of `read`.
FINE, COUNTS, TOO_SHORT, TOO_LONG, GAP_OUTSIDE, TOO_LARGE, PADDING = range(7)
PROBLEMS = {
    COUNTS: "impossible counts",
    TOO_SHORT: "its bits end too early",
    TOO_LONG: "it has bits left over",
    GAP_OUTSIDE: "a position lies outside its class",
    TOO_LARGE: "a difference does not fit the width of an element",
    PADDING: "the padding bits are not zero",
}


@compiled
def write(
    counts: np.ndarray,
    sizes: np.ndarray,
    listed: np.ndarray,
    gaps: np.ndarray,
    cost: np.ndarray,
    diffs: np.ndarray,
    codes: np.ndarray,
) -> tuple[int, np.ndarray]:
    """(shift, uint8[bytes]) of a chunk in class order.

    Args:
        counts, sizes: int64[classes], changes and elements of each class.
        listed, gaps, cost: from `costs.list_gaps`.
        diffs: signed[n].
        codes: `Book.codes`.
    """
    shift = best_shift(counts, sizes, cost, codes)
    nbytes = _measure(counts, sizes, listed, gaps, diffs, codes, shift)
    words = np.zeros(nbytes // 8 + 2, np.uint64)  # as `words_of`
    _write(counts, sizes, listed, gaps, diffs, codes, shift, words)
    return shift, words.view(np.uint8)[:nbytes]


@compiled
def _measure(
    counts: np.ndarray,
    sizes: np.ndarray,
    listed: np.ndarray,
    gaps: np.ndarray,
    diffs: np.ndarray,
    codes: np.ndarray,
    shift: int,
) -> int:
    """Bytes of the chunk."""
    bits, g = len(diffs), 0
    for c in range(len(counts)):
        k = gap_k(codes[c, GAP], shift, counts[c], sizes[c])
        for _ in range(listed[c]):
            bits += (gaps[g] >> k) + k + 1
            g += 1
    bits = _put_magnitudes(counts, diffs, codes, np.zeros(2, np.uint64), bits, False)
    return (bits + 7) >> 3


@compiled
def _write(
    counts: np.ndarray,
    sizes: np.ndarray,
    listed: np.ndarray,
    gaps: np.ndarray,
    diffs: np.ndarray,
    codes: np.ndarray,
    shift: int,
    words: np.ndarray,
) -> None:
    """Write the chunk at the beginning of the zeroed `words`."""
    sign = 0
    for c in range(len(counts)):
        sign += listed[c] * gap_k(codes[c, GAP], shift, counts[c], sizes[c])
    unary = sign + len(diffs)
    low, g = 0, 0
    for c in range(len(counts)):
        k = gap_k(codes[c, GAP], shift, counts[c], sizes[c])
        for _ in range(listed[c]):
            gap = int(gaps[g])
            put(words, low, gap & ((1 << k) - 1))
            unary = put_unary(words, unary, gap >> k)
            low += k
            g += 1
    for i in range(len(diffs)):
        put(words, sign, np.int64(diffs[i] < 0))
        sign += 1
    _put_magnitudes(counts, diffs, codes, words, unary, True)


@compiled
def _put_magnitudes(
    counts: np.ndarray, diffs: np.ndarray, codes: np.ndarray, words: np.ndarray, position: int, writing: bool
) -> int:
    """Write the magnitudes from `position` on, or only find their end. Returns the position behind them."""
    left = np.empty(len(diffs), np.int64)
    i = 0
    for c in range(len(counts)):
        count, usual = counts[c], int(codes[c, USUAL])
        for j in range(count):
            left[j] = fold(abs(np.int64(diffs[i])), usual)
            i += 1
        planes = 0
        while planes < MAX_PLANES and codes[c, PLANES + planes] != NO_PLANE and count:
            code = int(codes[c, PLANES + planes])
            k, list_rest = code & ~LIST_REST, code & LIST_REST != 0
            gap, listed, rest = 0, 0, 0
            for j in range(count):
                goes_on = left[j] > planes
                if goes_on == list_rest:
                    if listed == 0:
                        position = _put_flag(words, position, writing)
                    position = _put_rice(words, position, gap, k, writing)
                    listed += 1
                    gap = -1
                gap += 1
                left[rest] = left[j]
                rest += goes_on
            if listed:
                position = _put_rice(words, position, gap, k, writing)
            else:
                position += 1
            count = rest
            planes += 1
        k, rice = int(codes[c, TAIL]) & ~RICE, codes[c, TAIL] & RICE != 0
        for j in range(count):
            value = left[j] - planes
            if rice:
                position = _put_rice(words, position, value, k, writing)
                continue
            exponent = exponent_of(value, k)
            if writing:
                put_unary(words, position, exponent)
                put(words, position + exponent + 1, value + (1 << k) - (1 << (exponent + k)))
            position += 2 * exponent + 1 + k
    return position


@compiled
def _put_flag(words: np.ndarray, position: int, writing: bool) -> int:
    if writing:
        put(words, position, 1)
    return position + 1


@compiled
def _put_rice(words: np.ndarray, position: int, value: int, k: int, writing: bool) -> int:
    if writing:
        put_unary(words, position, value >> k)
        put(words, position + (value >> k) + 1, value & ((1 << k) - 1))
    return position + (value >> k) + 1 + k


@compiled
def read(
    words: np.ndarray,
    start: int,
    nbytes: int,
    counts: np.ndarray,
    sizes: np.ndarray,
    shift: int,
    codes: np.ndarray,
    ranks: np.ndarray,
    diffs: np.ndarray,
) -> int:
    """Decode the chunk in the bytes `start .. start + nbytes` of `words`. Returns FINE or an error code.

    Args:
        counts, sizes: int64[classes], changes and elements of each class. The counts add up to len(ranks).
        shift: added to the Rice parameters of the gaps.
        codes: `Book.codes`.
        ranks, diffs: int32[n] and signed[n], filled in class order.
    """
    end = (start + nbytes) * 8
    problem, position = _read_positions(words, start * 8, end, counts, sizes, shift, codes, ranks, diffs)
    if problem == FINE:
        problem, position = _read_magnitudes(words, position, end, counts, codes, diffs)
    if problem != FINE:
        return problem
    if end - position >= 8:
        return TOO_LONG
    if position < end and get(words, position, end - position) != 0:
        return PADDING
    return FINE


@compiled
def _read_positions(
    words: np.ndarray,
    start: int,
    end: int,
    counts: np.ndarray,
    sizes: np.ndarray,
    shift: int,
    codes: np.ndarray,
    ranks: np.ndarray,
    diffs: np.ndarray,
) -> tuple[int, int]:
    """Fill `ranks`, and `diffs` with the usual magnitudes and their signs. Returns (problem, position behind)."""
    largest = 1 << (8 * diffs.itemsize - 1)
    sign = start
    for c in range(len(counts)):
        if counts[c] > sizes[c]:
            return COUNTS, start
        if codes[c, USUAL] >= largest:
            return TOO_LARGE, start
        sign += listed_count(counts[c], sizes[c]) * gap_k(codes[c, GAP], shift, counts[c], sizes[c])
    unary, low = sign + len(ranks), start
    if unary > end:
        return TOO_SHORT, start

    i = 0
    for c in range(len(counts)):
        n, size = counts[c], sizes[c]
        k = gap_k(codes[c, GAP], shift, n, size)
        usual = int(codes[c, USUAL])
        stop = i + n
        changed_are_listed = 2 * n <= size
        rank = -1
        for _ in range(listed_count(n, size)):
            one = next_one(words, unary, end)
            if one < 0:
                return TOO_SHORT, start
            quotient, most = one - unary, size - rank - 2
            unary = one + 1
            if quotient > most >> k:
                return GAP_OUTSIDE, start
            gap = (quotient << k) | get(words, low, k)
            if gap > most:
                return GAP_OUTSIDE, start
            low += k
            if changed_are_listed:
                rank += gap + 1
                ranks[i] = rank
                diffs[i] = usual - 2 * usual * get(words, sign, 1)
                sign += 1
                i += 1
            else:
                if i + gap > stop:
                    return GAP_OUTSIDE, start
                for _ in range(gap):
                    rank += 1
                    ranks[i] = rank
                    i += 1
                rank += 1
        if not changed_are_listed:
            while i < stop:
                rank += 1
                ranks[i] = rank
                i += 1
            for j in range(stop - n, stop):
                diffs[j] = usual - 2 * usual * get(words, sign, 1)
                sign += 1
    return FINE, unary


@compiled
def _read_magnitudes(
    words: np.ndarray, position: int, end: int, counts: np.ndarray, codes: np.ndarray, diffs: np.ndarray
) -> tuple[int, int]:
    """Give `diffs` their magnitudes. Returns (problem, position behind)."""
    largest = 1 << (8 * diffs.itemsize - 1)
    left = np.empty(len(diffs), np.int32)  # the changes of a class that no plane has ended yet
    following = np.empty(len(diffs), np.int32)
    first = 0
    for c in range(len(counts)):
        count, planes, usual = counts[c], 0, int(codes[c, USUAL])
        while planes < MAX_PLANES and codes[c, PLANES + planes] != NO_PLANE and count:
            code = int(codes[c, PLANES + planes])
            k, list_rest = code & ~LIST_REST, code & LIST_REST != 0
            if position >= end:
                return TOO_SHORT, position
            some, at, rest = get(words, position, 1), -1, 0
            position += 1
            while at < count:
                previous = at
                at = count
                if some:
                    one = next_one(words, position, end)
                    quotient, most = one - position, count - previous - 1
                    if one < 0 or one + 1 + k > end:
                        return TOO_SHORT, position
                    if quotient > most >> k:
                        return GAP_OUTSIDE, position
                    gap = (quotient << k) | get(words, one + 1, k)
                    if gap > most:
                        return GAP_OUTSIDE, position
                    at = previous + 1 + gap
                    position = one + 1 + k
                if not list_rest:  # those between the listed ones go on
                    for j in range(previous + 1, at):
                        following[rest] = left[j] if planes else j
                        rest += 1
                elif at < count:
                    following[rest] = left[at] if planes else at
                    rest += 1
                if planes == 0:  # changes that end here have the usual magnitude already
                    continue
                if not list_rest:
                    if at < count and not _set(diffs, first + left[at], unfold(planes, usual)):
                        return TOO_LARGE, position
                    continue
                for j in range(previous + 1, at):  # those between the listed ones end here
                    if not _set(diffs, first + left[j], unfold(planes, usual)):
                        return TOO_LARGE, position
            left, following = following, left
            count = rest
            planes += 1
        k, rice = int(codes[c, TAIL]) & ~RICE, codes[c, TAIL] & RICE != 0
        for j in range(count):
            one = next_one(words, position, end)
            if one < 0:
                return TOO_SHORT, position
            quotient = one - position
            bits = k if rice else quotient + k
            if bits > MAX_K + 2 or (rice and quotient > 2 * largest >> k):  # distances reach twice as far
                return TOO_LARGE, position
            if one + 1 + bits > end:
                return TOO_SHORT, position
            value = get(words, one + 1, bits)
            position = one + 1 + bits
            value = value | (quotient << k) if rice else value + (1 << bits) - (1 << k)
            if not _set(diffs, first + (left[j] if planes else j), unfold(value + planes, usual)):
                return TOO_LARGE, position
        first += counts[c]
    return FINE, position


@compiled
def _set(diffs: np.ndarray, index: int, magnitude: int) -> bool:
    """Give a difference another magnitude and keep its sign. False if it does not fit."""
    largest = 1 << (8 * diffs.itemsize - 1)
    negative = diffs[index] < 0
    diffs[index] = -magnitude if negative else magnitude
    return magnitude < largest or (magnitude == largest and negative)
