"""Size and time of a delta, computed from the learning rate and measured rates. docs/sizing.md explains the formulas.

A bf16 pattern stands for all float32 values that round to it. A float32 master lies anywhere among them, so an update
of size u changes the pattern with probability min(1, u / spacing), where spacing is the distance of two bf16 values at
the weight. The distance is 2^-7 of the weight's power of two: small weights change often, large ones hardly ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hubsync.format.encoding import Encoding

EXPONENTS = 256  # of bfloat16, which has those of float32
_BIAS, _MANTISSA = 127, 7

FIRST = 1.0
"""Mean update divided by the learning rate, in Adam's first step: it moves every weight by the learning rate."""

SETTLED = 0.25
"""The same later: 0.27 in steps 14 to 18 of the measured trace, 0.15 for random gradients (benchmarks/README.md)."""

# `python -m benchmarks.gpu --only server` on an H200 (benchmarks/README.md): 26 M changes in 33.2 MB, 180 ms from
# the publish call to the commit, while the server generates.
_PROVED_PARAMETERS_S = 4.02e9 / 9.6e-3  # the publish call: digest of the whole view
_ENCODED_CHANGES_S = 26e6 / 26e-3
_WRITTEN_BYTES_S = 33.2e6 / 31e-3  # SHA-256 and the write, which run at the same time
_HASHED_BYTES_S = 41.0e6 / 33e-3  # the same when a server fetches
_STAGED_CHANGES_S = 26e6 / 30e-3  # decode, find the places, digest
_COMMIT_S = 9e-3  # the engine's turn
_CONTROL_S = 48e-3  # the rest: HTTP and threads

ROUND_TRIPS = 12 + 6
"""Requests to the Hub that wait for each other, from publish to staged (`python -m benchmarks.hub_calls`)."""


@dataclass(frozen=True)
class WeightShares:
    """What a change of weights depends on.

    Attributes:
        parameters: how many there are.
        shares: share of the weights with each exponent of bf16 (256 numbers).
    """

    parameters: int
    shares: Sequence[float]


@dataclass(frozen=True)
class DeltaSize:
    """The delta of one step.

    Attributes:
        changed: fraction of the weights whose bf16 pattern changes.
        bits: bits for each change, position and value together.
        nbytes: size of the delta.
    """

    changed: float
    bits: float
    nbytes: int


@dataclass(frozen=True)
class SyncTimes:
    """Seconds of one synchronisation, one after the other.

    Attributes:
        transfer: upload, then download.
        requests: round trips to the Hub.
        compute: everything on the two hosts.
        whole: for comparison: all weights in bf16 over the same link, once.
        crossing: bit/s above which that is faster.
    """

    transfer: float
    requests: float
    compute: float
    whole: float
    crossing: float

    @property
    def total(self) -> float:
        return self.transfer + self.requests + self.compute

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


def normal_weights(parameters: int, deviation: float = 0.02) -> WeightShares:
    """WeightShares from a normal distribution around 0."""

    def below(exponent: int) -> float:
        return math.erf(2.0 ** (exponent - _BIAS) / (deviation * math.sqrt(2)))

    shares = [below(exponent + 1) - below(exponent) for exponent in range(1, EXPONENTS - 1)]
    return WeightShares(parameters, [below(1), *shares, 0.0])


def changed_share(weights: WeightShares, update: float) -> float:
    """Fraction of the weights that change their bf16 pattern.

    Args:
        update: mean size of the update of a weight, such as the learning rate times `SETTLED`.
    """
    return sum(share * min(1.0, update / _spacing(exponent)) for exponent, share in enumerate(weights.shares))


def _spacing(exponent: int) -> float:
    return float(2.0 ** (max(exponent, 1) - _BIAS - _MANTISSA))


def bits_per_change(changed: float, encoding: Encoding) -> float:
    """Bits for each changed element, of models with float32 masters. tests/cli/test_size.py compares with real deltas.

    fast: the entropy of independent positions, 1.81 bits for the size of a change, 1 % for tables and headers.
    compact: 6.67 bits at 1.19 % changed (measured), 0.55 less for each doubling, 2 % for tables and headers.
    """
    if encoding is Encoding.COMPACT:
        return 1.02 * (6.67 - 0.55 * math.log2(changed / 0.0119))
    positions = -math.log2(changed) - (1 - changed) / changed * math.log2(1 - changed)
    sizes = 1.81 + 0.12 * max(0.0, math.log2(changed / 0.01))
    return 1.01 * (positions + sizes)


def delta(weights: WeightShares, update: float, encoding: Encoding) -> DeltaSize:
    """The delta after an update of that mean size."""
    changed = changed_share(weights, update)
    if changed == 0:
        return DeltaSize(0.0, 0.0, 0)
    bits = bits_per_change(min(changed, 0.5), encoding)
    return DeltaSize(changed, bits, round(weights.parameters * changed * bits / 8))


def publishing(parameters: int, delta: DeltaSize, ranks: int = 1) -> float:
    """Seconds of the trainer's ranks, one H200 each, from the publish call to written files."""
    whole = (
        parameters / _PROVED_PARAMETERS_S
        + parameters * delta.changed / _ENCODED_CHANGES_S
        + delta.nbytes / _WRITTEN_BYTES_S
    )
    return whole / ranks


def serving(parameters: int, delta: DeltaSize, ranks: int = 1) -> float:
    """Seconds of a server with that many H200, from files that are there to the commit. Each rank reads all files."""
    changes = parameters * delta.changed
    return delta.nbytes / _HASHED_BYTES_S + changes / _STAGED_CHANGES_S / ranks + _COMMIT_S + _CONTROL_S


def times(parameters: int, delta: DeltaSize, link: float, round_trip: float) -> SyncTimes:
    """Seconds of one synchronisation of a trainer and a server with one H200 each.

    Args:
        link: bit/s of each host to the Hub.
        round_trip: seconds for a request to the Hub.
    """
    compute = publishing(parameters, delta) + serving(parameters, delta)
    requests = ROUND_TRIPS * round_trip
    saved = 16 * (parameters - delta.nbytes)  # bits of all weights once, less those of the delta twice
    return SyncTimes(16 * delta.nbytes / link, requests, compute, 16 * parameters / link, saved / (compute + requests))
