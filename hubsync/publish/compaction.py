"""Merging deltas in the publishing process, like `hubsync compact --watch` in another one.

Merging runs in a separate thread of the lowest priority, between publishes: a merged delta that is under way when a
publish starts is finished, and the next one waits. A failure only costs late servers bytes, so it is logged once and
retried after the next version.

Merging a compact delta needs the weights of its parent, or its patch. The publisher has made the patch, so the last few
patches are kept until they are merged into fast deltas.
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

_KEPT = (
    4  # patches, about 10 bytes for each changed element: spans of 4 start anywhere, longer ones are merged from these
)
_LOWEST = 19  # priority on Unix
_END_S = 10.0  # wait for the merged delta under way when the engine is closed; then it is abandoned


class BackgroundCompactor:
    """Merges the deltas of a growing run, on rank 0."""

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
        """While entered, no merged delta is started: a publish is under way."""
        self._idle.clear()
        try:
            yield
        finally:
            self._idle.set()

    def add(self, position: Position, patch: Patch | None) -> None:
        """Count a version that has become durable, with its patch if it is a compact delta."""
        if patch is not None:
            self._patches[position] = patch
            for old in list(self._patches)[:-_KEPT]:
                del self._patches[old]
        self._due.set()
        if self._thread.ident is None and not self._stopped:
            self._thread.start()

    def close(self) -> None:
        """Stop. The next trainer or `hubsync compact` merges the remaining deltas."""
        self._stopped = True
        self._due.set()
        self._idle.set()
        if self._thread.is_alive():
            self._thread.join(_END_S)

    def _work(self) -> None:
        _lower_priority()
        try:
            with tempfile.TemporaryDirectory(prefix="hubsync-compact-", ignore_cleanup_errors=True) as cache:
                compactor = Compactor(self._bucket, ChainReader(self._bucket, cache), patches=self._patches)
                while not self._stopped:
                    self._due.wait()
                    self._due.clear()
                    self._merge(compactor)
        except OSError as error:  # no temporary directory
            logger.warning("cannot merge deltas here, run `hubsync compact --watch` elsewhere: %s", error)

    def _merge(self, compactor: Compactor) -> None:
        try:
            self._idle.wait()
            if self._stopped:
                return
            for _ in compactor.run():
                self._idle.wait()
                if self._stopped:
                    return
        except Exception as error:  # of the bucket, of the local disk, of memory: training must go on
            if not self._has_failed:
                logger.warning("could not merge deltas, retrying after each version: %s", error)
            self._has_failed = True


def _lower_priority() -> None:
    """Give this thread the lowest priority, on systems where threads have priorities (Linux)."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
    except (AttributeError, OSError):
        logger.debug("the compaction thread keeps the priority of the process")
