"""Independent jobs on as many threads as this process is given (`torch.set_num_threads`, `OMP_NUM_THREADS`)."""

from __future__ import annotations

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
    with ThreadPoolExecutor(threads, thread_name_prefix="hubsync-codec") as pool:
        return list(pool.map(job, items))
