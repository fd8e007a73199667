"""The bit streams of one chunk, compiled: separate, measure, write, read. Specified in docs/FORMAT.md.

A chunk holds changes in *class order*: those of class 0 by ascending rank, then those of class 1, ... The rank of an
element is its number among the elements of its class in the chunk; with one class that is its position. In each class
whichever are fewer are listed by their gaps, the changed or the unchanged elements. Sections (n changes):

    ...         low bits of the gaps of all classes
    n           signs, 1 = negative
    ...         quotients of the gaps, unary: zeros and a final 1
    ...         magnitudes

Magnitudes are coded as their distance from the usual one of the class, plane after plane: plane j tells of the changes
that are left which have distance j, as a list of gaps; what no plane has ended is coded number by number.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .bitio import exponent_of, get, next_one, put, put_unary
from .book import GAP, LIST_REST, MAX_K, MAX_PLANES, NO_PLANE, PLANES, RICE, TAIL, USUAL

MAX_GAP_K = 24  # no chunk has more elements than 2^24
MAGNITUDES = 256  # magnitudes that `magnitude_counts` tells apart
DISTANCES = 256  # distances that `distance_counts` tells apart

# What `read` finds wrong.
FINE, COUNTS, TOO_SHORT, TOO_LONG, GAP_OUTSIDE, TOO_LARGE, PADDING = range(7)
PROBLEMS = {
    COUNTS: "impossible counts",
    TOO_SHORT: "its bits end too early",
    TOO_LONG: "it has bits left over",
    GAP_OUTSIDE: "a position lies outside its class",
    TOO_LARGE: "a difference does not fit the width of an element",
    PADDING: "the padding bits are not zero",
}


@njit(nogil=True, cache=True)
def by_class(
    classes: int, class_of: np.ndarray, ranks: np.ndarray, diffs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring changes into class order, keeping theirs inside a class: (int64[classes] counts, ranks, diffs)."""
    counts = np.zeros(classes, np.int64)
    for i in range(len(class_of)):
        counts[class_of[i]] += 1
    slot = np.cumsum(counts) - counts
    sorted_ranks, sorted_diffs = np.empty_like(ranks), np.empty_like(diffs)
    for i in range(len(class_of)):
        at = slot[class_of[i]]
        sorted_ranks[at], sorted_diffs[at] = ranks[i], diffs[i]
        slot[class_of[i]] += 1
    return counts, sorted_ranks, sorted_diffs


@njit(nogil=True, cache=True)
def look(
    counts: np.ndarray, sizes: np.ndarray, ranks: np.ndarray, diffs: np.ndarray, magnitudes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What has to be known of a chunk before code parameters are chosen: `separate`, `gap_cost`, `magnitude_counts`."""
    magnitude_counts(counts, diffs, magnitudes)
    listed, gaps = separate(counts, sizes, ranks)
    return listed, gaps, gap_cost(listed, gaps)


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
def exp_golomb_cost(values: np.ndarray) -> np.ndarray:
    """Bits that non-negative `values` need in an Exp-Golomb code, int64[MAX_K + 1], for every order."""
    cost = np.zeros(MAX_K + 1, np.int64)
    for i in range(len(values)):
        for k in range(MAX_K + 1):
            cost[k] += 2 * exponent_of(values[i], k) + k + 1
    return cost


@njit(nogil=True, cache=True)
def magnitude_counts(counts: np.ndarray, diffs: np.ndarray, found: np.ndarray) -> None:
    """Add to `found` how often each class has each magnitude, int64[classes, MAGNITUDES]; larger ones are left out."""
    i = 0
    for c in range(len(counts)):
        for _ in range(counts[c]):
            magnitude = abs(np.int64(diffs[i]))
            if magnitude < MAGNITUDES:
                found[c, magnitude] += 1
            i += 1


@njit(nogil=True, cache=True)
def distance_counts(
    counts: np.ndarray, diffs: np.ndarray, usual: np.ndarray, found: np.ndarray, cost: np.ndarray
) -> None:
    """Add to `found` how often each class has each distance, and to `cost` what larger ones cost.

    Args:
        found: int64[classes, DISTANCES].
        cost: int64[2, classes, MAX_K + 1], bits in an Exp-Golomb and in a Rice code, by parameter.
    """
    i = 0
    for c in range(len(counts)):
        for _ in range(counts[c]):
            value = _fold(abs(np.int64(diffs[i])), usual[c])
            i += 1
            if value < DISTANCES:
                found[c, value] += 1
                continue
            for k in range(MAX_K + 1):
                cost[0, c, k] += 2 * exponent_of(value, k) + k + 1
                cost[1, c, k] += (value >> k) + k + 1


@njit(nogil=True, cache=True)
def finish(
    counts: np.ndarray,
    sizes: np.ndarray,
    listed: np.ndarray,
    gaps: np.ndarray,
    cost: np.ndarray,
    diffs: np.ndarray,
    codes: np.ndarray,
) -> tuple[int, np.ndarray]:
    """`best_shift`, and the chunk as uint8[bytes]."""
    shift = best_shift(counts, sizes, cost, codes)
    nbytes = measure(counts, sizes, listed, gaps, diffs, codes, shift)
    words = np.zeros(nbytes // 8 + 2, np.uint64)  # as `words_of`
    write(counts, sizes, listed, gaps, diffs, codes, shift, words)
    return shift, words.view(np.uint8)[:nbytes]


@njit(nogil=True, cache=True)
def measure(
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
        k = _gap_k(codes[c, GAP], shift, counts[c], sizes[c])
        for _ in range(listed[c]):
            bits += (gaps[g] >> k) + k + 1
            g += 1
    bits = _put_magnitudes(counts, diffs, codes, np.zeros(2, np.uint64), bits, False)
    return (bits + 7) >> 3


@njit(nogil=True, cache=True)
def write(
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
        sign += listed[c] * _gap_k(codes[c, GAP], shift, counts[c], sizes[c])
    unary = sign + len(diffs)
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
    _put_magnitudes(counts, diffs, codes, words, unary, True)


@njit(nogil=True, cache=True)
def _put_magnitudes(
    counts: np.ndarray, diffs: np.ndarray, codes: np.ndarray, words: np.ndarray, position: int, writing: bool
) -> int:
    """Write the magnitudes from `position` on, or only find where they end."""
    left = np.empty(len(diffs), np.int64)
    i = 0
    for c in range(len(counts)):
        count, usual = counts[c], int(codes[c, USUAL])
        for j in range(count):
            left[j] = _fold(abs(np.int64(diffs[i])), usual)
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


@njit(nogil=True, cache=True)
def _put_flag(words: np.ndarray, position: int, writing: bool) -> int:
    if writing:
        put(words, position, 1)
    return position + 1


@njit(nogil=True, cache=True)
def _put_rice(words: np.ndarray, position: int, value: int, k: int, writing: bool) -> int:
    if writing:
        put_unary(words, position, value >> k)
        put(words, position + (value >> k) + 1, value & ((1 << k) - 1))
    return position + (value >> k) + 1 + k


@njit(nogil=True, cache=True)
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
    """Decode the chunk in the bytes `start .. start + nbytes` of `words`. Returns what is wrong with it, or FINE.

    Args:
        counts, sizes: changes and elements of each class; the counts add up to len(ranks) == len(diffs).
        ranks: int32[n] and `diffs`: signed[n], filled in class order.
    """
    largest = 1 << (8 * diffs.itemsize - 1)
    end = (start + nbytes) * 8
    sign = start * 8
    for c in range(len(counts)):
        if counts[c] > sizes[c]:
            return COUNTS
        if codes[c, USUAL] >= largest:
            return TOO_LARGE
        sign += _listed(counts[c], sizes[c]) * _gap_k(codes[c, GAP], shift, counts[c], sizes[c])
    unary, low = sign + len(ranks), start * 8
    if unary > end:
        return TOO_SHORT

    i = 0
    for c in range(len(counts)):
        n, size = counts[c], sizes[c]
        k = _gap_k(codes[c, GAP], shift, n, size)
        usual = int(codes[c, USUAL])
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
                diffs[i] = usual - 2 * usual * get(words, sign, 1)
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
                diffs[j] = usual - 2 * usual * get(words, sign, 1)
                sign += 1

    left = np.empty(len(diffs), np.int64)  # the changes of a class that no plane has ended yet
    following = np.empty(len(diffs), np.int64)
    position, first = unary, 0
    for c in range(len(counts)):
        count, planes, usual = counts[c], 0, int(codes[c, USUAL])
        while planes < MAX_PLANES and codes[c, PLANES + planes] != NO_PLANE and count:
            code = int(codes[c, PLANES + planes])
            k, list_rest = code & ~LIST_REST, code & LIST_REST != 0
            if position >= end:
                return TOO_SHORT
            some, at, rest = get(words, position, 1), -1, 0
            position += 1
            while at < count:
                previous = at
                at = count
                if some:
                    one = next_one(words, position, end)
                    quotient, room = one - position, count - previous - 1
                    if one < 0 or one + 1 + k > end:
                        return TOO_SHORT
                    if quotient > room >> k:
                        return GAP_OUTSIDE
                    gap = (quotient << k) | get(words, one + 1, k)
                    if gap > room:
                        return GAP_OUTSIDE
                    at = previous + 1 + gap
                    position = one + 1 + k
                if not list_rest:  # those between the listed ones go on
                    for j in range(previous + 1, at):
                        following[rest] = left[j] if planes else j
                        rest += 1
                elif at < count:
                    following[rest] = left[at] if planes else at
                    rest += 1
                if planes == 0:  # what ends here has the usual magnitude already
                    continue
                if not list_rest:
                    if at < count and not _set(diffs, first + left[at], _unfold(planes, usual)):
                        return TOO_LARGE
                    continue
                for j in range(previous + 1, at):  # those between the listed ones end here
                    if not _set(diffs, first + left[j], _unfold(planes, usual)):
                        return TOO_LARGE
            left, following = following, left
            count = rest
            planes += 1
        k, rice = int(codes[c, TAIL]) & ~RICE, codes[c, TAIL] & RICE != 0
        for j in range(count):
            one = next_one(words, position, end)
            if one < 0:
                return TOO_SHORT
            quotient = one - position
            bits = k if rice else quotient + k
            if bits > MAX_K + 2 or (rice and quotient > 2 * largest >> k):  # distances reach twice as far
                return TOO_LARGE
            if one + 1 + bits > end:
                return TOO_SHORT
            value = get(words, one + 1, bits)
            position = one + 1 + bits
            value = value | (quotient << k) if rice else value + (1 << bits) - (1 << k)
            if not _set(diffs, first + (left[j] if planes else j), _unfold(value + planes, usual)):
                return TOO_LARGE
        first += counts[c]
    if end - position >= 8:
        return TOO_LONG
    if position < end and get(words, position, end - position) != 0:
        return PADDING
    return FINE


@njit(nogil=True, cache=True)
def _set(diffs: np.ndarray, index: int, magnitude: int) -> bool:
    """Give a difference another magnitude and keep its sign. False if it does not fit."""
    largest = 1 << (8 * diffs.itemsize - 1)
    negative = diffs[index] < 0
    diffs[index] = -magnitude if negative else magnitude
    return magnitude < largest or (magnitude == largest and negative)


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
