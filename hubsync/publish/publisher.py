"""Publishing: detect in the training thread, then encode, upload and commit in the background.

The baseline moves only after the commit: if a job fails, the detector stays at the last durable version, and the next
detection finds the changes again. There is one job at a time. With several ranks, each has a publisher and their jobs
are one: every rank encodes and uploads the changes that it owns, rank 0 commits when all parts are durable, and all
ranks learn the same outcome before any continues.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from hubsync.chain import VersionInfo
from hubsync.chain.part_files import upload_parts
from hubsync.errors import ChainError, ConfigError
from hubsync.format.device_patch import DevicePatch
from hubsync.format.digest import Digest
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Manifest, Part, Position
from hubsync.format.parts import Transition, write_delta
from hubsync.format.patch import Patch, absolute, changed
from hubsync.format.times import Times
from hubsync.format.view_bits import ViewBits
from hubsync.publish.detect.base import Detector
from hubsync.publish.detect.changes import Detected, OnDevice
from hubsync.publish.view.division import GroupDigests
from hubsync.publish.view.live import PublishedView

from .anchors import Anchors
from .compaction import BackgroundCompactor
from .config import SyncConfig
from .rank_writer import JointWriter
from .ranks import Ranks
from .results import Phase, Published, RankShare, Ticket
from .whole_values import with_whole_values

if TYPE_CHECKING:
    from hubsync.replicas.deployment import Deployment


class Publisher:
    """Owns the chain writer, the detector and the background thread. Its methods may be called by several threads.

    Args:
        writer: writes the run.
        view: the live tensors.
        detector: finds changes of `view`.
        anchors: uploads whole models.
        ranks: ranks of the training thread. All ranks call `publish`, `serve`, `anchor` and `finish` in one order.
        config: its `encoding` and `compaction`.
        deployment: servers that stage every version as soon as it is durable; None for none.
    """

    def __init__(
        self,
        writer: JointWriter,
        view: PublishedView,
        detector: Detector,
        anchors: Anchors,
        ranks: Ranks,
        config: SyncConfig,
        deployment: Deployment | None,
    ):
        self.writer = writer
        self.detector = detector
        self.anchors = anchors
        self.ranks = ranks
        self._view = view
        self._encoding = Encoding(config.encoding) if detector.holds_old else Encoding.FAST
        self._compactor = BackgroundCompactor(writer.bucket) if config.compaction and ranks.rank == 0 else None
        self._deployment = deployment
        self._background = ranks.apart()
        self._publishing = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hubsync-publisher")
        self._closed = False
        self._process = os.getpid()
        self._last: Ticket | None = None
        self._stream: torch.cuda.Stream | None = None
        self._anchoring: Future[None] | None = None
        self._committing: tuple[Position, Detected] | None = None  # what the detector advances by if it is durable
        self._wait_until_idle()  # starts the thread here: an interrupt during a lazy start could leave two threads

    # --- in the training thread ---------------------------------------------------------------------

    def publish(self, info: VersionInfo) -> Ticket:
        """Detect changes and publish them in the background. See `DeltaWeightTransferEngine.publish`."""
        with self._turn():
            detected, has_changed, times = self._detect()
            if has_changed:
                return self._submit(detected, info, times)
            if info.serve and self.writer.serving != self.writer.position.version:
                self.writer.serve(self.ranks, self.writer.position.version)
            return self._unchanged(info.step, times)

    def serve(self, version: int) -> Position:
        """Let replicas that follow the run serve a committed version."""
        with self._turn():
            return self.writer.serve(self.ranks, version)

    def anchor(self, info: VersionInfo) -> Manifest:
        """Upload the whole model as it was last published.

        If weights were written where no change was seen, the last published view cannot be restored: they are published
        first.
        """
        with self._turn():
            detected, _, detected_at = self._detect()
            if any(self.ranks.gather(lambda: bool(detected.values))):
                self._submit(detected, info, detected_at).result()
                self._wait_until_idle()
            return self.anchors.commit(self.ranks, VersionInfo(info.step, info.name, info.serve))

    def commit_patch(self, patch: Patch, digest: str, info: VersionInfo) -> Manifest:
        """Commit a patch of the current position, in the calling thread. `digest` is the one after the patch.

        For one rank only, because it needs the whole patch.
        """
        writer, ranks = self.writer, self.ranks
        draft = writer.draft_delta(ranks, digest=digest, changed=changed(patch), absolute=absolute(patch), info=info)
        return writer.commit(ranks, draft, upload_parts(writer.bucket, draft, [self._encoded(draft, patch)]))

    def wait(self) -> None:
        """Wait for the job under way. Raises its error, unless the job's ticket has raised it."""
        try:
            self._wait_until_idle()
            if self._last is not None and not self._last.error_was_seen:
                self._last.result()
            if self._anchoring is not None:
                self._anchoring.result()
        finally:  # also after a KeyboardInterrupt, during which the job goes on
            if self._last is not None and self._last.done():
                self._last = None

    def finish(self, info: VersionInfo, anchor: bool) -> None:
        """Wait for the job under way. Upload the whole model if asked to."""
        self.wait()
        if anchor:
            self.anchor(info)

    def close(self) -> None:
        """Stop. Waits for the thread, but does not raise errors of its last job."""
        self._closed = True
        self.detector.close()
        self._thread.shutdown(wait=True)
        if self._compactor is not None:
            self._compactor.close()

    def _wait_until_idle(self) -> None:
        """Wait until no job runs, also one without a ticket: a KeyboardInterrupt may lose the ticket of a started job.

        Nothing may be detected or committed during a job. A forked process has no thread to wait for.
        """
        if not self._closed and os.getpid() == self._process:
            self._thread.submit(lambda: None).result()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time, with no job under way and the outcome of the last commit known."""
        if os.getpid() != self._process:
            raise ConfigError("this engine belongs to the process that this one was forked from: publish there")
        with self._publishing:
            self._settle()
            yield

    def _settle(self) -> None:
        """Wait for the last job on all ranks, and find the outcome of a commit that was interrupted."""
        self.ranks.together(self.wait)
        self.writer.settle(self.ranks)
        if self._committing is not None and self._committing[0] == self.writer.position:
            self.detector.advance(self._committing[1])
        self._committing = None

    def _detect(self) -> tuple[Detected, bool, Phase]:
        """This rank's changes, whether any rank has changes, and when this rank looked for them."""
        found: list[tuple[Detected, Phase]] = []
        division, tensors, table = self.anchors.division, self._view.tensors, self.detector.table

        def detect() -> tuple[bool, list[int], GroupDigests]:
            phase = Phase.begun()
            self.detector.begin()
            live = tensors()
            self.detector.follow(live)
            self._view.require_frozen()
            detected = self.detector.detect()
            replicated = division.replicas.digests(live, table)
            found.append((detected, phase.ended()))
            return not detected.is_empty, list(detected.values), replicated

        reports = self.ranks.gather(detect)
        division.replicas.require_equal(self.ranks, [digests for *_, digests in reports], tensors, table)
        detected, phase = found[0]
        written = {index for _, indices, _ in reports for index in indices}
        if written and detected.shards is not None:
            detected = with_whole_values(self.ranks, division.owned, self.detector, detected, written)
        return detected, any(changed for changed, *_ in reports), phase

    def _submit(self, detected: Detected, info: VersionInfo, detection: Phase) -> Ticket:
        publish = partial(self._publish, detected, info, detection)
        self._last = Ticket(self._thread.submit(self._publish_then_merge, publish, detected))
        if self.anchors.are_scheduled:
            # A separate job: the version is durable, and its ticket done, before the anchor.
            self._anchoring = self._thread.submit(self.anchors.commit_if_due, self._background, info)
        return self._last

    def _unchanged(self, step: int | None, detection: Phase) -> Ticket:
        """The ticket of a publish without changes. Fenced if another publisher has taken over the run."""
        self.writer.check_fence(self.ranks)
        table = self.detector.table
        return Ticket.finished(
            Published(self.writer.position, step, 0, table.numel, 0, table.nbytes, None, detection.seconds)
        )

    # --- in the background --------------------------------------------------------------------------

    def _publish_then_merge(self, publish: Callable[[], Published], detected: Detected) -> Published:
        """Publish, and merge deltas only afterwards."""
        if self._compactor is None:
            return publish()
        with self._compactor.held():
            published = publish()
        self._compactor.add(published.position, dict(detected.patch) if self._encoding.needs_base else None)
        return published

    def _publish(self, detected: Detected, info: VersionInfo, detection: Phase) -> Published:
        ranks = self._background
        found = ranks.gather(lambda: (detected.start, detected.digest, detected.changed, list(detected.values)))
        before = sum((before for before, _, _, _ in found), Digest())
        digest = sum((after for _, after, _, _ in found), Digest())
        if before.hex != self.writer.position.digest:
            # Only after an interrupt at the worst moment, which let this be detected during another job.
            raise ChainError(f"these changes do not start from {self.writer.position}: publish again")
        total = sum(count for _, _, count, _ in found)
        written = sorted({index for _, _, _, indices in found for index in indices})
        draft = self.writer.draft_delta(
            ranks, digest=digest.hex, changed=total, encoding=self._encoding, absolute=len(written), info=info
        )
        uploaded = ranks.gather(lambda: self._upload_own(draft, detected, detection))
        shares = tuple(share for share, _ in uploaded)
        self._committing = draft.position, detected
        times = Times.spanning([share.times for share in shares])
        self.writer.commit(ranks, draft, [part for _, parts in uploaded for part in parts], times)
        self.detector.advance(detected)
        self._committing = None
        payload, own = sum(share.payload_bytes for share in shares), shares[ranks.rank]
        self.anchors.count(payload)
        if info.serve:
            self._announce(draft.position)
        table = self.detector.table
        return Published(
            draft.position,
            info.step,
            total,
            table.numel,
            payload,
            table.nbytes,
            draft.encoding,
            detection.seconds,
            own.encode_s,
            time.time() - own.times.upload[0],
            shares,
            tuple(table[index].name for index in written),
        )

    def _upload_own(self, draft: Manifest, detected: Detected, detection: Phase) -> tuple[RankShare, tuple[Part, ...]]:
        """Encode the changes that this rank owns, and make them durable. A rank without changes uploads nothing."""
        encoding = Phase.begun()
        with self._apart_from_training(detected.on_device):
            files = [self._encoded(draft, detected.patch)] if detected.has_parts else []
        encoding = encoding.ended()
        upload = Phase.begun()
        parts = upload_parts(self.writer.bucket, draft, files, self.ranks.rank)
        times = Times(detection.ends, encoding.ends, upload.ended().ends)
        return RankShare(self.ranks.rank, detected.changed, sum(part.size for part in parts), times), parts

    def _apart_from_training(self, changes: OnDevice | None) -> AbstractContextManager[object]:
        """A stream of its own for kernels of this thread, ahead of training's: else they wait for all that is queued.

        The changes are complete: detection has waited for them.
        """
        if changes is None or changes.numbers.device.type != "cuda":
            return nullcontext()
        if self._stream is None:  # one for all publishes: every stream has memory of its own
            self._stream = torch.cuda.Stream(changes.numbers.device, priority=-1)
        return torch.cuda.stream(self._stream)

    def _encoded(self, draft: Manifest, patch: Patch | DevicePatch) -> memoryview:
        assert draft.parent is not None
        table = self.detector.table
        return write_delta(
            table,
            patch,
            Transition(draft.run_id, draft.parent, draft.position),
            rank=self.ranks.rank,
            encoding=draft.encoding,
            old=ViewBits(table, self.detector.tensors()) if draft.encoding.needs_base else None,
        )

    def _announce(self, position: Position) -> None:
        """Let the servers stage a durable version while training goes on. If that fails, `deliver` stages it."""
        if self._deployment is not None and self.ranks.rank == 0:
            self._deployment.signal(position)
