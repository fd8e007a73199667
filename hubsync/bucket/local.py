"""A directory as a bucket: one machine, or a file system that trainer and replicas share."""

from __future__ import annotations

import errno
import os
import shutil
import stat as modes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hubsync.errors import (
    BucketDenied,
    BucketError,
    BucketMissing,
    BucketUnavailable,
    FormatError,
    ObjectCorrupt,
    ObjectMissing,
)
from hubsync.progress import progress

from .base import Bucket, Download, Stat, Upload
from .files import COPY_BYTES, copy_hashed, holds, sync_directory, sync_file, temporary
from .names import checked, checked_directory, is_name

# Objects are written here first. It lies inside the bucket, so a rename never crosses file systems, and its name starts
# with a dot, so it is never listed or addressed.
_STAGING = ".staging"
_ABANDONED_AFTER = 24 * 3600.0  # seconds; writers that crashed leave temporary files behind

_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MISPLACED = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


class LocalBucket(Bucket):
    """A bucket whose objects are files below `directory`. Any number of threads and processes may use it.

    Every write is a temporary file, fsync, rename, fsync of the directory. Readers see a complete object or none, and
    objects reported as written survive a power cut.

    BucketMissing if the directory does not exist and `create` is false.
    """

    def __init__(self, directory: str | Path, *, create: bool = False) -> None:
        self.address = str(directory)
        self._root = Path(directory).expanduser().absolute()
        self._staging = self._root / _STAGING
        if create:
            with self._translated("create the bucket"):
                self._root.mkdir(parents=True, exist_ok=True)
                self._sweep()
        self._require_root()

    def put(self, uploads: Sequence[Upload]) -> None:
        for upload in uploads:
            if isinstance(upload.path, str):
                checked(upload.path)
        with progress(f"writing to {self.address}", _nbytes(uploads)) as shown:
            for upload in uploads:
                self._put_one(upload)
                shown.add(upload.size)
        with self._translated("check the written objects"):
            for upload in uploads:
                if not self._is_there(upload):
                    raise BucketError(
                        f"{upload.name} disappeared from {self.address} right after it was written; does another "
                        "process delete files there?"
                    )

    def commit(self, path: str, data: bytes) -> None:
        target = self._target(path)
        with self._translated(f"write {path}"), self._staged(data) as staged:
            _place(staged, target)

    def read(self, paths: Sequence[str], *, max_bytes: int = 64 << 20) -> dict[str, bytes]:
        found = {}
        for path in paths:
            target = self._target(path)
            with self._translated(f"read {path}"):
                if (data := _read_limited(target, max_bytes)) is not None:
                    found[path] = data
        self._require_root()
        return found

    def beginnings(self, most: Mapping[str, int]) -> dict[str, bytes]:
        found = {}
        for path, nbytes in most.items():
            target = self._target(path)
            with self._translated(f"read {path}"):
                if (data := _read_start(target, nbytes)) is not None:
                    found[path] = data
        self._require_root()
        return found

    def stat(self, paths: Sequence[str]) -> dict[str, Stat]:
        found = {}
        for path in paths:
            target = self._target(path)
            with self._translated(f"look up {path}"):
                if (status := _file_status(target)) is not None:
                    found[path] = _stat(path, status)
        self._require_root()
        return found

    def list(self, prefix: str = "", *, recursive: bool = True) -> list[Stat]:
        prefix = checked_directory(prefix)
        with self._translated(f"list {prefix or 'the bucket'}"):
            found = sorted(self._walk(prefix, recursive), key=lambda entry: entry.path)
        self._require_root()
        return found

    def fetch(self, downloads: Sequence[Download]) -> None:
        with progress(f"reading from {self.address}", sum(download.size for download in downloads)) as shown:
            for download in downloads:
                source = self._target(download.path)
                with self._translated(f"fetch {download.path}"):
                    if not holds(download.destination, download.size, download.sha256):
                        self._fetch_one(source, download)
                shown.add(download.size)

    def delete(self, paths: Sequence[str]) -> None:
        # Empty directories stay: removing one would race with a writer that is about to use it.
        for path in paths:
            target = self._target(path)
            with self._translated(f"delete {path}"):
                if _file_status(target) is not None:
                    target.unlink(missing_ok=True)
        self._require_root()

    # --- writing ------------------------------------------------------------------------------------

    def _put_one(self, upload: Upload) -> None:
        with self._translated(lambda: f"write {upload.name}"):
            if isinstance(upload.path, str) and self._is_there(upload):  # a retry
                return
            with self._staged(upload.source) as staged:
                if not self._is_there(upload):
                    _place(staged, self._target(upload.name))

    @contextmanager
    def _staged(self, source: Path | bytes | memoryview) -> Iterator[Path]:
        """A durable copy of a source, under a temporary name."""
        self._require_root()
        with temporary(self._staging) as staged:
            with staged.open("xb") as sink:
                _copy_into(sink, source)
                sync_file(sink)
            yield staged

    def _is_there(self, upload: Upload) -> bool:
        """Whether the object exists. BucketError if it has another size."""
        if (status := _file_status(self._target(upload.name))) is None:
            return False
        if status.st_size != upload.size:
            raise BucketError(
                f"{upload.name} already exists in {self.address} with {status.st_size} bytes, not {upload.size}. "
                "Objects are immutable: write under another name, or use another run"
            )
        return True

    def _sweep(self) -> None:
        """Remove temporary files that writers left behind long ago."""
        if not self._staging.is_dir():
            return
        for path in self._staging.iterdir():
            status = _file_status(path)
            if status is not None and status.st_mtime < time.time() - _ABANDONED_AFTER:
                path.unlink(missing_ok=True)

    # --- reading ------------------------------------------------------------------------------------

    def _fetch_one(self, source: Path, download: Download) -> None:
        with temporary(download.destination.parent) as staged:
            # Try twice: on a network file system the first read may come from a stale cache.
            for _ in range(2):
                if _file_status(source) is None:
                    raise ObjectMissing(f"{download.path} is not in {self.address}")
                if copy_hashed(source, staged) == download.sha256 and staged.stat().st_size == download.size:
                    os.replace(staged, download.destination)
                    return
        raise ObjectCorrupt(
            f"{download.path} in {self.address} does not have the {download.size} bytes with SHA-256 {download.sha256} "
            "that its manifest states: it was damaged or replaced. Check the run with `hubsync verify`. Replicas can "
            "catch up from a later anchor"
        )

    def _walk(self, prefix: str, recursive: bool) -> Iterator[Stat]:
        directory = self._root / prefix
        try:
            entries = list(os.scandir(directory))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            if not is_name(path):
                continue
            if entry.is_dir(follow_symlinks=False):
                below = self._walk(path, recursive=True)
                if recursive:
                    yield from below
                # Directories exist before their first object and after their last, so empty ones are not listed.
                elif next(below, None) is not None:
                    yield Stat(path + "/", 0, "")
            elif (status := _file_status(Path(entry.path))) is not None:
                yield _stat(path, status)

    # --- paths and errors ---------------------------------------------------------------------------

    def _target(self, path: str) -> Path:
        return self._root / checked(path)

    def _require_root(self) -> None:
        if not self._root.is_dir():
            raise BucketMissing(
                f"{self.address} is not a directory (on this machine: {self._root}). Check the path, or "
                "start the publisher first: it creates the bucket"
            )

    @contextmanager
    def _translated(self, action: str | Callable[[], str]) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"cannot {action if isinstance(action, str) else action()} in {self.address}: {error}"
            if error.errno in _DENIED:
                raise BucketDenied(f"{what}. Check this user's permissions on {self._root}") from error
            if error.errno in _FULL:
                raise BucketError(f"{what}. Free some space") from error
            if isinstance(error, _MISPLACED):
                self._require_root()
                raise BucketError(what) from error
            raise BucketUnavailable(what) from error


def _nbytes(uploads: Sequence[Upload]) -> int:
    """Of all that can be read; the others fail when they are written."""
    return sum(upload.size for upload in uploads if not isinstance(upload.source, Path) or upload.source.is_file())


def _place(staged: Path, target: Path) -> None:
    """Give a durable file its name, durably."""
    _make_directory(target.parent)
    os.replace(staged, target)
    sync_directory(target.parent)


def _copy_into(sink: BinaryIO, source: Path | bytes | memoryview) -> None:
    if not isinstance(source, Path):
        sink.write(source)
        return
    with source.open("rb") as file:
        shutil.copyfileobj(file, sink, COPY_BYTES)


def _read_start(target: Path, nbytes: int) -> bytes | None:
    """At most the first `nbytes` bytes of a file; None if it does not exist."""
    if _file_status(target) is None:  # opening anything but a file, such as a pipe, could block for ever
        return None
    try:
        with target.open("rb") as file:
            return file.read(nbytes)
    except FileNotFoundError:
        return None


def _read_limited(target: Path, max_bytes: int) -> bytes | None:
    data = _read_start(target, max_bytes + 1)
    if data is not None and len(data) > max_bytes:
        raise FormatError(
            f"{target} is larger than {max_bytes} bytes, the limit for such an object: it is damaged or was replaced"
        )
    return data


def _file_status(path: Path) -> os.stat_result | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself is not an object
            return None
        raise
    return status if modes.S_ISREG(status.st_mode) else None


def _stat(path: str, status: os.stat_result) -> Stat:
    etag = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return Stat(path, status.st_size, etag, status.st_mtime)


def _make_directory(directory: Path) -> None:
    """Make a directory and its parents, durably."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)
