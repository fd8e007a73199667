"""Limit of concurrent requests to one server: fixed, or adapted to the server's own metrics.

Additive increase, multiplicative decrease, as in TCP: while the server keeps up and its whole window is in use, the
window grows by a constant. When requests pile up in the server's queue, or their first token is late, it shrinks by a
factor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hubsync.errors import ConfigError, ReplicaUnsuitable

_WAITING = "vllm:num_requests_waiting"
# Both are observed when a request finishes; together they are the time to its first token, without the network.
_DELAYS = ("vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds")
_STEP = 1.0
_SHRINK = 0.5


@dataclass(frozen=True)
class AdaptiveWindow:
    """Settings of a limit that adapts to a server's load.

    Attributes:
        initial_window: requests at once to begin with.
        min_window: never fewer.
        max_window: never more.
        queue_target: requests that may wait in the server's queue. A few keep its batches full.
        prefill_queue_target: seconds that requests may take, on average, from their arrival to the end of their
            prefill. Must be above the prefill time of the prompts on an idle server.
    """

    initial_window: int = 16
    min_window: int = 1
    max_window: int = 256
    queue_target: int = 4
    prefill_queue_target: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_window <= self.initial_window <= self.max_window:
            raise ConfigError(
                f"a window needs 1 <= min_window <= initial_window <= max_window, not "
                f"{self.min_window}, {self.initial_window}, {self.max_window}"
            )
        if self.queue_target < 0 or not self.prefill_queue_target > 0:
            raise ConfigError("queue_target must not be negative, and prefill_queue_target must be positive")

    @classmethod
    def fixed(cls, size: int) -> AdaptiveWindow:
        """A window of always `size` requests."""
        return cls(initial_window=size, min_window=size, max_window=size)


@dataclass(frozen=True)
class Load:
    """Load of a server from its metrics: counts and seconds since it started.

    Attributes:
        waiting: requests in its queue now, over all of its engines.
        finished: requests that it has finished.
        delay_s: seconds that these took to the end of their prefill, in all.
    """

    waiting: float
    finished: float
    delay_s: float

    @classmethod
    def parse(cls, metrics: str) -> Load:
        """Parse the text of vLLM's `/metrics`. ReplicaUnsuitable if a metric is missing."""
        waiting = _total(metrics, _WAITING)
        delays = [_total(metrics, f"{name}_sum") for name in _DELAYS]
        finished = _total(metrics, f"{_DELAYS[0]}_count")
        if waiting is None or finished is None or None in delays:
            raise ReplicaUnsuitable(
                f"/metrics has no {_WAITING} or no {' or '.join(_DELAYS)}: start the server without "
                "--disable-log-stats, or sample with a fixed window"
            )
        return cls(waiting, finished, sum(delay for delay in delays if delay is not None))


class RequestLimit:
    """Limit of concurrent requests to one server.

    Attributes:
        size: requests that may be outstanding now.
    """

    def __init__(self, settings: AdaptiveWindow):
        self._settings = settings
        self._size = float(settings.initial_window)
        self._last: Load | None = None
        self._used = 0
        self._settling = 0.0  # requests of the larger window that are still to finish after it has shrunk

    @property
    def size(self) -> int:
        return int(self._size)

    @property
    def adapts(self) -> bool:
        return self._settings.min_window < self._settings.max_window

    def use(self, outstanding: int) -> None:
        """Record the number of running requests. The window grows only after it was full."""
        self._used = max(self._used, outstanding)

    def observe(self, load: Load) -> None:
        """Adapt to the server's load since the last call."""
        last = self._last
        if last is None or load.finished < last.finished:  # the first observation, or the first after a restart
            last = Load(0.0, load.finished, load.delay_s)
        self._last, used, self._used = load, self._used, 0
        finished = load.finished - last.finished
        self._settling = max(0.0, self._settling - finished)
        delay = (load.delay_s - last.delay_s) / finished if finished else 0.0
        overloaded = load.waiting > self._settings.queue_target or delay > self._settings.prefill_queue_target
        if overloaded and not self._settling:
            # Requests sent before still report the larger window's delays, which must not shrink it again.
            self._settling = float(used)
            self._size = max(float(self._settings.min_window), self._size * _SHRINK)
        elif not overloaded and used >= self.size:
            self._size = min(float(self._settings.max_window), self._size + _STEP)


def _total(metrics: str, name: str) -> float | None:
    """Sum of a metric over all of its labels; None if there is none of this name."""
    found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)", metrics, re.MULTILINE)
    try:
        return sum(map(float, found)) if found else None
    except ValueError:
        raise ReplicaUnsuitable(f"/metrics has a {name} that is not a number: {', '.join(found):.100}") from None
