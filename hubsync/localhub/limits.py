"""The request limit of the Hub: so many API calls in a fixed window, reported in the headers of every answer."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping


class RateLimit:
    """Allows `calls` in each window of `seconds`. Thread-safe.

    Headers are those of huggingface.co: `RateLimit: "api";r=<calls left>;t=<seconds to the next window>` and
    `RateLimit-Policy: "fixed window";"api";q=<calls>;w=<seconds>`.
    """

    def __init__(self, calls: int, seconds: float) -> None:
        self._calls, self._seconds = calls, seconds
        self._lock = threading.Lock()
        self._left, self._end = calls, 0.0

    def take(self) -> tuple[bool, Mapping[str, str]]:
        """Whether the next call is allowed, and the headers of its answer."""
        with self._lock:
            now = time.monotonic()
            if now >= self._end:
                self._left, self._end = self._calls, now + self._seconds
            allowed = self._left > 0
            self._left -= allowed
            reset = math.ceil(self._end - now)
            return allowed, {
                "RateLimit": f'"api";r={self._left};t={reset}',
                "RateLimit-Policy": f'"fixed window";"api";q={self._calls};w={self._seconds:.0f}',
            }
