"""Local files that appear complete or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

COPY_BYTES = 4 << 20
_HASH_BYTES = 16 << 20  # few calls: after each, a thread waits for the interpreter's lock


@contextmanager
def temporary(directory: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield an unused name in `directory`, which is made if needed. A file left under the name is removed at the end.

    Rename the file away to keep it. The name starts with a dot, so it is never an object name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".{secrets.token_hex(8)}{suffix}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def copy_hashed(source: Path, target: Path) -> str:
    """Copy a file over `target`. Returns the SHA-256 (hex) of what was copied; another thread computes it meanwhile."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1, "hubsync-hash") as hashing, source.open("rb") as file, target.open("wb") as sink:
        behind: Future[None] | None = None
        while block := file.read(COPY_BYTES):
            if behind is not None:
                behind.result()  # so memory holds two blocks at most
            behind = hashing.submit(digest.update, block)
            sink.write(block)
    return digest.hexdigest()


def holds(path: Path, size: int, sha256: str) -> bool:
    """Whether `path` is a file of exactly these bytes. The cheap test comes first."""
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256


def sync_file(file: BinaryIO) -> None:
    """Make the bytes of an open file durable."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable. A rename survives a power cut only after this."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
