"""The background thread of a worker, for long jobs: downloads, and reading all weights."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Background:
    """Runs jobs one after the other. The first job starts the thread, which then stays.

    Attributes:
        working: held during a job. Take it to keep jobs from running meanwhile.
    """

    def __init__(self) -> None:
        self.working = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run this job after all that were submitted before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hubsync", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            with self.working:
                job()
