"""A warning: updates that are smaller than half a unit in the last place of a parameter's own dtype are lost."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class LostUpdates:
    """Reports once which share of the first step's updates was lost to rounding in the parameters' own dtype.

    Attributes:
        is_reported: nothing needs to be counted any more.
    """

    def __init__(self) -> None:
        self._expected = self._moved = 0
        self.is_reported = False

    def count(self, expected: int, moved: int) -> None:
        """Add parameters of 16 bits: elements with a gradient, and elements that changed."""
        self._expected += expected
        self._moved += moved

    def report(self) -> None:
        if self.is_reported or self._moved == 0:  # a skipped step, or a learning rate that starts at zero
            return
        self.is_reported = True
        lost = 1 - self._moved / max(self._expected, self._moved)
        logger.warning(
            "the first step left %.1f %% of the parameters with a gradient unchanged: their updates are smaller than "
            "half a unit in the last place, and lost",
            100 * lost,
        )
