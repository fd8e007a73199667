"""The background half of a publisher: encode, upload, commit, and only then move the baseline.

There is one job at a time. A job that fails leaves the snapshot where it was, so the next detection finds its
changes again.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hubsync.chain import ChainWriter
from hubsync.errors import ChainError, ConfigError
from hubsync.manifest import Manifest, Position
from hubsync.parts import write_anchor, write_delta
from hubsync.patch import Patch, changed
from hubsync.weights import ViewBits

from .detection import Detected, Snapshot
from .level import LevelChooser

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """One finished publish.

    Attributes:
        position: version and digest of the published view.
        step: the trainer's step.
        changed: elements that differ from the version before; 0 if nothing changed and no version was made.
        total: elements of the view.
        payload_bytes: bytes uploaded for this version (without manifest and head).
        dense_bytes: bytes of the whole view.
        encoding: codec level of the version, "fast" or "compact"; empty if none was made.
        detect_s: seconds of the training thread.
        encode_s: seconds of encoding, in the background.
        upload_s: seconds until the version was durable, in the background.
    """

    position: Position
    step: int | None
    changed: int
    total: int
    payload_bytes: int
    dense_bytes: int
    encoding: str
    detect_s: float
    encode_s: float = 0.0
    upload_s: float = 0.0

    @property
    def version(self) -> int:
        return self.position.version

    @property
    def digest(self) -> str:
        return self.position.digest

    @property
    def bits_per_change(self) -> float:
        """Bits uploaded per changed element; 0 if nothing changed."""
        return 8 * self.payload_bytes / self.changed if self.changed else 0.0


class Ticket:
    """A publish under way."""

    def __init__(self, future: Future[Published]):
        self._future = future
        self.error_was_seen = False

    def done(self) -> bool:
        """Whether it has ended, either way."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Published:
        """Wait until the version is durable.

        Raises:
            TimeoutError: it is not after `timeout` seconds; it goes on.
            HubsyncError: it failed. The next publish contains the changes of this one.
        """
        try:
            return self._future.result(timeout)
        except Exception as error:
            self.error_was_seen = self._future.done() and error is self._future.exception()
            raise


class Publisher:
    """Owns the chain writer, the snapshot and the one background thread.

    Args:
        side_files: writes the files that an anchor holds beside its weights into a directory.
        level: says how versions are encoded.
        anchor_every: commit an anchor after each so many versions; 0 for never.
        announce: called in the background with every version that has become durable.
    """

    def __init__(
        self,
        writer: ChainWriter,
        snapshot: Snapshot,
        side_files: Callable[[Path], None],
        level: LevelChooser,
        anchor_every: int = 0,
        announce: Callable[[Position], None] = lambda position: None,
    ):
        self.writer = writer
        self.snapshot = snapshot
        self._side_files = side_files
        self._level = level
        self._old = ViewBits(snapshot.table, snapshot.tensors())  # the snapshot moves in place, after a commit
        self._anchor_every = anchor_every
        self._announce = announce
        self._anchored: Manifest | None = None
        self._versions_since_anchor = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hubsync-publisher")
        self._last: Ticket | None = None
        self._anchoring: Future[None] | None = None
        self._committing: tuple[Position, Detected] | None = None  # what the snapshot moves to if it was durable

    def wait(self) -> None:
        """Wait for the job under way; raises its error unless its ticket has told it already."""
        try:
            if self._last is not None and not self._last.error_was_seen:
                self._last.result()
            if self._anchoring is not None:
                self._anchoring.result()
        finally:  # also on the way out of a KeyboardInterrupt, after which the job still goes on
            if self._last is not None and self._last.done():
                self._last = None

    def settle(self) -> None:
        """Find out what became of a commit whose outcome is unknown. Call it while no job is under way."""
        manifest = self.writer.settle()
        if manifest is not None and self._committing is not None and self._committing[0] == manifest.position:
            self.snapshot.advance(self._committing[1])
        self._committing = None

    def submit(
        self, detected: Detected, step: int | None, name: str | None, detect_s: float, serve: bool = True
    ) -> Ticket:
        """Publish what was detected, in the background. Call it while no job is under way, after `settle`.

        Args:
            serve: let replicas serve the version; else it is only saved.
        """
        self._last = Ticket(self._thread.submit(self._publish, detected, step, name, detect_s, serve))
        if self._anchor_every:  # a job of its own: the version is durable, and its ticket done, before the anchor
            self._anchoring = self._thread.submit(self._anchor_if_due, step, name)
        return self._last

    def unchanged(self, step: int | None, detect_s: float) -> Ticket:
        """The ticket of a publish that found nothing to do."""
        future: Future[Published] = Future()
        future.set_result(self._published(self.writer.position, step, 0, 0, "", detect_s))
        return Ticket(future)

    def anchor(self, at: Position | None = None, *, step: int | None = None, name: str | None = None) -> Manifest:
        """Commit an anchor of the snapshot, in the calling thread. Call it while no job is under way.

        Args:
            at: a new position, to begin the chain anew; default is the current one.
        """
        at = at or self.writer.position
        if self._anchored is not None and self._anchored.position == at:
            return self._anchored
        try:
            with tempfile.TemporaryDirectory(prefix="hubsync-anchor-") as directory:
                self._side_files(Path(directory))
                write_anchor(Path(directory), self.snapshot.table, self.snapshot.tensors())
                self._anchored = self.writer.commit_anchor(Path(directory), at=at, step=step, name=name)
        except OSError as error:
            size = self.snapshot.table.nbytes / 1e9
            raise ConfigError(
                f"cannot write the whole model ({size:.1f} GB) before its upload: {error}; "
                "point TMPDIR to a directory with room for it"
            ) from error
        self._versions_since_anchor = 0
        return self._anchored

    def close(self) -> None:
        """Wait for the thread to end; errors of its last job are not raised here."""
        self._thread.shutdown(wait=True)

    def publish_patch(self, patch: Patch, digest: str, *, name: str | None = None) -> Manifest:
        """Commit a patch of the current position, after which the view is the snapshot. In the calling thread."""
        writer = self.writer
        position = Position(writer.next_version, digest)
        part = write_delta(
            self.snapshot.table, patch, run_id=writer.run.run_id, parent=writer.position, position=position
        )
        return writer.commit_delta([part], digest=digest, changed=changed(patch), name=name)

    def _publish(
        self, detected: Detected, step: int | None, name: str | None, detect_s: float, serve: bool
    ) -> Published:
        writer = self.writer
        if detected.before.hex != writer.position.digest:
            # Only after an interrupt at the worst moment, which let this be detected beside another job.
            raise ChainError(f"these changes are not ones of {writer.position}: publish again")
        started = time.perf_counter()
        position = Position(writer.next_version, detected.digest.hex)
        level = self._level.choose()
        part = write_delta(
            self.snapshot.table,
            detected.patch,
            run_id=writer.run.run_id,
            parent=writer.position,
            position=position,
            old=self._old if level == "compact" else None,
        )
        encoded = time.perf_counter()
        self._committing = position, detected
        writer.commit_delta(
            [part],
            digest=position.digest,
            changed=detected.changed,
            step=step,
            name=name,
            encoding=level,
            serve=serve,
        )
        self.snapshot.advance(detected)
        self._committing = None
        self._versions_since_anchor += 1
        durable = time.perf_counter()
        self._level.learn(level, detected.changed, len(part), encoded - started, durable - encoded)
        if serve:
            self._announce(position)
        return self._published(
            position, step, detected.changed, len(part), level, detect_s, encoded - started, durable - encoded
        )

    def _anchor_if_due(self, step: int | None, name: str | None) -> None:
        if self._versions_since_anchor < self._anchor_every:
            return
        try:
            self.anchor(step=step, name=name)
        except Exception as error:  # of the bucket, of the local disk, of whatever writes the side files
            logger.warning("could not upload the whole model, trying again after the next version: %s", error)

    def _published(
        self,
        position: Position,
        step: int | None,
        changed: int,
        payload_bytes: int,
        encoding: str,
        detect_s: float,
        encode_s: float = 0.0,
        upload_s: float = 0.0,
    ) -> Published:
        table = self.snapshot.table
        return Published(
            position, step, changed, table.numel, payload_bytes, table.nbytes, encoding, detect_s, encode_s, upload_s
        )
