"""The one narrow interface between hubsync and where bytes live.

Litestream's lesson: keep the storage interface to a handful of verbs, and every client stays small. All
paths are relative to the run's prefix, use `/`, and are made by `hubsync.chain.Layout` alone.

What callers may rely on, whatever the implementation:

* an object is never visible under its name with half of its bytes;
* `put` is for immutable objects, many at once; `commit` is for one small object, written atomically,
  and (only for the head) replaced atomically;
* `fetch` ends with a complete, hash-checked local file under its final name, or with an error and nothing;
* failures are `hubsync.errors.BucketError`s, never those of a transport library;
* objects are safe to use from several threads and several processes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Upload:
    """One immutable object to write: `source` is a local file, or the bytes themselves."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


@dataclass(frozen=True)
class Stat:
    """What a bucket knows about an object without reading it.

    Attributes:
        path: path relative to the run's prefix.
        size: bytes.
        etag: changes whenever the content does (xet hash on the Hub; inode, mtime and size in a directory).
        modified: when it was written, in seconds since 1970 by the storage's clock; None if that is not known.
    """

    path: str
    size: int
    etag: str
    modified: float | None = None


@dataclass(frozen=True)
class Download:
    """One object to fetch: the bytes at `path` must have exactly this size and SHA-256 (hex)."""

    path: str
    size: int
    sha256: str
    destination: Path


@dataclass(frozen=True)
class Copied:
    """What an object that was copied in holds: bytes, and their SHA-256 (hex)."""

    size: int
    sha256: str


class Bucket(ABC):
    """A prefix of some storage that holds one run."""

    address: str  # what the user typed, for messages

    @abstractmethod
    def put(self, uploads: Sequence[Upload]) -> None:
        """Write immutable objects, then check that every one is there with its size.

        Putting an object that already exists with the same size is fine (a retry). One of another size is a
        `BucketError` in a directory; the Hub replaces it, because looking first would cost an API call: names must
        be unique. May leave some of the objects written if it fails; none of them half.
        """

    @abstractmethod
    def commit(self, path: str, data: bytes) -> None:
        """Write (or, for the head, replace) one small object atomically.

        An unknown outcome (connection lost after sending) is read back before this raises, so when it raises
        `BucketUnavailable` the object may or may not be there, and when it raises anything else it is not.
        """

    @abstractmethod
    def read(self, paths: Sequence[str], *, max_bytes: int = 64 << 20) -> dict[str, bytes]:
        """Contents of small objects; those that do not exist are absent from the result.

        FormatError if one is larger than `max_bytes`. No hash is known for these; their parsers validate.
        """

    @abstractmethod
    def stat(self, paths: Sequence[str]) -> dict[str, Stat]:
        """`Stat` of each existing path (missing ones are absent). One API call on the Hub: the idle poll."""

    @abstractmethod
    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterable[Stat]:
        """Objects below the *directory* `prefix` (never a lexical prefix of a sibling's name), sorted by path.

        With `recursive=False`, sub-directories appear as `Stat(path + "/", 0, "")`. An unknown prefix is empty.
        """

    @abstractmethod
    def fetch(self, downloads: Sequence[Download]) -> None:
        """Download into temporary files, check size and SHA-256, then rename each into place.

        A destination that already holds the right bytes is kept. ObjectMissing or ObjectCorrupt (after one
        more try) otherwise; files already fetched stay, no partial file remains.
        """

    def copy_in(self, repo: str, revision: str, paths: Mapping[str, str]) -> dict[str, Copied] | None:
        """Copy files of a model repository (file -> path) inside of the storage; none of their bytes pass here.

        Returns path -> what is there now; None if not all files can be copied so, and then none is. Size and SHA-256
        are what the repository states.
        """
        return None

    def now(self) -> float:
        """Seconds since 1970 by the storage's clock; a directory has that of this machine."""
        return time.time()

    @abstractmethod
    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; deleting one that is not there is fine."""
