"""The chain writer of all ranks: rank 0 writes documents, each rank uploads its own parts, all know the position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hubsync.bucket import Bucket
from hubsync.chain import ChainWriter
from hubsync.format.manifest import Manifest, Part, Position, Run
from hubsync.format.times import Times

from .ranks import Ranks


class JointWriter:
    """A `ChainWriter` for several ranks. Methods with `ranks` are rounds: all ranks call them in the same order.

    Args:
        bucket: bucket of the run, opened by this rank.
        ranks: ranks of the calling thread.
        open_writer: creates or resumes the run; called on rank 0 only.
    """

    def __init__(self, bucket: Bucket, ranks: Ranks, open_writer: Callable[[], ChainWriter]):
        self.bucket = bucket
        self._open_writer = open_writer
        self._writer: ChainWriter | None = None
        self.run: Run
        self.run, self.position, self.newest, self.serving = ranks.first(self._open)

    def settle(self, ranks: Ranks) -> None:
        """`ChainWriter.settle`. Afterwards `position` is the run's, whatever interrupted the last commit."""
        _, self.position = ranks.first(lambda: (self._first.settle(), self._first.position))

    def check_fence(self, ranks: Ranks) -> None:
        """`ChainWriter.check_fence`."""
        ranks.first(lambda: self._first.check_fence())

    def next_version(self, ranks: Ranks) -> int:
        """`ChainWriter.next_version`."""
        return ranks.first(lambda: self._first.next_version)

    def serve(self, ranks: Ranks, version: int) -> Position:
        """`ChainWriter.serve`."""
        position = ranks.first(lambda: self._first.serve(version))
        self.serving = version
        return position

    def draft_delta(self, ranks: Ranks, **fields: Any) -> Manifest:
        """`ChainWriter.draft_delta`."""
        return ranks.first(lambda: self._first.draft_delta(**fields))

    def draft_anchor(self, ranks: Ranks, **fields: Any) -> Manifest:
        """`ChainWriter.draft_anchor`."""
        return ranks.first(lambda: self._first.draft_anchor(**fields))

    def commit(self, ranks: Ranks, draft: Manifest, parts: Sequence[Part], times: Times | None = None) -> Manifest:
        """`ChainWriter.commit_draft`, with the parts of all ranks."""
        manifest = ranks.first(lambda: self._first.commit_draft(draft, parts, times))
        self.position, self.serving = manifest.position, manifest.served
        return manifest

    @property
    def _first(self) -> ChainWriter:
        assert self._writer is not None, "only rank 0 writes manifests"
        return self._writer

    def _open(self) -> tuple[Run, Position, Manifest | None, int]:
        writer = self._writer = self._open_writer()
        return writer.run, writer.position, writer.newest, writer.serving
