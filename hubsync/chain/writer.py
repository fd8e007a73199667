"""Writing a run: parts, check, fence, manifest, head, in this order.

Storage has no conditional write. So every writer opens an epoch of its own, a prefix nobody else writes to, and
before each commit looks whether a newer epoch exists. Between that look and the write it may be stalled for any
time; what it then still commits lies in its own, older epoch and has a version number that nobody else uses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hubsync.bucket.base import Bucket, Upload
from hubsync.errors import (
    BucketError,
    BucketUnavailable,
    ChainError,
    ConfigError,
    Fenced,
    FormatError,
    ObjectMissing,
    RunMismatch,
)
from hubsync.format.documents import FORMAT
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import MAX_VERSION, SIDE_FILES, Head, Manifest, Part, Position, Run
from hubsync.format.table import TensorTable

from .index import ChainIndex, read_head
from .layout import MAX_EPOCH, Layout, epoch_names
from .version_info import NO_INFO, VersionInfo

logger = logging.getLogger(__name__)


class ChainWriter:
    """The one writer of one epoch; made by `create` or `resume`. Not thread-safe."""

    def __init__(self, bucket: Bucket, run: Run):
        self._bucket = bucket
        self._run = run
        self._epoch = ""
        self._position = run.origin
        self._position_epoch: str | None = None
        self._next_version = 1
        self._newest: Manifest | None = None  # what the head should say
        self._serving = 0  # and which version replicas should serve
        self._head_is_behind = False
        self._unknown: Manifest | None = None
        self._open_epoch()

    @classmethod
    def create(cls, bucket: Bucket, run: Run) -> ChainWriter:
        """Begin a run. RunMismatch if the bucket holds one already.

        If `run.base.model` is None, version 0 exists nowhere: commit an anchor of `run.origin` next.
        """
        taken = f"{bucket.address} already holds a run: resume it, or choose another prefix for a new one"
        if bucket.read([Layout.RUN]):
            raise RunMismatch(taken)
        bucket.commit(Layout.RUN, run.dumps())
        # Of two creators at the same time the later write wins, and the other one sees it here or is fenced.
        if Run.loads(bucket.read([Layout.RUN])[Layout.RUN]).run_id != run.run_id:
            raise RunMismatch(taken)
        return cls(bucket, run)

    @classmethod
    def resume(cls, bucket: Bucket, table: TensorTable, *, signs: bool = False) -> ChainWriter:
        """Continue a run with a new epoch, from its newest version. Older writers are fenced from now on.

        Args:
            signs: the bucket signs what is committed. A run is signed from its beginning, or not at all.

        ObjectMissing if there is no run; RunMismatch if it has another tensor table; ConfigError if the run is signed
        and the bucket does not sign.
        """
        data = bucket.read([Layout.RUN]).get(Layout.RUN)
        if data is None:
            raise ObjectMissing(f"{bucket.address} holds no run (no {Layout.RUN}) that could be resumed")
        run = Run.loads(data)
        if run.public_key is not None and not signs:
            raise ConfigError(f"the run in {bucket.address} is signed: continue it with the same signing_key")
        if run.table != table:
            raise RunMismatch(
                f"the run in {bucket.address} belongs to another model: {_first_difference(run.table, table)}. "
                "Choose another prefix for a new run"
            )
        return cls(bucket, run)

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
        """Manifest of `position`; None while nothing at all is committed in the run."""
        return self._newest

    @property
    def next_version(self) -> int:
        """Number of the next version. Not always `position.version + 1`: see `_open_epoch`."""
        return self._next_version

    @property
    def serving(self) -> int:
        """The version that replicas are to serve."""
        return self._serving

    def serve(self, version: int) -> Position:
        """Let replicas serve a committed version: an older one (rollback), or one that was only saved so far.

        Moves nothing but that word of the head: `position` stays, and the next delta follows it. ChainError if the
        version does not exist; Fenced if another writer has taken over. After any other BucketError the word may or
        may not be given, and the next commit repeats it.
        """
        self.check_fence()
        position = self._committed(version)
        if self._newest is None:
            return position  # version 0, which is served as long as there is nothing else
        self._serving, self._head_is_behind = version, True
        self._bucket.commit(Layout.HEAD, Head(self._newest, version, time.time()).dumps())
        self._head_is_behind = False
        return position

    def check_fence(self) -> None:
        """Fenced if another writer has taken over. One listing."""
        epochs = self._epochs()
        if epochs and epochs[-1] > self._epoch:
            raise Fenced(
                f"another publisher has taken over {self._bucket.address} (epoch {epochs[-1]}, ours is {self._epoch}): "
                "this one must stop"
            )

    def settle(self) -> Manifest | None:
        """Call this before preparing a version. Does nothing unless the outcome of the last manifest is unknown.

        Then a new epoch is opened, so that the lost write cannot come in between. If it turns out that the version
        was committed after all, `position` moves to it and its manifest is returned.
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
            raise Fenced(f"{self._bucket.address} was continued by another publisher, to {self._position}")
        return lost

    def commit_delta(
        self,
        files: Sequence[Path | bytes],
        *,
        digest: str,
        changed: int,
        encoding: Encoding = Encoding.FAST,
        info: VersionInfo = NO_INFO,
    ) -> Manifest:
        """Make version `next_version` durable: one file (or its bytes) per publisher rank, made by `write_delta`.

        Returns when the manifest is durable. Fenced if another writer has taken over; BucketUnavailable if the
        outcome is unknown (`settle` finds out); any other BucketError means that nothing was committed.
        """
        draft = self.draft_delta(digest=digest, changed=changed, encoding=encoding, info=info)
        uploaded = (upload_parts(self._bucket, draft, [file], rank) for rank, file in enumerate(files))
        return self.commit_draft(draft, [part for parts in uploaded for part in parts])

    def commit_anchor(self, directory: Path, *, at: Position, info: VersionInfo = NO_INFO) -> Manifest:
        """Make an anchor durable: the model shards and side files of `directory` (other files are left out).

        `at` is the current position; or, to go on with weights that are unrelated to it, a new one with
        `next_version`: the chain begins anew there, and replicas are to serve that unless `info.serve` is False.
        """
        draft = self.draft_anchor(at=at, info=info)
        return self.commit_draft(draft, upload_parts(self._bucket, draft, anchor_sources(directory)))

    # --- several ranks: each uploads its own parts of a draft (`upload_parts`), and then it is committed ---

    def draft_delta(
        self,
        *,
        digest: str,
        changed: int,
        encoding: Encoding = Encoding.FAST,
        info: VersionInfo,
    ) -> Manifest:
        """The manifest of version `next_version`, still without parts; nothing is written."""
        if not info.serve:
            self._heed_head()
        return self._manifest(
            "delta",
            Position(self._next_version, digest),
            info,
            changed=changed,
            encoding=encoding,
            serve=None if info.serve else self._serving,
        )

    def draft_anchor(self, *, at: Position, info: VersionInfo) -> Manifest:
        """The manifest of an anchor at `at` (see `commit_anchor`), still without parts; nothing is written."""
        if at != self._position and at.version != self._next_version:
            raise ChainError(
                f"an anchor is of the current {self._position} or the next {self._next_version}, not of {at}"
            )
        begins = at != self._position
        draft = self._manifest(
            "anchor",
            at,
            info,
            changed=0,
            encoding=Encoding.DENSE,
            serve=None if (info.serve and begins) or self._serving == at.version else self._serving,
        )
        if begins:
            # Unlike deltas, files of an anchor have no hash in their names: a second try must not meet the first.
            self._next_version += 1
        return draft

    def commit_draft(self, draft: Manifest, parts: Sequence[Part]) -> Manifest:
        """Make a draft durable, whose parts are. Returns and raises as `commit_delta`."""
        manifest = replace(draft, parts=tuple(parts))
        data = manifest.dumps()
        Manifest.loads(data)  # what no reader would accept is not written
        advances = manifest.position != self._position
        self.check_fence()
        self._unknown = manifest  # until it is known; a KeyboardInterrupt may come at any time
        try:
            self._bucket.commit(Layout.manifest(manifest), data)
        except Exception as error:
            if not isinstance(error, BucketUnavailable):
                self._unknown = None
            raise
        if advances:
            self._position, self._position_epoch = manifest.position, self._epoch
            self._next_version = manifest.version + 1
            self._newest = manifest
            self._serving = manifest.served
        self._unknown = None
        if advances or self._head_is_behind:
            self._write_head()
        return manifest

    # --- commit -------------------------------------------------------------------------------------

    def _manifest(self, kind: str, position: Position, info: VersionInfo, **fields: Any) -> Manifest:
        if self._unknown is not None:
            raise ChainError("the outcome of the last commit is unknown: call settle() first")
        if position.version > MAX_VERSION:
            raise ChainError(f"a run has at most {MAX_VERSION} versions: begin a new one under another prefix")
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
            raise ChainError(f"version {version} is not in {self._bucket.address}, so it cannot be served")
        return manifest.position

    def _write_head(self) -> None:
        if self._newest is None:
            return
        try:
            self._bucket.commit(Layout.HEAD, Head(self._newest, self._serving, time.time()).dumps())
            self._head_is_behind = False
        except BucketError as error:
            # The version is committed all the same; replicas that are told of it find it without the head.
            self._head_is_behind = True
            logger.warning(
                "%s is committed, but the head could not be written (%s): replicas that poll see it one version later",
                self._newest.position,
                error,
            )

    # --- epochs -------------------------------------------------------------------------------------

    def _epochs(self) -> list[str]:
        return list(epoch_names(stat.path for stat in self._bucket.list(Layout.EPOCHS, recursive=False)))

    def _open_epoch(self) -> None:
        """Fence older writers, then find where to go on.

        A version number is never used twice, although older writers may each have one manifest under way that is
        not visible yet: every epoch from the one of the newest version on gets one number left free for it.
        """
        epochs = self._epochs()
        number = 1 + max((int(epoch[:8]) for epoch in epochs), default=0)
        if number > MAX_EPOCH:
            raise ChainError(
                f"{self._bucket.address} has an epoch {epochs[-1]}, and none can follow it: choose another prefix"
            )
        self._epoch = f"{number:08d}-{secrets.token_hex(4)}"
        marker = {"format": FORMAT, "epoch": self._epoch, "created": time.time()}
        self._bucket.commit(Layout.epoch(self._epoch), json.dumps(marker).encode())

        chain = ChainIndex(self._bucket, self._run)
        chain.survey()
        self._newest = chain.newest()
        if self._newest is None:
            self._position, self._position_epoch = self._run.origin, None
            older = len(chain.epochs) - 1
        else:
            self._position = self._newest.position
            holders = [epoch for epoch, names in chain.epochs.items() if self._position.version in names.versions]
            self._position_epoch = holders[0] if self._position.version else None
            older = sum(holders[0] <= epoch < self._epoch for epoch in chain.epochs)
        self._next_version = self._position.version + 1 + older
        self._repair_head()

    def _repair_head(self) -> None:
        """A writer that died between manifest and head has left the head one version behind.

        What a head in order says of the version to serve stays; else the newest manifest tells.
        """
        if self._newest is None:
            self._serving = 0
            return
        said = self._said_by_head(self._newest)
        self._serving = self._newest.served if said is None else said
        if said is None:
            self._write_head()

    def _heed_head(self) -> None:
        """What is saved without serving it repeats which version is to be served: somebody may have said another."""
        if self._newest is None or self._head_is_behind:
            return
        try:
            said = self._said_by_head(self._newest)
        except BucketError:  # then what we know stays
            return
        if said is not None:
            self._serving = said

    def _said_by_head(self, newest: Manifest) -> int | None:
        """Which version a head in order says is to be served."""
        head = _parsed(read_head(self._bucket))
        return head.serve if head is not None and head.manifest.position == newest.position else None


def _parsed(head: bytes | None) -> Head | None:
    try:
        return None if head is None else Head.loads(head)
    except FormatError:  # only a hint
        return None


def upload_parts(bucket: Bucket, draft: Manifest, sources: Sequence[Path | bytes], rank: int = 0) -> tuple[Part, ...]:
    """Upload one rank's share of a draft: its delta part, or its files of an anchor. Returns when they are durable."""
    if draft.kind == "anchor":
        parts = tuple(Part(_size(file), _sha256(file), file=file.name) for file in sources if isinstance(file, Path))
    else:
        parts = tuple(Part(_size(source), _sha256(source), rank) for source in sources)
    if parts:
        bucket.put([Upload(Layout.part(draft, part), source) for part, source in zip(parts, sources, strict=True)])
    return parts


def anchor_sources(directory: Path) -> list[Path]:
    """What of a directory belongs to an anchor: model shards and side files, sorted."""
    return sorted(file for file in Path(directory).iterdir() if _belongs_to_anchor(file.name))


def _first_difference(run: TensorTable, ours: TensorTable) -> str:
    for theirs, mine in zip(run, ours, strict=False):
        if theirs != mine:
            return (
                f"it has {theirs.name} {theirs.dtype}{list(theirs.shape)} where this model has "
                f"{mine.name} {mine.dtype}{list(mine.shape)}"
            )
    longer, whose = (run, "the run") if len(run) > len(ours) else (ours, "this model")
    return f"only {whose} has {longer[min(len(run), len(ours))].name}"


def _belongs_to_anchor(name: str) -> bool:
    return name in SIDE_FILES or (name.startswith(("model", "adapter_model")) and name.endswith(".safetensors"))


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _sha256(source: Path | bytes) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    hasher = hashlib.sha256()
    with open(source, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
