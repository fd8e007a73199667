"""Which level of the codec the next version gets: the one that was asked for, or the one that takes less time."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)

LEVELS = ("fast", "compact")
_KEEP = 0.7  # weight of what was known against a new measurement


@dataclass
class _Cost:
    """What a level was measured to take, per changed element."""

    seconds: float
    nbytes: float


class LevelChooser:
    """Says how to encode, and learns from what it took.

    With "auto" each level is measured once; from then on a version gets the level with fewer seconds of encoding and
    upload together. The speed of the link is that of past uploads as a whole: where requests take longer than the bytes
    in them it looks slow, and the smaller level is chosen, which then costs next to nothing.

    Args:
        setting: one of `LEVELS`, or "auto".
    """

    def __init__(self, setting: str):
        self._setting = setting
        self._costs: dict[str, _Cost] = {}
        self._seconds_per_byte = 0.0
        self._said: str | None = None

    def choose(self) -> str:
        if self._setting != "auto":
            return self._setting
        for level in LEVELS:
            if level not in self._costs:
                return level
        level = min(LEVELS, key=self._seconds)
        if level != self._said:
            self._said = level
            logger.info("encoding=auto: %s from now on; %s", level, "; ".join(map(self._explained, LEVELS)))
        return level

    def learn(self, level: str, changed: int, nbytes: int, encode_s: float, upload_s: float) -> None:
        """Take note of a version that was published."""
        cost = _Cost(encode_s / changed, nbytes / changed)
        known = self._costs.get(level)
        if known is not None:
            cost = _Cost(_mixed(known.seconds, cost.seconds), _mixed(known.nbytes, cost.nbytes))
        self._costs[level] = cost
        now = upload_s / nbytes
        self._seconds_per_byte = _mixed(self._seconds_per_byte, now) if self._seconds_per_byte else now

    def _seconds(self, level: str) -> float:
        cost = self._costs[level]
        return cost.seconds + cost.nbytes * self._seconds_per_byte

    def _explained(self, level: str) -> str:
        cost = self._costs[level]
        return (
            f"{level} takes {1e9 * cost.seconds:.0f} ns of encoding and {8 * cost.nbytes:.2f} bits for each change, "
            f"{1e9 * cost.nbytes * self._seconds_per_byte:.0f} ns of the link"
        )


def _mixed(known: float, new: float) -> float:
    return _KEEP * known + (1 - _KEEP) * new
