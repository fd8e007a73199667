"""The bit streams of one chunk, compiled: separate, measure, write, read. Specified in docs/FORMAT.md.

A chunk holds changes in *class order*: those of class 0 by ascending rank, then those of class 1, ... The rank of an
element is its number among the elements of its class in the chunk; with one class that is its position. In each class
whichever are fewer are listed by their gaps, the changed or the unchanged elements. Sections (n changes, m listed
exceptions = changes whose magnitude is not the usual one of their class):

    ...         low bits of the gaps of all classes
    n           signs, 1 = negative
    m x k       low bits of the gaps between listed exceptions
    ...         remainders of magnitudes
    ...         all unary numbers, each as zeros and a final 1: gap quotients, exception quotients, magnitudes

Everything but the remainders has a fixed width or is unary, so a parallel decoder needs only prefix sums.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .bitio import exponent_of, get, next_one, put, put_unary
from .book import CENTER, EXP_GOLOMB, GAP, LISTED, MAGNITUDE, MAX_K, MODE, RICE

MAX_GAP_K = 24  # no chunk has more elements than 2^24

# What `read` finds wrong.
FINE, COUNTS, TOO_SHORT, TOO_LONG, GAP_OUTSIDE, EXCEPTION_OUTSIDE, TOO_LARGE, MAGNITUDES, PADDING = range(9)
PROBLEMS = {
    COUNTS: "impossible counts",
    TOO_SHORT: "its bits end too early",
    TOO_LONG: "it has bits left over",
    GAP_OUTSIDE: "a position lies outside its class",
    EXCEPTION_OUTSIDE: "an exception lies behind the last change",
    TOO_LARGE: "a difference does not fit the width of an element",
    MAGNITUDES: "the magnitudes do not fill their section",
    PADDING: "the padding bits are not zero",
}


@njit(nogil=True, cache=True)
def separate(counts: np.ndarray, sizes: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gaps to code: (int64[classes] how many of each class, int32[sum] the gaps in class order)."""
    listed = np.zeros(len(counts), np.int64)
    for c in range(len(counts)):
        listed[c] = _listed(counts[c], sizes[c])
    gaps = np.empty(listed.sum(), np.int32)
    g, i = 0, 0
    for c in range(len(counts)):
        stop = i + counts[c]
        previous = -1
        if 2 * counts[c] <= sizes[c]:
            while i < stop:
                gaps[g] = ranks[i] - previous - 1
                previous = ranks[i]
                i += 1
                g += 1
        elif listed[c]:
            run = 0  # changed elements since the last unchanged one
            while i <= stop:
                rank = ranks[i] if i < stop else sizes[c]
                for _ in range(rank - previous - 1):
                    gaps[g] = run
                    run = 0
                    g += 1
                run += 1
                previous = rank
                i += 1
        i = stop
    return listed, gaps


@njit(nogil=True, cache=True)
def gap_cost(listed: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Bits of the gaps of each class in a Rice code, int64[classes, MAX_GAP_K], for every parameter."""
    cost = np.zeros((len(listed), MAX_GAP_K), np.int64)
    first = 0
    for c in range(len(listed)):
        last = first + listed[c]
        for start in range(first, last, 512):  # a block stays in cache for all k
            block = gaps[start : min(start + 512, last)]
            for k in range(MAX_GAP_K):
                quotients = np.int32(0)
                for i in range(len(block)):  # over indices: iterating over values is not vectorised
                    quotients += block[i] >> k
                cost[c, k] += quotients + len(block) * (k + 1)
        first = last
    return cost


@njit(nogil=True, cache=True)
def best_shift(counts: np.ndarray, sizes: np.ndarray, cost: np.ndarray, codes: np.ndarray) -> int:
    """What to add to the Rice parameters of a chunk whose gaps have this `gap_cost`; 0 unless another saves bits."""
    best, fewest = 0, 1 << 62
    for shift in range(-MAX_GAP_K, MAX_GAP_K):
        bits = 2 * abs(shift)  # about what the row takes to say it
        for c in range(len(counts)):
            bits += cost[c, min(_gap_k(codes[c, GAP], shift, counts[c], sizes[c]), MAX_GAP_K - 1)]
        if bits < fewest or (bits == fewest and abs(shift) < abs(best)):
            best, fewest = shift, bits
    for c in range(len(counts)):  # costs are known up to here
        best = min(best, MAX_GAP_K - 1 - int(codes[c, GAP]))
    return best


@njit(nogil=True, cache=True)
def rice_cost(values: np.ndarray) -> np.ndarray:
    """Bits that non-negative `values` need in a Rice code, int64[MAX_K + 1], for every parameter."""
    cost = np.zeros(MAX_K + 1, np.int64)
    for i in range(len(values)):
        for k in range(MAX_K + 1):
            cost[k] += (values[i] >> k) + k + 1
    return cost


@njit(nogil=True, cache=True)
def exp_golomb_cost(values: np.ndarray) -> np.ndarray:
    """Bits that non-negative `values` need in an Exp-Golomb code, int64[MAX_K + 1], for every order."""
    cost = np.zeros(MAX_K + 1, np.int64)
    for i in range(len(values)):
        for k in range(MAX_K + 1):
            cost[k] += 2 * exponent_of(values[i], k) + k + 1
    return cost


@njit(nogil=True, cache=True)
def magnitude_counts(counts: np.ndarray, diffs: np.ndarray) -> np.ndarray:
    """How often each class has each magnitude, int64[classes, 256]; larger ones are left out."""
    found = np.zeros((len(counts), 256), np.int64)
    i = 0
    for c in range(len(counts)):
        for _ in range(counts[c]):
            magnitude = abs(np.int64(diffs[i]))
            if magnitude < 256:
                found[c, magnitude] += 1
            i += 1
    return found


@njit(nogil=True, cache=True)
def magnitude_cost(counts: np.ndarray, diffs: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits of the magnitudes of each class in each code: int64[3, classes, MAX_K + 1], and int64[classes] exceptions.

    The cost of saying which changes are exceptions (LISTED) is left out.
    """
    cost = np.zeros((3, len(counts), MAX_K + 1), np.int64)
    exceptions = np.zeros(len(counts), np.int64)
    i = 0
    for c in range(len(counts)):
        for _ in range(counts[c]):
            value = _fold(abs(np.int64(diffs[i])), centers[c])
            i += 1
            if value == 0:
                continue
            exceptions[c] += 1
            for k in range(MAX_K + 1):
                cost[LISTED, c, k] += 2 * exponent_of(value - 1, k) + k + 1
                cost[EXP_GOLOMB, c, k] += 2 * exponent_of(value, k) + k + 1
                cost[RICE, c, k] += (value >> k) + k + 1
        for k in range(MAX_K + 1):
            usual = (counts[c] - exceptions[c]) * (k + 1)
            cost[EXP_GOLOMB, c, k] += usual
            cost[RICE, c, k] += usual
    return cost, exceptions


@njit(nogil=True, cache=True)
def exception_gaps(counts: np.ndarray, diffs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int64[m]: gaps between the exceptions in the list of all changes of classes whose exceptions are listed."""
    gaps = np.empty(len(diffs), np.int64)
    m, gap, i = 0, 0, 0
    for c in range(len(counts)):
        for _ in range(counts[c]):
            if codes[c, MODE] == LISTED:
                if abs(np.int64(diffs[i])) != codes[c, CENTER]:
                    gaps[m] = gap
                    m += 1
                    gap = -1
                gap += 1
            i += 1
    return gaps[:m].copy()


@njit(nogil=True, cache=True)
def measure(
    counts: np.ndarray,
    sizes: np.ndarray,
    listed: np.ndarray,
    gaps: np.ndarray,
    diffs: np.ndarray,
    listed_gaps: np.ndarray,
    codes: np.ndarray,
    k_listed: int,
    shift: int,
) -> tuple[int, int]:
    """(bits of the section of remainders, bytes of the chunk)"""
    remainders, bits = 0, len(diffs)
    g, i = 0, 0
    for c in range(len(counts)):
        k = _gap_k(codes[c, GAP], shift, counts[c], sizes[c])
        for _ in range(listed[c]):
            bits += (gaps[g] >> k) + k + 1
            g += 1
        mode, k, center = codes[c, MODE], int(codes[c, MAGNITUDE]), int(codes[c, CENTER])
        for _ in range(counts[c]):
            value = _fold(abs(np.int64(diffs[i])), center)
            i += 1
            if mode == RICE:
                remainders += k
                bits += (value >> k) + 1
            elif mode == EXP_GOLOMB or value:
                exponent = exponent_of(value if mode == EXP_GOLOMB else value - 1, k)
                remainders += exponent + k
                bits += exponent + 1
    for i in range(len(listed_gaps)):
        bits += (listed_gaps[i] >> k_listed) + k_listed + 1
    return remainders, (bits + remainders + 7) >> 3


@njit(nogil=True, cache=True)
def write(
    counts: np.ndarray,
    sizes: np.ndarray,
    listed: np.ndarray,
    gaps: np.ndarray,
    diffs: np.ndarray,
    listed_gaps: np.ndarray,
    codes: np.ndarray,
    k_listed: int,
    shift: int,
    remainder_bits: int,
    words: np.ndarray,
) -> None:
    """Write the chunk at the beginning of the zeroed `words`."""
    sign = 0
    for c in range(len(counts)):
        sign += listed[c] * _gap_k(codes[c, GAP], shift, counts[c], sizes[c])
    listed_low = sign + len(diffs)
    remainder = listed_low + len(listed_gaps) * k_listed
    unary = remainder + remainder_bits
    low, g = 0, 0
    for c in range(len(counts)):
        k = _gap_k(codes[c, GAP], shift, counts[c], sizes[c])
        for _ in range(listed[c]):
            gap = int(gaps[g])
            put(words, low, gap & ((1 << k) - 1))
            unary = put_unary(words, unary, gap >> k)
            low += k
            g += 1
    for i in range(len(diffs)):
        put(words, sign, np.int64(diffs[i] < 0))
        sign += 1
    for i in range(len(listed_gaps)):
        put(words, listed_low, listed_gaps[i] & ((1 << k_listed) - 1))
        unary = put_unary(words, unary, listed_gaps[i] >> k_listed)
        listed_low += k_listed
    i = 0
    for c in range(len(counts)):
        mode, k, center = codes[c, MODE], int(codes[c, MAGNITUDE]), int(codes[c, CENTER])
        for _ in range(counts[c]):
            value = _fold(abs(np.int64(diffs[i])), center)
            i += 1
            if mode == RICE:
                put(words, remainder, value & ((1 << k) - 1))
                unary = put_unary(words, unary, value >> k)
                remainder += k
            elif mode == EXP_GOLOMB or value:
                value -= mode == LISTED
                exponent = exponent_of(value, k)
                put(words, remainder, value + (1 << k) - (1 << (exponent + k)))
                unary = put_unary(words, unary, exponent)
                remainder += exponent + k


@njit(nogil=True, cache=True)
def read(
    words: np.ndarray,
    start: int,
    nbytes: int,
    counts: np.ndarray,
    sizes: np.ndarray,
    exceptions: int,
    shift: int,
    remainder_bits: int,
    codes: np.ndarray,
    k_listed: int,
    ranks: np.ndarray,
    diffs: np.ndarray,
) -> int:
    """Decode the chunk in the bytes `start .. start + nbytes` of `words`. Returns what is wrong with it, or FINE.

    Args:
        counts, sizes: changes and elements of each class; the counts add up to len(ranks) == len(diffs).
        ranks: int32[n] and `diffs`: signed[n], filled in class order.
    """
    width = 8 * diffs.itemsize
    largest = 1 << (width - 1)
    end = (start + nbytes) * 8
    sign, list_length = start * 8, 0
    for c in range(len(counts)):
        if counts[c] > sizes[c]:
            return COUNTS
        if codes[c, CENTER] >= largest:
            return TOO_LARGE
        sign += _listed(counts[c], sizes[c]) * _gap_k(codes[c, GAP], shift, counts[c], sizes[c])
        if codes[c, MODE] == LISTED:
            list_length += counts[c]
    if exceptions > list_length:
        return COUNTS
    listed_low = sign + len(ranks)
    remainder = listed_low + exceptions * k_listed
    remainder_end = remainder + remainder_bits
    unary, low = remainder_end, start * 8
    if unary > end:
        return TOO_SHORT

    i = 0
    for c in range(len(counts)):
        n, size = counts[c], sizes[c]
        k = _gap_k(codes[c, GAP], shift, n, size)
        center = int(codes[c, CENTER])
        stop = i + n
        changed_are_listed = 2 * n <= size
        rank = -1
        for _ in range(_listed(n, size)):
            one = next_one(words, unary, end)
            if one < 0:
                return TOO_SHORT
            quotient, room = one - unary, size - rank - 2
            unary = one + 1
            if quotient > room >> k:
                return GAP_OUTSIDE
            gap = (quotient << k) | get(words, low, k)
            if gap > room:
                return GAP_OUTSIDE
            low += k
            if changed_are_listed:
                rank += gap + 1
                ranks[i] = rank
                diffs[i] = center - 2 * center * get(words, sign, 1)
                sign += 1
                i += 1
            else:
                if i + gap > stop:
                    return GAP_OUTSIDE
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
                diffs[j] = center - 2 * center * get(words, sign, 1)
                sign += 1

    exception = np.empty(exceptions, np.int64)
    at = -1
    for j in range(exceptions):
        one = next_one(words, unary, end)
        if one < 0:
            return TOO_SHORT
        quotient, room = one - unary, list_length - at - 2
        unary = one + 1
        if quotient > room >> k_listed:
            return EXCEPTION_OUTSIDE
        gap = (quotient << k_listed) | get(words, listed_low, k_listed)
        if gap > room:
            return EXCEPTION_OUTSIDE
        listed_low += k_listed
        at += gap + 1
        exception[j] = at

    # Magnitudes, in class order: of the listed exceptions of a class, or of all its changes.
    j, first, first_in_list = 0, 0, 0
    for c in range(len(counts)):
        mode, k, center = codes[c, MODE], int(codes[c, MAGNITUDE]), int(codes[c, CENTER])
        i, last = first, first + counts[c]
        while True:
            if mode == LISTED:
                if j == exceptions or exception[j] >= first_in_list + counts[c]:
                    break
                i = first + exception[j] - first_in_list
                j += 1
            elif i == last:
                break
            one = next_one(words, unary, end)
            if one < 0:
                return TOO_SHORT
            quotient = one - unary
            unary = one + 1
            bits = k if mode == RICE else quotient + k
            if bits > width or (mode == RICE and quotient > 2 * largest >> k):  # distances reach twice as far
                return TOO_LARGE
            if remainder + bits > remainder_end:
                return MAGNITUDES
            value = get(words, remainder, bits)
            remainder += bits
            if mode == RICE:
                value |= quotient << k
            else:
                value += (1 << bits) - (1 << k) + (mode == LISTED)
            magnitude = _unfold(value, center)
            if magnitude > largest or (magnitude == largest and diffs[i] > 0):
                return TOO_LARGE
            diffs[i] = -magnitude if diffs[i] < 0 else magnitude
            i += 1
        if mode == LISTED:
            first_in_list += counts[c]
        first = last
    if remainder != remainder_end:
        return MAGNITUDES
    if end - unary >= 8:
        return TOO_LONG
    if unary < end and get(words, unary, end - unary) != 0:
        return PADDING
    return FINE


@njit(nogil=True, cache=True)
def _listed(count: int, size: int) -> int:
    """How many elements of a class are listed: the changed or the unchanged ones; none where all of them changed."""
    return min(count, size - count)


@njit(nogil=True, cache=True)
def _gap_k(k: int, shift: int, count: int, size: int) -> int:
    """The Rice parameter of a class: the shift is for chunks with more or fewer changes than others."""
    if 2 * count > size:
        return int(k)
    return int(min(max(int(k) + shift, 0), MAX_K))


@njit(nogil=True, cache=True)
def _fold(magnitude: int, center: int) -> int:
    """Magnitudes by their distance from the usual one: center -> 0, center + 1 -> 1, center - 1 -> 2, ..."""
    if magnitude >= 2 * center:
        return magnitude - 1
    return 2 * (magnitude - center) - 1 if magnitude > center else 2 * (center - magnitude)


@njit(nogil=True, cache=True)
def _unfold(value: int, center: int) -> int:
    if value > 2 * center - 2:
        return value + 1
    return center + ((value + 1) >> 1) if value & 1 else center - (value >> 1)
