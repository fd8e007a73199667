"""The background thread of a worker."""

from __future__ import annotations

import queue
import sys
import threading

from hubsync.apply.background import Background


def test_a_job_lets_other_threads_go_on_soon() -> None:
    """The thread that runs the model waits for the interpreter's lock half a millisecond, not 5."""
    usual = sys.getswitchinterval()
    seen: queue.SimpleQueue[float] = queue.SimpleQueue()
    background = Background()
    background.submit(lambda: seen.put(sys.getswitchinterval()))
    assert seen.get(timeout=60) <= 0.0005
    while background.busy:
        pass
    with background.working:
        assert sys.getswitchinterval() == usual


def test_it_is_busy_until_the_last_job_has_ended_and_says_so_after_each() -> None:
    done: queue.SimpleQueue[bool] = queue.SimpleQueue()
    go = threading.Event()

    def wait() -> None:
        go.wait(60)

    background = Background(done=lambda: done.put(background.busy))
    assert not background.busy
    background.submit(wait)
    background.submit(lambda: None)
    assert background.busy
    go.set()
    assert [done.get(timeout=60) for _ in range(2)] == [True, False]
