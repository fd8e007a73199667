"""Verification of weights that are being served: when it was last done, and how much of the time it may take."""

from __future__ import annotations

import time
from typing import Any

_BETWEEN_PASSES_S = 1.0  # small models are looked at often enough
_UNTIL_VERIFIED_S = 1.0


class Verification:
    """Bookkeeping of a session.

    Args:
        share: of the time, from 0 to 1, to look at served weights again while the background has nothing else to do.

    Attributes:
        passes: how often all weights have been looked at and found right.
        asked, answered: number of the last request for a verification, and of the last one that has been done.
        pending: why the weights must be verified before the next forward pass; None if they need not.
        healed: why the weights were rebuilt last; None if they never were.
    """

    def __init__(self, share: float):
        self.share = share
        self.passes = 0
        self.asked = self.answered = 0
        self.pending: str | None = None
        self.healed: str | None = None
        self._ended: float | None = None

    def passed(self) -> None:
        """All weights have been looked at and found right."""
        self.passes += 1
        self._ended = time.monotonic()

    def rest(self, seconds: float, ended: bool) -> float:
        """How long to rest after a slice, in seconds, so that slices take `share` of the time.

        Args:
            seconds: that the slice took.
            ended: was it the last of a pass?
        """
        pause = seconds / self.share - seconds
        return max(pause, _BETWEEN_PASSES_S) if ended else pause

    @property
    def retry(self) -> float | None:
        """Seconds until weights that cannot be looked at now may be; None for never."""
        return _UNTIL_VERIFIED_S if self.share > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Part of a worker's status: docs/protocol.md."""
        return {
            "share": self.share,
            "passes": self.passes,
            "age_s": None if self._ended is None else time.monotonic() - self._ended,
            "asked": self.asked,
            "answered": self.answered,
            "pending": self.pending,
            "healed": self.healed,
        }
