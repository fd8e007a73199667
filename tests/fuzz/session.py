"""Runs a fuzz target many times and reports what came out."""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from hubsync.errors import HubsyncError

REPORT_SECONDS = 30.0


class Session:
    """Counts executions and keeps the inputs of those that failed.

    Args:
        read: reads one input; returns normally if it accepts it. Must raise nothing but `rejections`.
        rejections: the errors that the reader documents.
        keep: directory for inputs that failed.
    """

    def __init__(self, read: Callable[[bytes], None], rejections: tuple[type[HubsyncError], ...], keep: Path):
        self.executions = self.accepted = self.failures = 0
        self.rejected: Counter[str] = Counter()
        self.largest = 0
        self._read = read
        self._rejections = rejections
        self._keep = keep
        self._begun = time.monotonic()
        self._before = memory("VmRSS")

    def one(self, data: bytes, name: str = "") -> None:
        """One execution."""
        self.executions += 1
        self.largest = max(self.largest, len(data))
        try:
            self._read(data)
            self.accepted += 1
        except self._rejections as error:
            self.rejected[type(error).__name__] += 1
        except Exception:
            self.failures += 1
            self._keep.mkdir(parents=True, exist_ok=True)
            path = self._keep / f"failure-{name or self.executions}"
            path.write_bytes(data)
            print(f"FAILURE, its input is in {path}:\n{traceback.format_exc()}", flush=True)

    def run(self, make: Callable[[Random], bytes], *, seed: int, first: int, runs: int, seconds: float) -> None:
        """Executions `first`, `first` + 1, ... Each depends on the seed and its number alone, so it can be repeated."""
        reported = time.monotonic()
        for number in range(first, first + runs):
            now = time.monotonic()
            if now - self._begun > seconds:
                print(f"stopped after {seconds:.0f} s: continue with --first {number}")
                return
            if now - reported > REPORT_SECONDS:
                reported = now
                print(self.summary(), flush=True)
            self.one(make(Random(f"{seed} {number}")), f"{seed}-{number}")

    @property
    def growth(self) -> int:
        """Peak memory above that before the first execution, in bytes."""
        return max(0, memory("VmHWM") - self._before)

    def summary(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._begun)
        rejected = ", ".join(f"{count:,} {name}" for name, count in self.rejected.most_common())
        return (
            f"{self.executions:,} executions in {seconds:.0f} s, {self.accepted:,} accepted, "
            f"rejected: {rejected or 'none'}; {self.failures} failures; inputs up to {self.largest:,} bytes, "
            f"peak memory {memory('VmHWM') / 1e6:.0f} MB ({self.growth / 1e6:.0f} MB above the start)"
        )

    def to_json(self) -> str:
        """For a parent process."""
        return json.dumps({"summary": self.summary(), "failures": self.failures, "executions": self.executions})


def memory(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def reset_peak() -> None:
    """Let `VmHWM` begin again at `VmRSS`."""
    Path("/proc/self/clear_refs").write_text("5")
