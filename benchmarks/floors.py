"""Lower bounds for the size of a delta: the length of an ideal code for its positions and values, parameters included.

`hubsync.report.floor` says how they are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hubsync.kernels.bits import difference
from hubsync.report.floor import difference_bits, position_bits

from .snapshots import Pair


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
    given = sum(difference_bits(diffs[exponents[at] == exponent]) for exponent in np.flatnonzero(changes))
    return Floors((tensors + difference_bits(diffs)) / len(at), (octaves + given) / len(at))


def _positions(size: int, count: int) -> float:
    return float(position_bits(np.array([size]), np.array([count]))[0])
