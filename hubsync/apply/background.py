"""The background thread of a worker, for long jobs: downloads, and reading all weights."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TURN_S = 0.0005  # of Python code, after which another thread goes on during a job; usually 5 ms


class Background:
    """Runs jobs one after the other. The first job starts the thread, which then stays.

    Args:
        idle: called while there is no job; short. Returns the seconds until it is to be called again, None if only
            after another job.
        done: called after each job.

    Attributes:
        working: held during a job, and while idle is called. Take it to keep jobs from running meanwhile.
        reading: to be held by a job while it reads live weights. Take it to keep jobs from reading them.
    """

    def __init__(
        self, idle: Callable[[], float | None] = lambda: None, done: Callable[[], None] = lambda: None
    ) -> None:
        self.working = threading.Lock()
        self.reading = threading.Lock()
        self._idle, self._done = idle, done
        self._unfinished, self._counting = 0, threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def current(self) -> bool:
        """Is this called by a job?"""
        return threading.current_thread() is self._thread

    @property
    def busy(self) -> bool:
        """Are there jobs that have not ended?"""
        return self._unfinished > 0

    def submit(self, job: Callable[[], None]) -> None:
        """Run this job after all that were submitted before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hubsync", daemon=True)
            self._thread.start()
        self._count(1)
        self._jobs.put(job)

    def _work(self) -> None:
        rest: float | None = None
        while True:
            job = self._next(rest)
            with self.working, _short_turns():
                if job is None:
                    rest = self._idle()
                else:
                    job()
                    rest = 0.0
            if job is not None:
                self._count(-1)
                self._done()

    def _count(self, jobs: int) -> None:
        with self._counting:
            self._unfinished += jobs

    def _next(self, seconds: float | None) -> Callable[[], None] | None:
        """The next job; None if there is none within so many seconds."""
        try:
            return self._jobs.get(timeout=seconds)
        except queue.Empty:
            return None


@contextmanager
def _short_turns() -> Iterator[None]:
    """Give the interpreter's lock back soon to the thread that runs the model, wherever this one takes it."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, _TURN_S))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
