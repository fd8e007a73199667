"""Write a run: parts, fence check, manifest, head, in this order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from hubsync.bucket.base import Bucket
from hubsync.errors import BucketUnavailable, ChainError, ConfigError, Fenced, ObjectMissing, RunMismatch
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import MAX_VERSION, Manifest, Part, Position, Run
from hubsync.format.table import TensorTable
from hubsync.format.times import Times
from hubsync.retry import Deadline

from .epochs import check_fence, next_epoch, open_epoch
from .head import HeadWriter
from .index import ChainIndex
from .layout import Layout
from .part_files import Content, anchor_sources, upload_parts
from .version_info import NO_INFO, VersionInfo
from .visible import once_visible


class ChainWriter:
    """The only writer of one epoch, made by `create` or `resume`. Not thread-safe."""

    def __init__(self, bucket: Bucket, run: Run):
        self._bucket = bucket
        self._run = run
        self._head = HeadWriter(bucket)
        self._epoch = ""
        self._position = run.origin
        self._position_epoch: str | None = None
        self._next_version = 1
        self._unknown: Manifest | None = None  # its outcome is unknown
        self._last: str | None = None  # name of the manifest committed last
        self._fresh = Deadline(0.0)  # until then it may be invisible
        self._open_epoch()

    @classmethod
    def create(cls, bucket: Bucket, run: Run) -> ChainWriter:
        """Create a run. RunMismatch if the bucket already holds one. See `creation.claimed` where names may be late.

        If `run.base.model` is None, the bucket does not hold version 0: commit an anchor of `run.origin` next.
        """
        taken = f"{bucket.address} already holds a run: resume it, or choose another prefix for a new one"
        if bucket.read([Layout.RUN]):
            raise RunMismatch(taken)
        bucket.commit(Layout.RUN, run.dumps())
        # Of two writers that create a run at once, the later write wins. The other one sees it here, or is fenced.
        data = once_visible(bucket, lambda: bucket.read([Layout.RUN]).get(Layout.RUN), Layout.RUN)
        if Run.loads(data).run_id != run.run_id:
            raise RunMismatch(taken)
        return cls(bucket, run)

    @classmethod
    def resume(cls, bucket: Bucket, table: TensorTable, *, signs: bool = False) -> ChainWriter:
        """Continue a run from its newest version, with a new epoch that fences older writers.

        Args:
            table: the tensors of this model.
            signs: whether the bucket signs documents. A run is signed from its beginning, or not at all.

        Raises:
            ObjectMissing: there is no run.
            RunMismatch: the run has another tensor table.
            ConfigError: the run is signed and the bucket does not sign.
        """
        data = bucket.read([Layout.RUN]).get(Layout.RUN)
        if data is None:
            raise ObjectMissing(f"{bucket.address} holds no run to resume (no {Layout.RUN}): check the address")
        run = Run.loads(data)
        if run.public_key is not None and not signs:
            raise ConfigError(f"the run in {bucket.address} is signed: continue it with the same signing_key")
        if run.table != table:
            raise RunMismatch(
                f"the run in {bucket.address} belongs to another model: {_first_difference(run.table, table)}. "
                "Choose another prefix for a new run"
            )
        writer = cls(bucket, run)
        # What we read at first may have been deleted or replaced before. It is visible now, as our epoch is.
        data = bucket.read([Layout.RUN]).get(Layout.RUN) if bucket.lag else data
        if data is None or Run.loads(data).run_id != run.run_id:
            raise RunMismatch(f"the run in {bucket.address} was deleted or replaced a moment ago: start again")
        return writer

    @property
    def run(self) -> Run:
        return self._run

    @property
    def epoch(self) -> str:
        return self._epoch

    @property
    def position(self) -> Position:
        """Newest committed position: the parent of the next delta."""
        return self._position

    @property
    def newest(self) -> Manifest | None:
        """Manifest of `position`; None while the run has no manifest."""
        return self._head.newest

    @property
    def next_version(self) -> int:
        """Number of the next version. Not always `position.version + 1`: see `open_epoch`."""
        return self._next_version

    @property
    def serving(self) -> int:
        """The version that replicas serve."""
        return self._head.served

    def serve(self, version: int) -> Position:
        """Let replicas serve a committed version: an older one (rollback), or one that was only saved so far.

        Changes only the head: `position` stays, and the next delta follows it.

        Raises:
            ChainError: the version does not exist.
            Fenced: another writer has taken over.
            BucketError: the head may or may not have been written; the next commit writes it again.
        """
        self.check_fence()
        position = self._committed(version)
        if self._head.newest is not None:  # else version 0, which is served until there is a manifest
            self._head.serve(version)
        return position

    def check_fence(self) -> None:
        """Fenced if another writer has taken over. One listing."""
        check_fence(self._bucket, self._epoch, None if self._fresh.passed else self._last)

    def settle(self) -> Manifest | None:
        """Find out whether the last manifest was committed. Call this before preparing a version.

        Does nothing unless the outcome of the last manifest is unknown. In that case it opens a new epoch, which fences
        the lost write. If the version was committed after all, `position` moves to it and its manifest is returned.
        """
        if self._unknown is None:
            return None
        lost, before = self._unknown, self._position
        self.check_fence()
        self._open_epoch()
        self._unknown = None
        if self._position == before:
            return None
        if self._position != lost.position:
            raise Fenced(
                f"another publisher has continued {self._bucket.address} to {self._position}: this one must stop"
            )
        return lost

    def commit_delta(
        self,
        files: Sequence[Content],
        *,
        digest: str,
        changed: int,
        encoding: Encoding = Encoding.FAST,
        absolute: int = 0,
        info: VersionInfo = NO_INFO,
    ) -> Manifest:
        """Commit version `next_version`. Returns when its manifest is durable.

        Args:
            files: one file (or its bytes) per publisher rank, made by `write_delta`.
            digest: of the view at the new version (32 hex digits).
            changed: number of changed elements.
            encoding: of the files.
            absolute: number of tensors with new values instead of changes.
            info: facts recorded with the version.

        Raises:
            Fenced: another writer has taken over.
            BucketUnavailable: the outcome is unknown; `settle` finds out.
            BucketError: nothing was committed.
        """
        draft = self.draft_delta(digest=digest, changed=changed, encoding=encoding, absolute=absolute, info=info)
        uploaded = (upload_parts(self._bucket, draft, [file], rank) for rank, file in enumerate(files))
        return self.commit_draft(draft, [part for parts in uploaded for part in parts])

    def commit_anchor(self, directory: Path, *, at: Position, info: VersionInfo = NO_INFO) -> Manifest:
        """Commit an anchor: the model shards and side files of `directory`. Other files are left out.

        `at` is the current position. To continue with unrelated weights, it is a new position with `next_version`: the
        chain restarts there, and replicas serve it unless `info.serve` is False. Raises as `commit_delta`.
        """
        draft = self.draft_anchor(at=at, info=info)
        return self.commit_draft(draft, upload_parts(self._bucket, draft, anchor_sources(directory)))

    # --- several ranks: each uploads its parts of a draft (`upload_parts`), then one of them commits it -----

    def draft_delta(
        self,
        *,
        digest: str,
        changed: int,
        encoding: Encoding = Encoding.FAST,
        absolute: int = 0,
        info: VersionInfo,
    ) -> Manifest:
        """The manifest of version `next_version`, without parts. Writes nothing."""
        if not info.serve:
            self._head.reread()
        return self._draft(
            "delta",
            Position(self._next_version, digest),
            info,
            changed=changed,
            encoding=encoding,
            absolute=absolute,
            serve=None if info.serve else self._head.served,
        )

    def draft_anchor(self, *, at: Position, info: VersionInfo) -> Manifest:
        """The manifest of an anchor at `at` (see `commit_anchor`), without parts. Writes nothing."""
        if at != self._position and at.version != self._next_version:
            raise ChainError(
                f"an anchor is of the current {self._position} or the next {self._next_version}, not of {at}"
            )
        restarts = at != self._position
        draft = self._draft(
            "anchor",
            at,
            info,
            changed=0,
            encoding=Encoding.DENSE,
            serve=None if (info.serve and restarts) or self._head.served == at.version else self._head.served,
        )
        if restarts:
            # Unlike deltas, files of an anchor have no hash in their names: a second try must use other names.
            self._next_version += 1
        return draft

    def commit_draft(self, draft: Manifest, parts: Sequence[Part], times: Times | None = None) -> Manifest:
        """Commit a draft whose parts are durable. Returns and raises as `commit_delta`."""
        manifest = replace(draft, parts=tuple(parts), times=times)
        data = manifest.dumps()
        Manifest.loads(data)  # raises if readers would reject it
        advances = manifest.position != self._position
        documents = {Layout.manifest(manifest): data}
        if advances:
            documents[Layout.HEAD] = self._head.drafted(manifest)
        with ThreadPoolExecutor(1) as background:  # both are round trips, and neither makes anything visible
            stored = background.submit(self._bucket.expect, documents)
            self.check_fence()
            stored.result()
        self._unknown = manifest  # until the outcome is known: KeyboardInterrupt may come at any time
        try:
            self._bucket.commit(Layout.manifest(manifest), data)
        except Exception as error:
            if not isinstance(error, BucketUnavailable):
                self._unknown = None
            raise
        self._last, self._fresh = Layout.manifest(manifest), Deadline(self._bucket.lag)
        if advances:
            self._position, self._position_epoch = manifest.position, self._epoch
            self._next_version = manifest.version + 1
            self._head.advance(manifest)
        self._unknown = None
        if self._head.behind:
            self._head.write()
        return manifest

    def _draft(self, kind: str, position: Position, info: VersionInfo, **fields: Any) -> Manifest:
        if self._unknown is not None:
            raise ChainError("the outcome of the last commit is unknown: call settle() first")
        if position.version > MAX_VERSION:
            raise ChainError(f"a run has at most {MAX_VERSION} versions: start a new one under another prefix")
        delta = kind == "delta"
        return Manifest(
            kind=kind,
            run_id=self._run.run_id,
            table_hash=self._run.table.hash,
            epoch=self._epoch,
            position=position,
            parent=self._position if delta else None,
            parent_epoch=self._position_epoch if delta else None,
            parts=(),
            created=time.time(),
            step=info.step,
            name=info.name,
            expires=info.expires,
            **fields,
        )

    def _committed(self, version: int) -> Position:
        if version == 0:
            return self._run.origin
        if version == self._position.version:
            return self._position
        chain = ChainIndex(self._bucket, self._run)
        chain.survey()
        manifest = chain.at_version(version)
        if manifest is None:
            raise ChainError(
                f"version {version} is not in {self._bucket.address}, so it cannot be served; `hubsync ls` "
                "lists the versions"
            )
        return manifest.position

    def _open_epoch(self) -> None:
        # The name is set first: if opening it fails half-way, it must not fence this writer.
        self._epoch = next_epoch(self._bucket)
        opened = open_epoch(self._bucket, self._run, self._epoch)
        if opened.highest != self._epoch:  # opened at the same time, or invisible until now
            self._epoch = next_epoch(self._bucket, above=opened.highest)
            opened = open_epoch(self._bucket, self._run, self._epoch)
        self._position, self._position_epoch = opened.position, opened.position_epoch
        self._next_version = opened.next_version
        self._head.repair(opened.newest)


def _first_difference(run: TensorTable, ours: TensorTable) -> str:
    for theirs, mine in zip(run, ours, strict=False):
        if theirs != mine:
            return (
                f"it has {theirs.name} {theirs.dtype}{list(theirs.shape)} where this model has "
                f"{mine.name} {mine.dtype}{list(mine.shape)}"
            )
    longer, owner = (run, "the run") if len(run) > len(ours) else (ours, "this model")
    return f"only {owner} has {longer[min(len(run), len(ours))].name}"
