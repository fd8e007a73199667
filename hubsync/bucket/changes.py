"""Pauses between two looks at a bucket, which end early when its storage reports a change.

A report is not believed: it only ends a pause, and what changed is looked up as after any pause. So a report that is
lost, late, forged or about nothing costs at most one pause, or one look.
"""

from __future__ import annotations

import threading
from types import TracebackType

from hubsync.retry import Deadline

SHORTEST_S = 1.0  # between two pauses that reports end: a flood of reports causes no flood of looks
REPEAT_S = 2.0  # a report ends the pause after it too, so much later: what is reported may become visible late


class Changes:
    """The pauses of one poller. This class never ends one early; storages with reports call `report`.

    Use it in a `with` statement, or call `close`. `wait` is for one thread, the other methods are for any.
    """

    def __init__(self) -> None:
        self._reported = threading.Event()
        self._closed = threading.Event()
        self._soonest = Deadline(0.0)
        self._repeat: Deadline | None = None

    @property
    def live(self) -> bool:
        """Whether reports can arrive now."""
        return False

    def wait(self, timeout_s: float) -> bool:
        """Sleep for `timeout_s` seconds, or until a change is reported. Returns whether one was. At once if closed."""
        repeat = self._repeat
        if repeat is not None and repeat.left < timeout_s:
            if not self._reported.wait(repeat.left):
                self._repeat = None
                return True
        elif not self._reported.wait(timeout_s):
            return False
        self._closed.wait(self._soonest.left)
        self._reported.clear()
        if self._closed.is_set():
            self._reported.set()
        self._soonest, self._repeat = Deadline(SHORTEST_S), Deadline(REPEAT_S)
        return True

    def report(self) -> None:
        """End the pause, or the next one: something may have changed."""
        self._reported.set()

    def close(self) -> None:
        """End the pause, and hear of no more changes."""
        self._closed.set()
        self._reported.set()

    def __enter__(self) -> Changes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
