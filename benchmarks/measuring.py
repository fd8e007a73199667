"""Timing. On a shared machine a speed is meaningful only relative to a plain copy measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Speeds of several runs, in GB/s."""

    slowest: float
    median: float
    fastest: float

    @classmethod
    def of(cls, gigabytes: float, seconds: list[float]) -> Spread:
        return cls(*(gigabytes / value for value in (max(seconds), float(np.median(seconds)), min(seconds))))

    def __str__(self) -> str:
        return f"{self.slowest:.2f}/{self.median:.2f}/{self.fastest:.2f}"


def timed(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """The result and its seconds: CPU time of this thread, or wall time if torch has several threads."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = work(*args, **kwargs)
    return result, clock() - start


def repeated(repeats: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, list[float]]:
    """The result and the seconds of `repeats` calls, after one call for compilation and warm-up."""
    work(*args, **kwargs)
    runs = [timed(work, *args, **kwargs) for _ in range(repeats)]
    return runs[-1][0], [seconds for _, seconds in runs]
