"""Lower bounds for the size of a delta: the length of an ideal code for its positions and values, parameters included.

Positions: the adaptive Krichevsky-Trofimov code of the changed elements in each group. Values, as differences of
ordered integers: their entropy, half a logarithm for each distinct value, and 16 bits more for those beyond +-300. A
model of the weights' history could go lower; these floors use none.
"""

from __future__ import annotations

from math import lgamma, log
from typing import NamedTuple

import numpy as np

from hubsync.kernels.bits import difference

from .snapshots import Pair

_RARE = 300


class Floors(NamedTuple):
    """Bits per changed element.

    Attributes:
        unconditional: positions grouped by tensor, values not grouped.
        conditional: both grouped by the old exponent.
    """

    unconditional: float
    conditional: float


def floors(pair: Pair) -> Floors:
    changed = pair.old != pair.new
    at = np.flatnonzero(changed)
    diffs = difference(pair.old[at], pair.new[at]).astype(np.int64)
    tensors = sum(_positions(tensor.size, int(tensor.sum())) for tensor in (changed[own] for own in pair.slices))
    exponents = (pair.old >> 7) & 0xFF
    elements, changes = np.bincount(exponents, minlength=256), np.bincount(exponents[at], minlength=256)
    octaves = sum(_positions(int(size), int(count)) for size, count in zip(elements, changes, strict=True))
    given = sum(_values(diffs[exponents[at] == exponent]) for exponent in np.flatnonzero(changes))
    return Floors((tensors + _values(diffs)) / len(at), (octaves + given) / len(at))


def _positions(size: int, count: int) -> float:
    def log_beta(a: float, b: float) -> float:
        return lgamma(a) + lgamma(b) - lgamma(a + b)

    return (log_beta(0.5, 0.5) - log_beta(count + 0.5, size - count + 0.5)) / log(2)


def _values(diffs: np.ndarray) -> float:
    counts = np.bincount(np.clip(diffs, -_RARE, _RARE) + _RARE)
    counts = counts[counts > 0]
    entropy = -float((counts * np.log2(counts / counts.sum())).sum())
    learning = 0.5 * np.log2(max(2, len(diffs))) * (len(counts) - 1)
    return entropy + learning + 16.0 * int((np.abs(diffs) >= _RARE).sum())
