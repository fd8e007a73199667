"""Upload the parts of a version before its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from hubsync.bucket.base import Bucket, Upload
from hubsync.bucket.files import sha256_of
from hubsync.format.manifest import SIDE_FILES, Manifest, Part

from .layout import Layout


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
    """The files of a directory that belong to an anchor: model shards and side files, sorted."""
    return sorted(file for file in Path(directory).iterdir() if _belongs_to_anchor(file.name))


def _belongs_to_anchor(name: str) -> bool:
    return name in SIDE_FILES or (name.startswith(("model", "adapter_model")) and name.endswith(".safetensors"))


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _sha256(source: Path | bytes) -> str:
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_of(source)
