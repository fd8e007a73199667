"""Merging deltas beside a training: what `hubsync compact --watch` does, in the process that publishes.

It has a thread of its own, of the lowest priority, and works between publishes: a merged delta that is under way when a
publish begins is finished, the next one waits. What goes wrong here costs late servers bytes, and nobody else anything:
it is logged once, and tried again after the next version.

Compact deltas can only be merged by who holds the weights before them, or who has made them: the last few are kept as
patches until they are merged into fast ones.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hubsync.bucket import Bucket
from hubsync.chain import ChainReader, Compactor
from hubsync.format.manifest import Position
from hubsync.format.patch import Patch

logger = logging.getLogger(__name__)

_KEPT = 4  # patches, about 10 bytes for each changed element: spans of 4 start anywhere, longer ones are made of these
_LOWEST = 19  # of the priorities of Unix
_END_S = 10.0  # for the merged delta under way when the engine is closed; then it is left to itself


class BackgroundCompactor:
    """Makes the merged deltas of a run as it grows, on rank 0."""

    def __init__(self, bucket: Bucket):
        self._bucket = bucket
        self._patches: dict[Position, Patch] = {}
        self._idle = threading.Event()
        self._idle.set()
        self._due = threading.Event()
        self._stopped = False
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="hubsync-compactor", daemon=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Begin no merged delta in here: something is being published."""
        self._idle.clear()
        try:
            yield
        finally:
            self._idle.set()

    def add(self, position: Position, patch: Patch | None) -> None:
        """A version has become durable. Give its patch if it is coded against the weights before it."""
        if patch is not None:
            self._patches[position] = patch
            for old in list(self._patches)[:-_KEPT]:
                del self._patches[old]
        self._due.set()
        if self._thread.ident is None and not self._stopped:
            self._thread.start()

    def close(self) -> None:
        """Begin nothing more. What is not merged, the next trainer merges, or `hubsync compact`."""
        self._stopped = True
        self._due.set()
        self._idle.set()
        if self._thread.is_alive():
            self._thread.join(_END_S)

    def _work(self) -> None:
        _step_back()
        try:
            with tempfile.TemporaryDirectory(prefix="hubsync-compact-", ignore_cleanup_errors=True) as cache:
                compactor = Compactor(self._bucket, ChainReader(self._bucket, cache), patches=self._patches)
                while not self._stopped:
                    self._due.wait()
                    self._due.clear()
                    self._merge(compactor)
        except OSError as error:  # no directory to work in; nobody waits for this thread, and none replaces it
            logger.warning("no deltas are merged here, run `hubsync compact --watch` elsewhere: %s", error)

    def _merge(self, compactor: Compactor) -> None:
        try:
            self._idle.wait()
            if self._stopped:
                return
            for _ in compactor.run():
                self._idle.wait()
                if self._stopped:
                    return
        except Exception as error:  # of the bucket, of the local disk, of memory: the training goes on
            if not self._has_failed:
                logger.warning("could not merge deltas, trying again after each version: %s", error)
            self._has_failed = True


def _step_back() -> None:
    """Give this thread what others leave of the processor, where threads have priorities of their own (Linux)."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
    except (AttributeError, OSError):
        logger.debug("this thread keeps the priority of the process")
