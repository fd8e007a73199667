"""A run of many versions, written without its parts: manifests are all that planning and listing read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hubsync.bucket import LocalBucket
from hubsync.chain import Layout
from hubsync.format.manifest import Base, Head, Manifest, Part, Position, Run
from hubsync.format.table import TensorSpec, TensorTable

TABLE = TensorTable([TensorSpec("w", (64, 64), "BF16")])
EPOCH, COMPACTOR = "00000001-0123abcd", "compact-0123abcd"
DELTA_BYTES = 1000


def digest(version: int) -> str:
    return hashlib.sha256(b"%d" % version).hexdigest()[:32]


RUN = Run("a" * 32, TABLE, digest(0), Base("base/model"), 1.0)


def position(version: int) -> Position:
    return Position(version, digest(version))


def delta(version: int) -> Manifest:
    return _manifest("delta", EPOCH, version, version - 1, DELTA_BYTES)


def merged(first: int, last: int) -> Manifest:
    """A merged delta: half the bytes of the deltas that it merges."""
    return _manifest("merged", COMPACTOR, last, first, DELTA_BYTES * (last - first) // 2)


def anchor(version: int, size: int) -> Manifest:
    part = Part(size, hashlib.sha256(b"anchor").hexdigest(), file="model.safetensors")
    return Manifest("anchor", RUN.run_id, TABLE.hash, EPOCH, position(version), None, None, (part,), 0, 1.0)


def write_run(root: Path, versions: int, *others: Manifest) -> LocalBucket:
    """A directory with the deltas to `versions` versions, empty files for parts, other manifests, the head."""
    bucket = LocalBucket(root, create=True)
    (root / Layout.RUN).write_bytes(RUN.dumps())
    for manifest in [*(delta(version) for version in range(1, versions + 1)), *others]:
        for name in (Layout.manifest(manifest), *(Layout.part(manifest, part) for part in manifest.parts)):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        (root / Layout.manifest(manifest)).write_bytes(manifest.dumps())
    (root / Layout.HEAD).write_bytes(Head(delta(versions), versions, 1.0).dumps())
    return bucket


def _manifest(kind: str, epoch: str, version: int, parent: int, size: int) -> Manifest:
    return Manifest(
        kind=kind,
        run_id=RUN.run_id,
        table_hash=TABLE.hash,
        epoch=epoch,
        position=position(version),
        parent=position(parent),
        parent_epoch=EPOCH if parent else None,
        parts=(Part(size, hashlib.sha256(b"%d" % version).hexdigest()),),
        changed=3,
        created=1.0,
    )
