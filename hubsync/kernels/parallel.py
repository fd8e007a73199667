"""Independent jobs on as many threads as this process is given (`torch.set_num_threads`, `OMP_NUM_THREADS`)."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
R = TypeVar("R")


def each(job: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`[job(item) for item in items]`, side by side: the compiled loops release the GIL."""
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        return [job(item) for item in items]

    numbers = itertools.count()  # threads take the next item as they become free: a core may be busy with others
    results: dict[int, R] = {}

    def work() -> None:
        while (number := next(numbers)) < len(items):
            results[number] = job(items[number])

    others = [_pool().submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:  # those that have not begun, because the threads are busy for others, are not missed
        begun = [other for other in others if not other.cancel()]
        wait(begun)
    for other in begun:
        other.result()
    return [results[number] for number in range(len(items))]


def pieces(size: int, least: int) -> list[slice]:
    """Equal cuts of a row of `size` things, one for each thread, if all of them have at least `least`."""
    count = max(1, min(torch.get_num_threads(), size // least))
    bounds = [size * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def add_up(
    job: Callable[[T, tuple[np.ndarray, ...]], None], items: Sequence[T], zeros: Callable[[], tuple[np.ndarray, ...]]
) -> tuple[np.ndarray, ...]:
    """Arrays to which `job` adds what it finds in each item; each thread has a set of its own until the end."""
    own = threading.local()
    sets: list[tuple[np.ndarray, ...]] = [zeros()]

    def work(item: T) -> None:
        if not hasattr(own, "arrays"):
            own.arrays = zeros()
            sets.append(own.arrays)
        job(item, own.arrays)

    each(work, items)
    return tuple(np.sum(arrays, axis=0) for arrays in zip(*sets, strict=True))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads that stay: starting some for every list of jobs took a fifth of the time of encoding."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="hubsync-kernel")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
