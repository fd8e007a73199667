"""A bucket that fails on command: the nth call of a verb, before or after it did its work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hubsync.bucket.base import Bucket, Download, Stat, Upload
from hubsync.errors import BucketUnavailable


class FaultyBucket(Bucket):
    """Passes everything on to `inner`, counts the calls, and fails where `fail` says.

    Attributes:
        calls: verb -> number of calls so far.
        before_commit: called with the path of every `commit` before it is made.
    """

    def __init__(self, inner: Bucket):
        self.inner = inner
        self.address = inner.address
        self.calls: Counter[str] = Counter()
        self.before_commit: Callable[[str], None] = lambda path: None
        self._faults: dict[tuple[str, int], tuple[str, BaseException]] = {}

    @property
    def lag(self) -> float:
        return self.inner.lag

    def fail(self, verb: str, nth: int = 1, *, when: str = "before", error: BaseException | None = None) -> None:
        """Let the nth call of `verb` from now on fail, before or after its work is done."""
        self._faults[verb, self.calls[verb] + nth] = when, error or BucketUnavailable(f"injected: {when} {verb}")

    def _call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        self.calls[verb] += 1
        when, error = self._faults.pop((verb, self.calls[verb]), ("never", None))
        if error is not None and when == "before":
            raise error
        result = getattr(self.inner, verb)(*args, **kwargs)
        if error is not None:
            raise error
        return result

    def copy_in(self, repo: str, revision: str, paths: Mapping[str, str]) -> Any:
        return self._call("copy_in", repo, revision, paths)

    def put(self, uploads: Sequence[Upload]) -> None:
        self._call("put", uploads)

    def commit(self, path: str, data: bytes) -> None:
        self.before_commit(path)
        self._call("commit", path, data)

    def read(self, paths: Sequence[str], *, max_bytes: int = 64 << 20) -> dict[str, bytes]:
        return self._call("read", paths, max_bytes=max_bytes)

    def stat(self, paths: Sequence[str]) -> dict[str, Stat]:
        return self._call("stat", paths)

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterable[Stat]:
        return self._call("list", prefix, recursive=recursive)

    def fetch(self, downloads: Sequence[Download]) -> None:
        self._call("fetch", downloads)

    def delete(self, paths: Sequence[str]) -> None:
        self._call("delete", paths)
