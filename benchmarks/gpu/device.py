"""Time and memory of the GPU, and of a CPU where there is none: then memory is not a number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Seconds until the GPU has done it."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def allocated() -> float:
    """Bytes."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else math.nan


def peak() -> float:
    """Most bytes since `peak_from_here`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else math.nan


def peak_from_here() -> float:
    """Bytes allocated now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return allocated()


def release() -> None:
    """Give unused memory back to other processes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
