"""Waits with a deadline: polls at growing intervals, calls that are repeated while their error is a passing one, and
blocking waits that report.

Every wait of the project on a network or on another process goes through here, so that each one has a deadline, backs
off exponentially with jitter, and states in the log what it waits for. Imports the standard library only.

Poll until a condition holds:

    for _ in attempts(30.0, waiting_for="the server to load"):
        if server.is_ready():
            return
    raise TimeoutError("the server did not load within 30 s")

Repeat a call while it raises an error that may pass:

    manifest = retry(read_manifest, timeout=30.0, on=BucketUnavailable, waiting_for="the bucket")

Block until another thread is done:

    if not wait_reporting(event.wait, 600.0, waiting_for="the upload"):
        raise TimeoutError("the upload did not end within 600 s")
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

logger = logging.getLogger(__name__)

REPORT_SECONDS = 30.0  # between two log lines of one wait

T = TypeVar("T")


class Deadline:
    """A point in time on the monotonic clock, `seconds` from now (`math.inf`: never)."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; 0 once the deadline has passed."""
        return max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left == 0.0


def attempts(
    timeout: float | Deadline, *, waiting_for: str, first: float = 0.05, longest: float = 2.0
) -> Iterator[float]:
    """Yield the seconds left before each attempt, and sleep between two attempts.

    The first attempt comes at once, even with a timeout of 0, and the last one at the deadline. Leave the loop when an
    attempt succeeds; the loop ends by itself after the last one. Every `REPORT_SECONDS` it logs what it waits for.

    Args:
        timeout: seconds, or a deadline shared with other waits.
        waiting_for: completes "still waiting for ..." in the log.
        first: longest first pause, in seconds; each pause may be twice as long as the one before.
        longest: limit of a pause, in seconds. Each pause is shortened by a random share of up to a half, so that many
            clients do not ask at the same moments.
    """
    deadline = timeout if isinstance(timeout, Deadline) else Deadline(timeout)
    report, pause = Deadline(REPORT_SECONDS), first
    while True:
        left = deadline.left
        yield left
        if left == 0.0:
            return
        if report.passed:
            logger.warning("still waiting for %s%s", waiting_for, _said(deadline))
            report = Deadline(REPORT_SECONDS)
        time.sleep(min(pause * random.uniform(0.5, 1.0), deadline.left))
        pause = min(2.0 * pause, longest)


def retry(
    act: Callable[[], T],
    *,
    timeout: float | Deadline,
    on: type[Exception] | tuple[type[Exception], ...],
    waiting_for: str,
    first: float = 0.25,
    longest: float = 5.0,
) -> T:
    """Return `act()`; repeat it while it raises one of `on`, until the deadline.

    Other errors pass at once. After the last attempt its error is raised. The first error is logged at once, with the
    time that is left; `timeout`, `waiting_for`, `first` and `longest` as in `attempts`.
    """
    failures = 0
    for left in attempts(timeout, waiting_for=waiting_for, first=first, longest=longest):
        try:
            return act()
        except on as error:
            if left == 0.0:
                raise
            failures += 1
            if failures == 1:
                logger.warning("waiting for %s, up to %.0f s: %s", waiting_for, left, error)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def reporting(waiting_for: str) -> Iterator[None]:
    """Every `REPORT_SECONDS` log what a wait is for that cannot be interrupted, as long as the context lasts."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(REPORT_SECONDS):
            logger.warning("still waiting for %s", waiting_for)

    threading.Thread(target=report, name="hubsync-wait", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def wait_reporting(wait: Callable[[float], bool], timeout: float | Deadline = math.inf, *, waiting_for: str) -> bool:
    """Whether `wait` succeeded before the deadline. Every `REPORT_SECONDS` it logs what it waits for.

    Args:
        wait: blocks for at most the given seconds; returns whether what it waits for has happened.
        timeout: seconds, or a deadline shared with other waits; default is to wait for as long as it takes.
        waiting_for: completes "still waiting for ..." in the log.
    """
    deadline = timeout if isinstance(timeout, Deadline) else Deadline(timeout)
    while not wait(min(REPORT_SECONDS, deadline.left)):
        if deadline.passed:
            return False
        logger.warning("still waiting for %s%s", waiting_for, _said(deadline))
    return True


def _said(deadline: Deadline) -> str:
    return "" if deadline.left == math.inf else f", {deadline.left:.0f} s left"
