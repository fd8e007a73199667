"""Calls that may wait for ever: they run in threads that can be left behind, and only so many of these."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from hubsync.errors import BucketUnavailable

MOST = 8  # threads

T = TypeVar("T")


class LeftBehind:
    """Threads that were given up and have not ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def add(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads.append(thread)

    def check(self, failed: str) -> None:
        """BucketUnavailable if there are too many. `failed` says what cannot be done."""
        with self._lock:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if len(self._threads) < MOST:
                return
        raise BucketUnavailable(
            f"{failed}: {MOST} earlier transfers hang and cannot be cancelled. No other is begun until one ends. If "
            "the network is well again, restart this process"
        )


LEFT_BEHIND = LeftBehind()


def within(seconds: float, act: Callable[[], T], action: str) -> T:
    """Return `act()`, or raise its error. BucketUnavailable if it takes longer, and then its thread is left behind.

    Only for calls whose late end does no harm.
    """
    LEFT_BEHIND.check(f"cannot {action}")
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.extend((act(), None))
        except BaseException as error:
            outcome.extend((None, error))

    thread = threading.Thread(target=work, name="hubsync-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        LEFT_BEHIND.add(thread)
        raise BucketUnavailable(f"cannot {action}: no answer for {seconds:.0f} s. Try again later")
    result, error = outcome
    if error is not None:
        raise error
    done: T = result
    return done
