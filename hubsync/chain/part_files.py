"""Files of a version's parts: uploaded before the manifest; downloaded, checked and evicted by readers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from hubsync.bucket.base import Bucket, Download, Upload
from hubsync.bucket.files import sha256_of
from hubsync.errors import ObjectCorrupt, ObjectMissing
from hubsync.format.manifest import SIDE_FILES, Manifest, Part

from .layout import Layout

AHEAD_PARTS = 500  # most parts that are downloaded ahead in one call,
AHEAD_BYTES = 256 << 20  # and their bytes
_HASHING = 2  # files that are hashed at once

Content = Path | bytes | memoryview


def upload_parts(bucket: Bucket, draft: Manifest, sources: Sequence[Content], rank: int = 0) -> tuple[Part, ...]:
    """Upload one rank's share of a draft: its delta part, or its files of an anchor. Returns when they are durable."""
    if not sources:
        return ()

    def part_of(source: Content) -> Part:
        if draft.kind == "anchor":
            assert isinstance(source, Path)
            return Part(_size(source), sha256_of(source), file=source.name)
        return Part(_size(source), _sha256(source), rank)

    def name_of(part: Future[Part]) -> str:
        return Layout.part(draft, part.result())

    with ThreadPoolExecutor(_HASHING, thread_name_prefix="hubsync-hash") as pool:  # while the backend writes
        parts = [pool.submit(part_of, source) for source in sources]
        bucket.put([Upload(partial(name_of, part), source) for part, source in zip(parts, sources, strict=True)])
        return tuple(part.result() for part in parts)


def anchor_sources(directory: Path) -> list[Path]:
    """The files of a directory that belong to an anchor: model shards and side files, sorted."""
    return sorted(file for file in Path(directory).iterdir() if _belongs_to_anchor(file.name))


def _belongs_to_anchor(name: str) -> bool:
    return name in SIDE_FILES or (name.startswith(("model", "adapter_model")) and name.endswith(".safetensors"))


def _size(source: Content) -> int:
    return source.stat().st_size if isinstance(source, Path) else len(source)


def _sha256(source: Content) -> str:
    return sha256_of(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()


class PartCache:
    """Files of the parts of manifests, below a directory, under their names in the bucket.

    Several caches, also in several processes, may share the directory.
    """

    def __init__(self, bucket: Bucket, directory: Path):
        self._bucket = bucket
        self._directory = directory
        self._ahead: list[Manifest] = []  # those that will be wanted, and have not been asked for
        self._fetched: set[Path] = set()

    def expect(self, manifests: Sequence[Manifest]) -> None:
        """The manifests whose parts will be wanted next, in this order. `fetch` downloads many of them in one call."""
        self._ahead = list(manifests)

    def fetch(self, manifest: Manifest) -> list[Path]:
        """Local files of a manifest's parts, each with the stated size and SHA-256. ObjectMissing, ObjectCorrupt."""
        batch = self._batch(manifest)
        downloads = [download for wanted in batch for download in self._downloads(wanted)]
        try:
            self._bucket.fetch(downloads)
        except (ObjectMissing, ObjectCorrupt):
            if len(batch) == 1:
                raise
            return self.fetch(manifest)  # the fault may be in a later one, whose own call will tell
        paths = [download.destination for download in self._downloads(manifest)]
        for path in paths:
            os.utime(path)  # `trim` evicts the files fetched longest ago
        if not self._fetched.issuperset(paths):
            self._fetched = {download.destination for download in downloads}
        return paths

    def trim(self, keep_bytes: int) -> None:
        """Delete files, the least recently used first, until at most `keep_bytes` are left.

        Files of the last download stay. A file in use elsewhere is fetched again when it is next needed.
        """
        files = []
        for path in self._directory.rglob("*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another reader trims this cache too
                continue
            if path.is_file():
                files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) - keep_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            if path not in self._fetched:
                path.unlink(missing_ok=True)
                excess -= size

    def _batch(self, manifest: Manifest) -> list[Manifest]:
        """A manifest, and those expected after it whose parts are downloaded in the same call."""
        if manifest not in self._ahead:
            return [manifest]
        ahead = self._ahead[self._ahead.index(manifest) :]
        parts, nbytes, batch = 0, 0, ahead[:1]
        for wanted in ahead[1:]:
            parts, nbytes = parts + len(wanted.parts), nbytes + wanted.nbytes
            if parts > AHEAD_PARTS or nbytes > AHEAD_BYTES:
                break
            batch.append(wanted)
        self._ahead = ahead[len(batch) :]
        return batch

    def _downloads(self, manifest: Manifest) -> list[Download]:
        names = [(part, Layout.part(manifest, part)) for part in manifest.parts]
        return [Download(name, part.size, part.sha256, self._directory / name) for part, name in names]
