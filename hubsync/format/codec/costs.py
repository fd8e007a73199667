"""Compiled passes of the encoder over one chunk, before its bits are written: order, list gaps, count bits.

`streams` defines class order and the sections of a chunk.
"""

from __future__ import annotations

import numpy as np

from hubsync.kernels.compiled import compiled

from .bitio import exponent_of
from .book import GAP, MAX_K, fold, gap_k, listed_count

MAX_GAP_K = 24  # no chunk has more elements than 2^24
MAGNITUDES = 256  # magnitudes that `magnitude_counts` distinguishes
DISTANCES = 256  # distances that `distance_counts` distinguishes


@compiled
def by_class(
    classes: int, class_of: np.ndarray, ranks: np.ndarray, diffs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring changes into class order, stable inside a class: (int64[classes] counts, ranks, diffs)."""
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


@compiled
def list_gaps(counts: np.ndarray, sizes: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gaps to code, and their bits.

    Returns:
        (listed, gaps, cost): int64[classes] listed elements of each class; int32[sum] the gaps in class order;
        int64[classes, MAX_GAP_K] bits in a Rice code of every parameter.
    """
    listed, gaps = _gaps(counts, sizes, ranks)
    return listed, gaps, _gap_cost(listed, gaps)


@compiled
def _gaps(counts: np.ndarray, sizes: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    listed = np.zeros(len(counts), np.int64)
    for c in range(len(counts)):
        listed[c] = listed_count(counts[c], sizes[c])
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


@compiled
def _gap_cost(listed: np.ndarray, gaps: np.ndarray) -> np.ndarray:
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


@compiled
def best_shift(counts: np.ndarray, sizes: np.ndarray, cost: np.ndarray, codes: np.ndarray) -> int:
    """What to add to the Rice parameters of a chunk whose gaps cost `cost`; 0 unless another shift saves bits."""
    best, fewest = 0, 1 << 62
    for shift in range(-MAX_GAP_K, MAX_GAP_K):
        bits = 2 * abs(shift)  # about the bits of the shift in the row
        for c in range(len(counts)):
            bits += cost[c, min(gap_k(codes[c, GAP], shift, counts[c], sizes[c]), MAX_GAP_K - 1)]
        if bits < fewest or (bits == fewest and abs(shift) < abs(best)):
            best, fewest = shift, bits
    for c in range(len(counts)):  # costs are known up to here
        best = min(best, MAX_GAP_K - 1 - int(codes[c, GAP]))
    return best


@compiled
def exp_golomb_cost(values: np.ndarray) -> np.ndarray:
    """Bits of non-negative `values` in an Exp-Golomb code, int64[MAX_K + 1], for every order."""
    cost = np.zeros(MAX_K + 1, np.int64)
    for i in range(len(values)):
        for k in range(MAX_K + 1):
            cost[k] += 2 * exponent_of(values[i], k) + k + 1
    return cost


@compiled
def magnitude_counts(counts: np.ndarray, diffs: np.ndarray, found: np.ndarray) -> None:
    """Add the magnitudes of each class to the histogram `found`, int64[classes, MAGNITUDES], but for larger ones."""
    i = 0
    for c in range(len(counts)):
        for _ in range(counts[c]):
            magnitude = abs(np.int64(diffs[i]))
            if magnitude < MAGNITUDES:
                found[c, magnitude] += 1
            i += 1


@compiled
def distance_counts(
    counts: np.ndarray, diffs: np.ndarray, usual: np.ndarray, found: np.ndarray, cost: np.ndarray
) -> None:
    """Add the distances of each class to the histogram `found`, and the bits of larger ones to `cost`.

    Args:
        found: int64[classes, DISTANCES].
        cost: int64[2, classes, MAX_K + 1], bits in an Exp-Golomb and in a Rice code, by parameter.
    """
    i = 0
    for c in range(len(counts)):
        for _ in range(counts[c]):
            value = fold(abs(np.int64(diffs[i])), usual[c])
            i += 1
            if value < DISTANCES:
                found[c, value] += 1
                continue
            for k in range(MAX_K + 1):
                cost[0, c, k] += 2 * exponent_of(value, k) + k + 1
                cost[1, c, k] += (value >> k) + k + 1
