"""The code book with the fewest bits for some chunks, from counts of what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from . import costs
from .book import FIELDS, GAP, LIST_REST, MAX_K, MAX_PLANES, NO_PLANE, RICE, TAIL, USUAL, Book
from .costs import MAX_GAP_K


class Counts(Protocol):
    """What some chunks hold, wherever they are. The first dimension of each array is the class."""

    def gap_cost(self) -> np.ndarray:
        """int64[classes, MAX_GAP_K], bits of all gaps for each Rice parameter."""

    def lists(self) -> np.ndarray:
        """int64[classes], chunks with changes of the class."""

    def magnitude_counts(self) -> np.ndarray:
        """int64[classes, MAGNITUDES], number of changes of each magnitude, but for larger ones."""

    def distance_counts(self, usual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distances from the usual magnitude of the class.

        Returns:
            (found, beyond): int64[classes, DISTANCES], number of changes with each distance, but for larger ones;
            int64[2, classes, MAX_K + 1], bits of the larger ones in an Exp-Golomb and in a Rice code, by parameter.
        """


def fit(low: int, parts: Sequence[Counts], width: int) -> Book:
    """The code book for these chunks. `fit_orders` fits the orders, to the rows that are written."""
    gap_cost = _sum([part.gap_cost() for part in parts])
    codes = np.full((len(gap_cost), 3 + MAX_PLANES), NO_PLANE, np.uint8)
    codes[:, GAP] = np.argmin(gap_cost, axis=1)
    magnitudes = _sum([part.magnitude_counts() for part in parts])
    codes[:, USUAL] = np.maximum(1, np.argmax(magnitudes[:, : 1 << (width - 1)], axis=1))
    distances = [part.distance_counts(codes[:, USUAL]) for part in parts]
    found, beyond = (_sum([own[side] for own in distances]) for side in range(2))
    lists = _sum([part.lists() for part in parts])
    for c in range(len(codes)):
        codes[c, TAIL:] = _fit_magnitudes(found[c], beyond[:, c], int(lists[c]), width)
    return Book(low, np.zeros(len(codes) + FIELDS, np.uint8), codes)


def fit_orders(columns: np.ndarray) -> np.ndarray:
    """uint8[classes + FIELDS], the Exp-Golomb orders of the columns of chunk rows."""
    if not len(columns):
        return np.zeros(columns.shape[1], np.uint8)
    return np.array([np.argmin(costs.exp_golomb_cost(column.copy())) for column in columns.T], np.uint8)


def _sum(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.sum(arrays, axis=0)


def _fit_magnitudes(found: np.ndarray, beyond: np.ndarray, lists: int, width: int) -> np.ndarray:
    """The code of the distances of one class: uint8[1 + MAX_PLANES], the tail and the planes.

    Args:
        found: int64[DISTANCES], number of changes with each distance.
        beyond: int64[2, MAX_K + 1], bits of larger distances in an Exp-Golomb or Rice code.
        lists: number of chunks. Each has a list in every plane.
    """
    code = np.full(1 + MAX_PLANES, NO_PLANE, np.uint8)
    best, spent, chosen = np.inf, 0.0, 0
    left = int(found.sum()) + int(beyond[0, 0] > 0)
    for planes in range(MAX_PLANES + 1):
        tail_cost, tail = _best_tail(found[planes:], beyond, width)
        if spent + tail_cost < best:
            best, chosen, code[0] = spent + tail_cost, planes, tail
        if planes == MAX_PLANES or left <= 0:
            break
        ending = int(found[planes])
        list_cost, code[1 + planes] = _best_list(ending, left, lists)
        spent += list_cost
        left -= ending
    code[1 + chosen :] = NO_PLANE
    return code


def _tail_bits() -> np.ndarray:
    """int64[2, MAX_K + 1, DISTANCES]: bits of a number in an Exp-Golomb and in a Rice code of every parameter."""
    k, values = np.arange(MAX_K + 1)[:, None], np.arange(costs.DISTANCES)
    exp_golomb = 2 * np.floor(np.log2(values + (1 << k))).astype(np.int64) - k + 1
    return np.stack([exp_golomb, (values >> k) + k + 1])


_TAIL_BITS = _tail_bits()


def _best_list(ending: int, left: int, lists: int) -> tuple[float, int]:
    """(bits, code) of a plane in which `ending` of `left` changes end: it lists either these, or the others."""
    options = []
    for listed, flag in ((left - ending, LIST_REST), (ending, 0)):
        share = listed / left
        k = np.arange(MAX_GAP_K)
        with np.errstate(divide="ignore"):
            quotients = 1 / -np.expm1(np.exp2(k) * np.log1p(-share)) if 0 < share < 1 else np.ones(len(k))
        last = min(left / lists, 1 / share if share else np.inf) / np.exp2(k) + k + 1  # of a list, up to its end
        cost = listed * (k + quotients) + lists + min(lists, listed) * last
        options.append((float(cost.min()), flag | int(np.argmin(cost))))
    return min(options)


def _best_tail(found: np.ndarray, beyond: np.ndarray, width: int) -> tuple[float, int]:
    """(bits, code) of distances, counted from the first that no plane ends."""
    orders = min(width, MAX_K) + 1
    bits = beyond[:, :orders] + _TAIL_BITS[:, :orders, : len(found)] @ found
    kind, k = divmod(int(np.argmin(bits)), bits.shape[1])
    return float(bits[kind, k]), k | (RICE if kind else 0)
