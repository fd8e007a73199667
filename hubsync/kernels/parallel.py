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
    """`[job(item) for item in items]` in parallel. Compiled loops release the GIL."""
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        return [job(item) for item in items]

    numbers = itertools.count()  # a free thread takes the next item: some cores may be busy with other work
    results: dict[int, R] = {}

    def work() -> None:
        while (number := next(numbers)) < len(items):
            results[number] = job(items[number])

    others = [_pool().submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:  # workers that have not started, because the pool is busy, are not needed
        begun = [other for other in others if not other.cancel()]
        wait(begun)
    for other in begun:
        other.result()
    return [results[number] for number in range(len(items))]


def pieces(size: int, least: int) -> list[slice]:
    """Cut `size` items into equal pieces, one for each thread, of at least `least` items."""
    count = max(1, min(torch.get_num_threads(), size // least))
    bounds = [size * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def add_up(
    job: Callable[[T, tuple[np.ndarray, ...]], None], items: Sequence[T], zeros: Callable[[], tuple[np.ndarray, ...]]
) -> tuple[np.ndarray, ...]:
    """Sums over items. `job` adds its findings to arrays; each thread has its own arrays until the end."""
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
    """A pool that lives as long as the process. Starting threads for every list took a fifth of the encoding time."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="hubsync-kernel")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
