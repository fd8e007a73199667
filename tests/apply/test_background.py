"""The background thread of a worker."""

from __future__ import annotations

import queue
import sys

from hubsync.apply.background import Background


def test_a_job_lets_other_threads_go_on_soon() -> None:
    """The thread that runs the model waits for the interpreter's lock half a millisecond, not 5."""
    usual = sys.getswitchinterval()
    seen: queue.SimpleQueue[float] = queue.SimpleQueue()
    background = Background()
    background.submit(lambda: seen.put(sys.getswitchinterval()))
    assert seen.get(timeout=60) <= 0.0005
    with background.working:
        assert sys.getswitchinterval() == usual
