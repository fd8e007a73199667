"""Anchors: uploads of the whole model as it was last published.

With several ranks each tensor is assembled from its shards, because a tensor of an anchor lies in one file. The ranks
take turns, file by file: one rank receives the tensors of a file and writes it. So memory, disk and upload are shared.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from hubsync.chain import ChainReader, VersionInfo
from hubsync.chain.part_files import anchor_sources, upload_parts
from hubsync.chain.version_info import NO_INFO
from hubsync.errors import BucketError, ChainError
from hubsync.format.digest import Digest, digest_torch, digest_view, tensor_seed
from hubsync.format.manifest import Manifest, Position
from hubsync.format.parts import anchor_files, write_anchor, write_anchor_file, write_anchor_index
from hubsync.publish.detect.base import Detector, PartHolder
from hubsync.publish.view.cast import integers
from hubsync.publish.view.division import Division, assembled

from .base_copy import copy_base
from .config import SyncConfig
from .rank_writer import JointWriter
from .ranks import Ranks
from .trained_model import TrainedModel

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 5 << 30


class Anchors:
    """Commits anchors of the detector's view, on request and as often as the config says.

    Args:
        writer: writes the run.
        detector: holds the view.
        model: writes the configs and tokenizer of anchors.
        division: which rank owns what.
        config: its `anchor_every` and `anchor_fraction`.

    Methods with `ranks` are rounds: all ranks call them in the same order.
    """

    def __init__(
        self,
        writer: JointWriter,
        detector: Detector,
        model: TrainedModel,
        division: Division,
        config: SyncConfig,
    ):
        self._writer = writer
        self._detector = detector
        self._model = model
        self.division = division
        self._config = config
        self._newest: Manifest | None = None
        self._newest_at = writer.position  # the last anchor of an earlier trainer is unknown
        self._versions_since = 0
        self._bytes_since = 0

    @property
    def are_scheduled(self) -> bool:
        """Whether the config asks for anchors between versions."""
        return bool(self._config.anchor_every or self._config.anchor_fraction)

    def count(self, payload_bytes: int) -> None:
        """Count a version that has become durable."""
        self._versions_since += 1
        self._bytes_since += payload_bytes

    def commit_if_due(self, ranks: Ranks, info: VersionInfo) -> None:
        """Commit an anchor of the current version if the config asks for one. A failure is a warning."""
        try:
            if ranks.first(self._is_due):
                self.commit(ranks, VersionInfo(info.step, info.name))
        except Exception as error:  # of the bucket, of the local disk, of a tokenizer's save_pretrained
            logger.warning("could not upload the whole model, trying again after the next version: %s", error)

    def commit(self, ranks: Ranks, info: VersionInfo = NO_INFO, at: Position | None = None) -> Manifest:
        """Commit an anchor, unless the last one has the same position.

        Args:
            info: recorded with the anchor.
            at: a new position, which starts the chain again; default is the current one.
        """
        at = at or self._writer.position
        if self._newest is not None and self._newest.position == at:
            return self._newest
        is_base = at == self._writer.position == self._writer.run.origin
        self._newest = (self._copied(ranks, at, info) if is_base else None) or self._uploaded(ranks, at, info)
        self._versions_since = self._bytes_since = 0
        self._newest_at = at
        return self._newest

    def _copied(self, ranks: Ranks, at: Position, info: VersionInfo) -> Manifest | None:
        """An anchor of version 0 that the storage copied from the base model; None if it cannot."""
        writer, side_files = self._writer, self._model.write_side_files
        draft = writer.draft_anchor(ranks, at=at, info=info)
        parts = ranks.first(lambda: copy_base(writer.bucket, writer.run, draft, side_files))
        return None if parts is None else writer.commit(ranks, draft, parts)

    def _uploaded(self, ranks: Ranks, at: Position, info: VersionInfo) -> Manifest:
        writer = self._writer
        try:
            with tempfile.TemporaryDirectory(prefix="hubsync-anchor-") as name:
                directory = Path(name)
                ranks.first(lambda: self._write_side_files(directory))
                self._write_proved(directory, ranks, at)
                draft = writer.draft_anchor(ranks, at=at, info=info)
                uploaded = ranks.gather(lambda: upload_parts(writer.bucket, draft, anchor_sources(directory)))
                return writer.commit(ranks, draft, [part for parts in uploaded for part in parts])
        except OSError as error:
            size = self._detector.table.nbytes / 1e9
            raise BucketError(
                f"cannot write the whole model ({size:.1f} GB) before its upload: {error}; "
                "point TMPDIR to a directory with enough space"
            ) from error

    def _write_side_files(self, directory: Path) -> None:
        self._model.write_side_files(directory)
        self._model.warn_of_left_out(self._detector.table)

    def _is_due(self) -> bool:
        if self._config.anchor_every and self._versions_since >= self._config.anchor_every:
            return True
        limit = self._config.anchor_fraction * self._detector.table.nbytes
        # Merged deltas may have made catching up cheaper; finding out costs calls to the bucket.
        return 0 < limit < self._bytes_since and limit < self._catch_up_bytes()

    def _catch_up_bytes(self) -> int:
        """Bytes that a server at the last anchor downloads to reach the newest version."""
        with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
            return ChainReader(self._writer.bucket, cache).plan(self._newest_at).nbytes

    def _write_proved(self, directory: Path, ranks: Ranks, at: Position) -> None:
        """Write this rank's weight files. ChainError, on all ranks, if all ranks together have not written `at`."""
        own = self._write_own_files(directory, ranks)
        written = sum(ranks.gather(lambda: own), Digest())
        if written.hex != at.digest:
            raise ChainError(
                f"the copy of {at} in memory was written to, by a bit that flipped or by other code, so it is not "
                "uploaded: publish again, which finds the tensors, and then upload the model"
            )

    def _write_own_files(self, directory: Path, ranks: Ranks) -> Digest:
        """Write this rank's weight files of an anchor. Rank 0 also writes the index.

        Returns:
            digest of the written tensors, read again afterwards.
        """
        table, stem = self._detector.table, self._writer.run.stem
        if ranks.size == 1:
            tensors = self._detector.tensors()
            write_anchor(directory, table, tensors, max_shard_bytes=_MAX_FILE_BYTES, stem=stem)
            return digest_view(table, tensors)
        assert isinstance(self._detector, PartHolder), "several ranks each hold their part"
        files, digest = anchor_files(table, _MAX_FILE_BYTES, stem), Digest()
        for number, (file, names) in enumerate(files.items()):
            turn, gathered = number % ranks.size, {}
            for name in names:
                index = table.index_of(name)
                tensor = assembled(ranks, self.division.owned, index, self._detector.part(index), turn)
                if tensor is not None:
                    gathered[name] = tensor.view(table[index].shape)
            # A round, so that all ranks stop here if the disk of one is full.
            ranks.together(lambda: write_anchor_file(directory / file, gathered) if gathered else None)  # noqa: B023
            for name, tensor in gathered.items():
                digest += digest_torch(tensor_seed(name), integers(tensor.view(-1)))
        ranks.first(lambda: write_anchor_index(directory, table, files))
        return digest
