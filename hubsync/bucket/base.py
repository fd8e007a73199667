"""The storage interface: a handful of verbs, as narrow as Litestream's `ReplicaClient`.

A run needs nothing else from its storage, so every backend stays small. To add one, subclass `Bucket`, implement its
seven abstract methods, and register the class (see `hubsync.bucket.registry`). `tests/bucket/test_bucket.py` holds the
tests that every backend passes. All paths are relative to the run's prefix, use `/`, and come from
`hubsync.chain.Layout`.

Callers rely on these promises of every backend:

* An object is never visible under its name with a part of its bytes.
* `put` writes immutable objects, many at once. `commit` writes one small object atomically. Only the head is replaced.
* `fetch` ends with a complete, hash-checked local file under its final name, or with an error and no file.
* Failures are `hubsync.errors.BucketError`s, never errors of a transport library.
* Every method may be called from several threads and several processes at once.
* Every wait has a deadline; after it, `BucketUnavailable` is raised. A transfer has the time that a slow line needs.
* What was written may be visible late, by at most `lag`. Writers and readers of a run are patient for that long.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .changes import Changes


@dataclass(frozen=True)
class Upload:
    """One immutable object to write.

    Attributes:
        path: its name, or a function that waits for it. A name may be made of the content's hash, which takes as long
            as writing: a backend that can write first asks for the name afterwards.
        source: a local file, or the bytes themselves.
    """

    path: str | Callable[[], str]
    source: Path | bytes | memoryview

    @property
    def name(self) -> str:
        """The path, waited for if necessary."""
        return self.path if isinstance(self.path, str) else self.path()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.source.stat().st_size if isinstance(self.source, Path) else len(self.source)


@dataclass(frozen=True)
class Stat:
    """Facts about an object that a bucket knows without reading it.

    Attributes:
        path: relative to the run's prefix.
        size: bytes.
        etag: changes whenever the content does (the xet hash on the Hub; inode, mtime and size in a directory).
        modified: when the object was written, in seconds since 1970 by the storage's clock. None if unknown.
    """

    path: str
    size: int
    etag: str
    modified: float | None = None


@dataclass(frozen=True)
class Download:
    """One object to fetch. The bytes at `path` must have exactly this size and SHA-256 (hex)."""

    path: str
    size: int
    sha256: str
    destination: Path


@dataclass(frozen=True)
class Copied:
    """Size in bytes and SHA-256 (hex) of an object that was copied in."""

    size: int
    sha256: str


class Bucket(ABC):
    """A prefix of some storage that holds one run.

    Attributes:
        address: as the user typed it, for messages.
    """

    address: str

    @abstractmethod
    def put(self, uploads: Sequence[Upload]) -> None:
        """Write immutable objects, then check that each one is visible with its content.

        Writing an object that already exists with the same size succeeds (a retry). If it exists with another size, a
        directory raises BucketError. The Hub replaces it, because checking first would cost an API call. So names must
        be unique. After a failure some objects may be written, each of them completely.
        """

    @abstractmethod
    def commit(self, path: str, data: bytes) -> None:
        """Write one small object atomically. The head is replaced.

        If the answer is lost, the object is looked up before this raises. After BucketUnavailable the outcome is
        unknown: the object may exist, or become visible later. After any other error it does not exist.
        """

    def expect(self, documents: Mapping[str, bytes]) -> None:  # noqa: B027  nothing is a right answer
        """Documents that `commit` will write next: path -> bytes. Nothing becomes visible.

        A backend may store all contents in one transfer, so that each `commit` only gives a name. The default does
        nothing. BucketError if that failed.
        """

    @abstractmethod
    def read(self, paths: Sequence[str], *, max_bytes: int = 64 << 20) -> dict[str, bytes]:
        """Return the contents of small objects. Objects that do not exist are absent from the result.

        FormatError if one is larger than `max_bytes`. Hashes of these objects are unknown; their parsers validate them.
        """

    @abstractmethod
    def stat(self, paths: Sequence[str]) -> dict[str, Stat]:
        """Return the `Stat` of each object that exists. One API call on the Hub: the idle poll."""

    @abstractmethod
    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterable[Stat]:
        """Objects below the *directory* `prefix`, sorted by path. Siblings whose names begin alike do not match.

        With `recursive=False`, sub-directories appear as `Stat(path + "/", 0, "")`. An unknown prefix is empty.
        """

    @abstractmethod
    def fetch(self, downloads: Sequence[Download]) -> None:
        """Download into temporary files, check size and SHA-256, then rename each into place.

        A destination that already holds the right bytes is kept. Otherwise ObjectMissing, or ObjectCorrupt after one
        more try. Files already fetched stay; no partial file remains.
        """

    @abstractmethod
    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects. Objects that do not exist are ignored."""

    def copy_in(self, repo: str, revision: str, paths: Mapping[str, str]) -> dict[str, Copied] | None:
        """Copy files of a model repository (file name -> path) within the storage, without downloading them.

        Returns path -> size and SHA-256 as the repository states them; None, and nothing is copied, unless every file
        can be copied this way. The default returns None.
        """
        return None

    def beginnings(self, most: Mapping[str, int]) -> dict[str, bytes]:
        """The first bytes of objects, at most so many of each: path -> bytes. They are compared with no hash.

        Objects that do not exist are absent from the result. For what is shown, never for what is served. The default
        reads whole objects. FormatError if one is then larger than `read` allows.
        """
        return {path: data[: most[path]] for path, data in self.read(list(most)).items()}

    def changes(self, paths: Sequence[str]) -> Changes:
        """Pauses between looks at these objects, which end early if the storage reports a change.

        A path that ends with "/" stands for all objects below it. The default never ends one early.
        """
        return Changes()

    @property
    def lag(self) -> float:
        """Seconds for which a name that was just written may be invisible to readers, or show what it replaced.

        0, the default, if every reader sees a write as soon as it returns.
        """
        return 0.0

    def now(self) -> float:
        """Seconds since 1970 by the storage's clock. The default is this machine's clock."""
        return time.time()
