"""A sweep: all live weights of a rank, looked at a slice at a time, so that nothing waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hubsync.format.digest import Digest, DigestList

from .live_weights import HeldRegion, LiveWeights
from .regions import Region
from .staging import Sums

if TYPE_CHECKING:
    from .applier import Applier

_COST_OF_SCATTERED = 16


class Sweep:
    """Compares each region with its digest. Regions may be larger or smaller than a slice.

    Args:
        live: the weights.
        sums: their digests.
        changes: `Applier.changes` when it began. After another one it is void: what it reads next may be newer.
    """

    def __init__(self, live: LiveWeights, sums: Sums, changes: int):
        self.changes = changes
        self.ended = False
        self._live = live
        self._expected = DigestList(sums.regions)
        self._lanes = np.zeros((len(live.numbers_together), 2), np.uint64)  # of regions read together
        self._next = 0  # of their pieces
        self._regions = iter(live.apart)
        self._part: HeldRegion | None = None
        self._pieces: Iterator[Region] = iter(())
        self._found = Digest()
        self._cost = 1

    def read(self, elements: int) -> bool:
        """Read the next slice: pieces of at most `elements` elements, until these are `elements` together.

        Elements that are not one run in memory count as several, because they take more time.

        Returns:
            False as soon as a region does not have its digest.
        """
        with self._live.aside():
            left = self._read_together(elements)
            while left is not None and left > 0:
                piece = next(self._pieces, None)
                if piece is not None:
                    assert self._part is not None
                    self._found += self._live.digest_of(self._part.index, piece)
                    left -= piece.numel * self._cost
                    continue
                if self._part is not None and self._found != self._expected[self._part.number]:
                    return False
                self._part = next(self._regions, None)
                if self._part is None:
                    self.ended = True
                    return True
                self._cost = 1 if self._live.plain(self._part.region) else _COST_OF_SCATTERED
                self._pieces = self._part.region.pieces(max(1, elements // self._cost))
                self._found = Digest()
        return left is not None

    def _read_together(self, elements: int) -> int | None:
        """Read the next pieces of the regions that are read together, by one launch.

        Returns:
            how many of the `elements` are left to be read; None if a region that ends here does not have its digest.
        """
        together, first = self._live.together, self._next
        if together is None or first == len(together.region_of):
            return elements
        end = self._next = min(first + max(1, elements // together.piece), len(together.region_of))
        together.add(self._lanes, first, end)
        goes_on = end < len(together.region_of)
        low, high = together.region_of[first], together.region_of[end] if goes_on else len(self._lanes)
        expected = self._expected.lanes[self._live.numbers_together[low:high]]
        if (self._lanes[low:high] != expected).any():
            return None
        return 0 if goes_on else elements - (end - first) * together.piece


class Sweeper:
    """Sweeps over the weights of an applier, one after the other."""

    def __init__(self, applier: Applier):
        self._applier = applier
        self._sweep: Sweep | None = None

    def slice(self, elements: int) -> bool:
        """Look at the next `elements` or so, to find what has changed weights since they were verified.

        Returns:
            whether all have been looked at once more, with this slice.

        Raises:
            ReplicaPoisoned: they are wrong, as in `Applier.verify`.
        """
        applier, sweep = self._applier, self._sweep
        if sweep is None or not applier.verified or sweep.changes != applier.changes:
            sweep = self._sweep = applier.sweep()
        if sweep is None:
            return False
        right = sweep.read(elements)
        if right and not sweep.ended:
            return False
        self._sweep = None
        if right and applier.intact():
            return sweep.changes == applier.changes
        return applier.verify()  # names all that differ, unless a write came in between


def first_names(names: Sequence[str]) -> str:
    """The first three of these, and the number of the others."""
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{others} differ" + ("s" if len(names) == 1 else "")
