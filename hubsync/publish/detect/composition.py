"""Adding up the changes of several optimizer steps."""

from __future__ import annotations

import numpy as np
from numba import njit

from .base import Change


class PendingChanges:
    """Changes of several steps by key, as lists of changes. Changes of similar size are composed, so each one is
    copied only a few times."""

    def __init__(self) -> None:
        self._parts: dict[int, list[Change]] = {}

    def add(self, key: int, change: Change) -> None:
        if len(change.indices) == 0:
            return
        parts = self._parts.setdefault(key, [])
        parts.append(change)
        while len(parts) > 1 and len(parts[-2].indices) < 2 * len(parts[-1].indices):
            later, earlier = parts.pop(), parts.pop()
            parts.append(compose(earlier, later))

    def collect(self) -> dict[int, Change]:
        """One change for each key; no empty ones."""
        whole = {}
        for key, parts in self._parts.items():
            change = parts[-1]
            for earlier in reversed(parts[:-1]):
                change = compose(earlier, change)
            if len(change.indices):
                whole[key] = change
        return whole


def compose_all(first: dict[int, Change], second: dict[int, Change]) -> dict[int, Change]:
    """`compose` for each key; no empty changes."""
    out = {**first, **second}
    for key in first.keys() & second.keys():
        out[key] = compose(first[key], second[key])
    return {key: change for key, change in out.items() if len(change.indices)}


def compose(first: Change, second: Change) -> Change:
    """The change that equals `first` followed by `second`. Elements that return to their old bits disappear."""
    size = len(first.indices) + len(second.indices)
    indices, old, new = np.empty(size, np.int64), np.empty(size, first.old.dtype), np.empty(size, first.new.dtype)
    n = _merge(first.indices, first.old, first.new, second.indices, second.old, second.new, indices, old, new)
    return Change(indices[:n].copy(), old[:n].copy(), new[:n].copy())


@njit(nogil=True, cache=True)
def _merge(
    indices_a: np.ndarray,
    old_a: np.ndarray,
    new_a: np.ndarray,
    indices_b: np.ndarray,
    old_b: np.ndarray,
    new_b: np.ndarray,
    indices: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
) -> int:
    """Merge two ascending lists: old patterns of the first, new ones of the second. Returns how many were written."""
    a, b, n = 0, 0, 0
    while a < len(indices_a) or b < len(indices_b):
        if b == len(indices_b) or (a < len(indices_a) and indices_a[a] < indices_b[b]):
            indices[n], old[n], new[n] = indices_a[a], old_a[a], new_a[a]
            a += 1
        elif a == len(indices_a) or indices_b[b] < indices_a[a]:
            indices[n], old[n], new[n] = indices_b[b], old_b[b], new_b[b]
            b += 1
        else:
            indices[n], old[n], new[n] = indices_a[a], old_a[a], new_b[b]
            a += 1
            b += 1
        n += old[n] != new[n]
    return n
