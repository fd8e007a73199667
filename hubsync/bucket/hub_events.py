"""Hear of changes in a bucket by the Hub's event stream (`GET /api/buckets/<id>/events`, server-sent events).

The client is a private module of huggingface_hub. Where it is missing or has another form, and where the Hub does not
serve the stream, nothing is heard and pauses last their full time. Streams begin without a position: whatever happened
while there was none is covered by a report when one is ready.
"""

from __future__ import annotations

import inspect
import logging
import random
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

from hubsync.errors import HubsyncError

from .changes import Changes
from .hub_api import HubApi
from .redaction import redacted

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0  # before a stream is opened again; twice that after each one that was never ready
LONGEST_PAUSE_S = 300.0
UNSERVED_PAUSE_S = 600.0  # after an answer that the stream cannot be followed: not served, or not with this token
_PARAMETERS = ["endpoint", "bucket_id", "token", "resume", "should_stop"]

Stream = Callable[[Callable[[], bool]], Iterator[Any]]


def stream_of(api: HubApi) -> Stream | None:
    """Opens the event stream of a bucket, until its argument returns true. None if this huggingface_hub cannot."""
    try:
        from huggingface_hub import _bucket_live_follow as client

        follow = client._follow_events
        if list(inspect.signature(follow).parameters) != _PARAMETERS:
            return None
    except (ImportError, AttributeError, TypeError, ValueError):
        return None

    def stream(ended: Callable[[], bool]) -> Iterator[Any]:
        events: Iterator[Any] = follow(api.endpoint, api.place.bucket, api.token_or_false(), None, ended)
        return events

    return stream


class HubChanges(Changes):
    """Reports changes of some names of a bucket, and each (re)opening of its event stream.

    Args:
        stream: opens the stream; see `stream_of`.
        names: full names; one that ends with "/" stands for all below it.
    """

    def __init__(self, stream: Stream, names: Collection[str]):
        super().__init__()
        self._stream = stream
        self._names = frozenset(name for name in names if not name.endswith("/"))
        self._below = tuple(name for name in names if name.endswith("/"))
        self._ready = False
        threading.Thread(target=self._listen, name="hubsync-events", daemon=True).start()

    @property
    def live(self) -> bool:
        return self._ready

    def _listen(self) -> None:
        """Follow one stream after the other until `close`. A stream that is silent then is left within 90 s."""
        useless = 0
        while not self._closed.is_set():
            pause = FIRST_PAUSE_S
            try:
                useless = 0 if self._follow() else useless + 1
                pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(useless, 16))
            except Exception as error:  # a private client of another library: whatever it raises, the poll goes on
                useless += 1
                unserved = type(error).__name__ == "BucketEventsUnavailable"
                pause = UNSERVED_PAUSE_S if unserved else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(useless, 16))
                said = str(error) if isinstance(error, HubsyncError) else f"{type(error).__name__}: {error}"
                logger.info("no event stream of the Hub for %.0f s: %s", pause, redacted(said))
            finally:
                self._ready = False
            self._closed.wait(pause * random.uniform(0.75, 1.25))

    def _follow(self) -> bool:
        """Follow one stream until it ends. Returns whether it was ready."""
        ready = False
        for event in self._stream(self._closed.is_set):
            kind = type(event).__name__
            if kind == "_Ready":
                self._ready = ready = True
                self.report()
            elif kind == "_Changes" and any(self._concerns(change.path) for change in event.changes):
                self.report()
            elif kind == "_Reconnect":  # the Hub ends the stream
                return True
            if self._closed.is_set():
                break
        return ready

    def _concerns(self, path: object) -> bool:
        return isinstance(path, str) and (path in self._names or path.startswith(self._below))
