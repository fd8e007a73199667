"""A worker extension that watches its own process: how long threads and forward passes wait.

`python -m vllm... --worker-extension-cls benchmarks.gpu.ticking.TickingExtension`; called by `benchmarks.gpu.server`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from vllm_plugin import DeltaWorkerExtension

_TICK_S = 0.001
_NOTED_S = 0.0005  # shorter delays are those of the operating system


class _Watch(threading.Thread):
    """Ticks each millisecond, as any other thread of the engine's process would wish to."""

    def __init__(self) -> None:
        super().__init__(name="benchmark-ticks", daemon=True)
        self.late: list[tuple[float, float]] = []
        self.steps: list[float] = []

    def run(self) -> None:
        last = time.perf_counter()
        while True:
            time.sleep(_TICK_S)
            now = time.perf_counter()
            if now - last - _TICK_S > _NOTED_S:
                self.late.append((now, now - last - _TICK_S))
            last = now

    def follow(self, runner: Any) -> None:
        """Note when each forward pass begins."""
        original = runner.execute_model

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            self.steps.append(time.perf_counter())
            return original(*args, **kwargs)

        runner.execute_model = execute_model


_watches: list[_Watch] = []


class TickingExtension(DeltaWorkerExtension):
    """Its times are those of `time.perf_counter`, which all processes of a Linux machine share."""

    def benchmark_watch(self) -> dict[str, Any]:
        """Begin, or forget what was seen."""
        if not _watches:
            _watches.append(_Watch())
            _watches[0].follow(self.model_runner)  # type: ignore[attr-defined]
            _watches[0].start()
        _watches[0].late, _watches[0].steps = [], []
        if not torch.cuda.is_available():
            return {"allocated": 0}
        torch.cuda.reset_peak_memory_stats()
        return {"allocated": torch.cuda.memory_allocated()}

    def benchmark_seen(self) -> dict[str, Any]:
        """Moments when forward passes began; (moment, delay) of late ticks; most bytes of GPU memory."""
        watch = _watches[0]
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return {"steps": watch.steps, "late": [list(pair) for pair in watch.late], "peak": peak}
