"""The background half of a publisher: encode, upload, commit, and only then move the baseline.

There is one job at a time. A job that fails leaves the snapshot where it was, so the next detection finds its
changes again. Where several ranks train, each has a publisher, and their jobs are one: every rank encodes and uploads
what it owns, rank 0 commits when all parts are durable, and all learn the same outcome before any moves on.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hubsync.chain import VersionInfo
from hubsync.chain.version_info import NO_INFO
from hubsync.chain.writer import anchor_sources
from hubsync.errors import BucketError, ChainError
from hubsync.format.digest import Digest
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Manifest, Part, Position
from hubsync.format.parts import write_delta
from hubsync.format.patch import Patch, changed
from hubsync.format.view_bits import ViewBits
from hubsync.publish.detect.base import Detected, Detector
from hubsync.publish.view.shards import Shard

from .anchors import write_own_files
from .compaction import BackgroundCompactor
from .rank_writer import JointWriter
from .ranks import Ranks

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 5 << 30  # of an anchor


@dataclass(frozen=True)
class RankShare:
    """What one rank did for a version.

    Attributes:
        rank: its number.
        changed: elements that differ, of those it owns.
        payload_bytes: bytes it uploaded.
        detect_s, encode_s: seconds, as in `Published`.
        upload_s: seconds of its own upload, without the wait for other ranks and for the commit.
    """

    rank: int
    changed: int
    payload_bytes: int
    detect_s: float
    encode_s: float
    upload_s: float


@dataclass(frozen=True)
class Published:
    """One finished publish.

    Attributes:
        position: version and digest of the published view.
        step: the trainer's step.
        changed: elements that differ from the version before, all of them if the whole model had to be uploaded; 0 if
            nothing changed and no version was made.
        total: elements of the view.
        payload_bytes: bytes uploaded for this version (without manifest and head).
        dense_bytes: bytes of the whole view.
        encoding: of the version, dense for a whole model; None if none was made.
        detect_s: seconds of the training thread.
        encode_s: seconds of encoding, in the background.
        upload_s: seconds until the version was durable, in the background.
        ranks: the share of each rank; seconds above are those of this rank.
    """

    position: Position
    step: int | None
    changed: int
    total: int
    payload_bytes: int
    dense_bytes: int
    encoding: Encoding | None
    detect_s: float
    encode_s: float = 0.0
    upload_s: float = 0.0
    ranks: tuple[RankShare, ...] = ()

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
        except BaseException as error:  # what ended the job, or an interrupt of the wait for it
            self.error_was_seen = self._future.done() and error is self._future.exception()
            raise


class Publisher:
    """Owns the chain writer, the snapshot and the one background thread.

    Args:
        side_files: writes the files that an anchor holds beside its weights into a directory.
        level: says how versions are encoded.
        anchor_every: commit an anchor after each so many versions; 0 for never.
        anchor_fraction: commit an anchor once catching up from the last one costs more than this fraction of its bytes;
            0 for never.
        catch_up: bytes that catching up from a position costs; asked in the background, when deltas alone cost more.
        copy_base: makes the parts of an anchor of version 0 without an upload; None if that is not possible.
        compactor: merges deltas between publishes; None on other ranks than 0, and where nobody wants that.
        announce: called in the background with every version that has become durable, on rank 0.
        ranks: those of the training thread. `begin`, `submit` and `anchor` are called by all of them, in one order.
        division: rank -> what it owns of each tensor.
    """

    def __init__(
        self,
        writer: JointWriter,
        snapshot: Detector,
        side_files: Callable[[Path], None],
        encoding: Encoding,
        *,
        anchor_every: int,
        anchor_fraction: float,
        catch_up: Callable[[Position], int],
        announce: Callable[[Position], None],
        copy_base: Callable[[Manifest], tuple[Part, ...] | None],
        compactor: BackgroundCompactor | None,
        ranks: Ranks,
        division: Sequence[Sequence[Shard]],
    ):
        self.writer = writer
        self.snapshot = snapshot
        self._side_files = side_files
        self._encoding = encoding
        self._ranks = ranks
        self._background = ranks.apart()
        self._division = division
        self._anchor_every = anchor_every
        self._anchor_fraction = anchor_fraction
        self._catch_up = catch_up
        self._anchored_at = writer.position  # of an older run's last anchor nothing is known
        self._bytes_since_anchor = 0
        self._announce = announce
        self._copy_base = copy_base
        self._compactor = compactor
        self._anchored: Manifest | None = None
        self._versions_since_anchor = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hubsync-publisher")
        self._closed = False
        self._process = os.getpid()
        self._last: Ticket | None = None
        self._anchoring: Future[None] | None = None
        self._committing: tuple[Position, Detected] | None = None  # what the snapshot moves to if it was durable
        self._wait_until_idle()  # the thread begins here: where an interrupt meets that, two of them could

    def wait(self) -> None:
        """Wait for the job under way; raises its error unless its ticket has told it already."""
        try:
            self._wait_until_idle()
            if self._last is not None and not self._last.error_was_seen:
                self._last.result()
            if self._anchoring is not None:
                self._anchoring.result()
        finally:  # also on the way out of a KeyboardInterrupt, after which the job still goes on
            if self._last is not None and self._last.done():
                self._last = None

    def _wait_until_idle(self) -> None:
        """Also for a job that nobody has a ticket of: a KeyboardInterrupt may come when it has begun, and before that.

        Beside such a job nothing may be detected or committed. In a fork there is no thread to wait for.
        """
        if not self._closed and os.getpid() == self._process:
            self._thread.submit(lambda: None).result()

    def begin(self) -> None:
        """Get ready for the next job: `wait` on all ranks, and find out what became of an unknown commit."""
        self._ranks.together(self.wait)
        self.writer.settle(self._ranks)
        if self._committing is not None and self._committing[0] == self.writer.position:
            self.snapshot.advance(self._committing[1])
        self._committing = None

    def submit(
        self,
        detected: Detected,
        info: VersionInfo,
        detect_s: float,
    ) -> Ticket:
        """Publish what was detected, in the background. Call it while no job is under way, after `begin`."""
        publish = partial(self._publish, detected, info, detect_s)
        self._last = Ticket(self._thread.submit(self._before_merging, publish, detected))
        if (
            self._anchor_every or self._anchor_fraction
        ):  # a job of its own: the version is durable, and its ticket done, before the anchor
            self._anchoring = self._thread.submit(self._anchor_if_due, info)
        return self._last

    def unchanged(self, step: int | None, detect_s: float) -> Ticket:
        """The ticket of a publish that found nothing to do. Fenced if another publisher goes on from elsewhere."""
        self.writer.check_fence(self._ranks)
        future: Future[Published] = Future()
        future.set_result(self._published(self.writer.position, step, 0, 0, None, detect_s))
        return Ticket(future)

    def anchored(self, manifest: Manifest, info: VersionInfo, detect_s: float) -> Ticket:
        """The ticket of a publish that had to be of the whole model."""
        if info.serve and self._ranks.rank == 0:
            self._announce(manifest.position)
        total = self.snapshot.table.numel
        future: Future[Published] = Future()
        future.set_result(
            self._published(manifest.position, info.step, total, manifest.nbytes, manifest.encoding, detect_s)
        )
        return Ticket(future)

    def anchor(self, at: Position | None = None, info: VersionInfo = NO_INFO) -> Manifest:
        """Commit an anchor of the snapshot, in the calling thread. Call it while no job is under way.

        Args:
            at: a new position, to begin the chain anew; default is the current one.
            info: recorded with the anchor.
        """
        at = at or self.writer.position
        if self._anchored is not None and self._anchored.position == at:
            return self._anchored
        is_base = at == self.writer.position == self.writer.run.origin
        copied = self._commit_copy(at, info) if is_base else None
        return copied or self._commit_anchor(self._ranks, at, info)

    def _commit_copy(self, at: Position, info: VersionInfo) -> Manifest | None:
        """Commit an anchor of version 0 that the storage has copied from the base model; None if it cannot."""
        draft = self.writer.draft_anchor(self._ranks, at=at, info=info)
        parts = self._ranks.first(lambda: self._copy_base(draft))
        if parts is None:
            return None
        self._anchored = self.writer.commit(self._ranks, draft, parts)
        return self._anchored

    def _commit_anchor(self, ranks: Ranks, at: Position, info: VersionInfo) -> Manifest:
        try:
            with tempfile.TemporaryDirectory(prefix="hubsync-anchor-") as directory:
                ranks.first(lambda: self._side_files(Path(directory)))
                stem = self.writer.run.stem
                write_own_files(Path(directory), self.snapshot, self._division, ranks, _MAX_FILE_BYTES, stem)
                draft = self.writer.draft_anchor(ranks, at=at, info=info)
                uploaded = ranks.gather(lambda: self.writer.upload(draft, anchor_sources(Path(directory))))
                self._anchored = self.writer.commit(ranks, draft, [part for parts in uploaded for part in parts])
        except OSError as error:
            size = self.snapshot.table.nbytes / 1e9
            raise BucketError(
                f"cannot write the whole model ({size:.1f} GB) before its upload: {error}; "
                "point TMPDIR to a directory with room for it"
            ) from error
        self._versions_since_anchor = self._bytes_since_anchor = 0
        self._anchored_at = at
        return self._anchored

    def close(self) -> None:
        """Wait for the thread to end; errors of its last job are not raised here."""
        self._closed = True
        self._thread.shutdown(wait=True)
        if self._compactor is not None:
            self._compactor.close()

    def publish_patch(self, patch: Patch, digest: str, info: VersionInfo) -> Manifest:
        """Commit a patch of the current position, after which the view is the snapshot. In the calling thread.

        For one rank only: it has the whole patch.
        """
        writer, ranks = self.writer, self._ranks
        draft = writer.draft_delta(ranks, digest=digest, changed=changed(patch), info=info)
        return writer.commit(ranks, draft, writer.upload(draft, [self._encoded(draft, patch)]))

    def _before_merging(self, publish: Callable[[], Published], detected: Detected) -> Published:
        """Publish, and only then have anything merged."""
        if self._compactor is None:
            return publish()
        with self._compactor.held():
            published = publish()
        self._compactor.add(published.position, detected.patch if self._encoding.needs_base else None)
        return published

    def _publish(
        self,
        detected: Detected,
        info: VersionInfo,
        detect_s: float,
    ) -> Published:
        ranks, started = self._background, time.perf_counter()
        found = ranks.gather(lambda: (detected.before, detected.digest, detected.changed))
        before = sum((before for before, _, _ in found), Digest())
        digest = sum((after for _, after, _ in found), Digest())
        if before.hex != self.writer.position.digest:
            # Only after an interrupt at the worst moment, which let this be detected beside another job.
            raise ChainError(f"these changes are not ones of {self.writer.position}: publish again")
        total = sum(count for _, _, count in found)
        draft = self.writer.draft_delta(
            ranks,
            digest=digest.hex,
            changed=total,
            encoding=self._encoding,
            info=info,
        )
        uploaded = ranks.gather(lambda: self._upload_own(draft, detected, detect_s, started))
        shares = tuple(share for share, _ in uploaded)
        self._committing = draft.position, detected
        self.writer.commit(ranks, draft, [part for _, parts in uploaded for part in parts])
        self.snapshot.advance(detected)
        self._committing = None
        self._versions_since_anchor += 1
        encode_s, payload = shares[ranks.rank].encode_s, sum(share.payload_bytes for share in shares)
        upload_s = time.perf_counter() - started - encode_s
        self._bytes_since_anchor += payload
        if info.serve and ranks.rank == 0:
            self._announce(draft.position)
        return self._published(
            draft.position, info.step, total, payload, draft.encoding, detect_s, encode_s, upload_s, shares
        )

    def _upload_own(
        self, draft: Manifest, detected: Detected, detect_s: float, started: float
    ) -> tuple[RankShare, tuple[Part, ...]]:
        """Encode what this rank changes, and make it durable. A rank that changes nothing uploads nothing."""
        files = [self._encoded(draft, detected.patch)] if detected.changes else []
        encoded = time.perf_counter()
        parts = self.writer.upload(draft, files)
        upload_s = time.perf_counter() - encoded
        nbytes = sum(part.size for part in parts)
        rank = self._ranks.rank
        return RankShare(rank, detected.changed, nbytes, detect_s, encoded - started, upload_s), parts

    def _encoded(self, draft: Manifest, patch: Patch) -> bytes:
        assert draft.parent is not None
        table = self.snapshot.table
        return write_delta(
            table,
            patch,
            run_id=draft.run_id,
            parent=draft.parent,
            position=draft.position,
            rank=self._ranks.rank,
            encoding=draft.encoding,
            old=ViewBits(table, self.snapshot.tensors()) if draft.encoding.needs_base else None,
        )

    def _anchor_if_due(self, info: VersionInfo) -> None:
        try:
            if self._background.first(self._is_anchor_due):
                again = VersionInfo(info.step, info.name)
                self._commit_anchor(self._background, self.writer.position, again)
        except Exception as error:  # of the bucket, of the local disk, of whatever writes the side files
            logger.warning("could not upload the whole model, trying again after the next version: %s", error)

    def _is_anchor_due(self) -> bool:
        if self._anchor_every and self._versions_since_anchor >= self._anchor_every:
            return True
        limit = self._anchor_fraction * self.snapshot.table.nbytes
        # Merged deltas may have made it cheaper; to find out costs calls.
        return 0 < limit < self._bytes_since_anchor and limit < self._catch_up(self._anchored_at)

    def _published(
        self,
        position: Position,
        step: int | None,
        changed: int,
        payload_bytes: int,
        encoding: Encoding | None,
        detect_s: float,
        encode_s: float = 0.0,
        upload_s: float = 0.0,
        ranks: tuple[RankShare, ...] = (),
    ) -> Published:
        table = self.snapshot.table
        return Published(
            position,
            step,
            changed,
            table.numel,
            payload_bytes,
            table.nbytes,
            encoding,
            detect_s,
            encode_s,
            upload_s,
            ranks,
        )
