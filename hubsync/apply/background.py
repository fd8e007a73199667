"""The thread of a worker for what takes long: downloads, and looking at all weights."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Background:
    """Does jobs one after the other. The first one starts the thread, which then stays.

    Attributes:
        working: held during a job; take it to keep jobs from running meanwhile.
    """

    def __init__(self) -> None:
        self.working = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Do this after what was submitted before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hubsync", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            with self.working:
                job()
