"""Independent jobs on as many threads as this process is given (`torch.set_num_threads`, `OMP_NUM_THREADS`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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

    def work(_: int) -> None:
        while (number := next(numbers)) < len(items):
            results[number] = job(items[number])

    with ThreadPoolExecutor(threads, thread_name_prefix="hubsync-codec") as pool:
        list(pool.map(work, range(threads)))
    return [results[number] for number in range(len(items))]
