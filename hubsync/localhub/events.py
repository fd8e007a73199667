"""The event stream of buckets: what each batch changed, as server-sent events that huggingface_hub's client parses.

Modelled after that client (`huggingface_hub/_bucket_live_follow.py`), not after the real service.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PING_S = 30.0  # seconds without an event after which a stream shows that it lives
_KEPT = 1000  # batches that can be replayed


@dataclass(frozen=True)
class _Batch:
    number: int
    bucket: str
    time: str  # ISO 8601
    changes: list[dict[str, Any]]

    @property
    def event(self) -> bytes:
        return _event("changes", {"cursor": str(self.number), "changes": self.changes})


class Events:
    """Changes of all buckets since the Hub was started, and the streams that follow them. Thread-safe."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._batches: deque[_Batch] = deque(maxlen=_KEPT)
        self._number = 0  # of the last batch
        self._ended = 0  # how often all streams were ended

    def publish(self, bucket: str, time: str, changes: list[dict[str, Any]]) -> None:
        """Tell the streams of a bucket what a batch has changed."""
        with self._news:
            self._number += 1
            self._batches.append(_Batch(self._number, bucket, time, changes))
            self._news.notify_all()

    def end_streams(self) -> None:
        """End all streams, as a service does that is restarted."""
        with self._news:
            self._ended += 1
            self._news.notify_all()

    def stream(self, bucket: str, query: Mapping[str, str]) -> Iterator[bytes]:
        """One stream: batches after `cursor` or `since`, `ready`, then batches as they come, until it is ended."""
        with self._news:
            ended, last, first = self._ended, self._number, self._first(query)
            replayed = [] if first is None else self._after(bucket, first)
        if first is None:
            yield _event("reset", {"reason": "the resume point is older than what is kept"})
            return
        yield from (batch.event for batch in replayed)
        yield _event("ready", {"cursor": str(last)})
        while True:
            with self._news:
                waiting = self._ended == ended and not self._after(bucket, last)
                if waiting:
                    self._news.wait(PING_S)
                fresh, over = self._after(bucket, last), self._ended != ended
            yield from (batch.event for batch in fresh)
            last = fresh[-1].number if fresh else last
            if over:
                yield _event("reconnect", {"cursor": str(last)})
                return
            if not fresh:
                yield b": ping\n\n"

    def _first(self, query: Mapping[str, str]) -> int | None:
        """The number of the last batch that a client knows; None if later ones are lost."""
        if (since := query.get("since")) is not None:
            return next((batch.number - 1 for batch in self._batches if batch.time >= since), self._number)
        cursor = query.get("cursor", str(self._number))
        oldest = self._batches[0].number if self._batches else self._number + 1
        known = int(cursor) if cursor.isdecimal() else -1
        return known if oldest - 1 <= known <= self._number else None

    def _after(self, bucket: str, number: int) -> list[_Batch]:
        return [batch for batch in self._batches if batch.number > number and batch.bucket == bucket]


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
