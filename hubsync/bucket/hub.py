"""A Hugging Face bucket: names through the Hub's API, contents through hf_xet."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from hubsync.errors import (
    BucketDenied,
    BucketError,
    BucketMissing,
    BucketUnavailable,
    FormatError,
    ObjectCorrupt,
    ObjectMissing,
)
from hubsync.retry import attempts

from . import xet
from .address import HubAddress
from .base import Bucket, Changes, Copied, Download, Stat, Upload
from .files import holds, temporary
from .hub_api import Entry, HubApi
from .hub_errors import Refused, by_transfer
from .hub_events import HubChanges, stream_of
from .names import checked, checked_directory, is_name

logger = logging.getLogger(__name__)

OPEN_SECONDS = 8.0  # a failed request to open a bucket is not repeated later than this
LAG_SECONDS = 30.0  # how long a name that was just written may be invisible, or show what it replaced
_RESEND_SECONDS = 10.0  # a name that is invisible for this long is written once more
_KEPT_BYTES = 1 << 20  # of the documents that were read last: a poll of an unchanged head downloads nothing
_MISSING_SECONDS = 10.0  # how long to wait for an object that a manifest names: its writer has seen it


class HubBucket(Bucket):
    """A prefix of a Hugging Face bucket: `hf://buckets/<namespace>/<name>/<run>`. Opening it checks that it exists.

    The Hub limits API calls (1000 in 5 minutes on the free plan). `API_CALLS` states the most that each method makes
    for up to 1000 objects when nothing fails and every name is visible at once. A token of the storage is one more, as
    often as it expires. The Hub writes names last, and they
    point to immutable content: a reader of one name sees old or new, never a mix.

    Names may become visible late. A write that the Hub acknowledged, or whose answer was lost, is looked up for
    `LAG_SECONDS` before its outcome counts as unknown (BucketUnavailable).

    `put` does not notice that it replaces an object by one of another size. Checking first would cost a call, and names
    contain the writer's epoch.

    Raises:
        ConfigError: the address has another form.
        BucketMissing: the bucket does not exist, or the token cannot see it.
        BucketDenied: the token has no access.
        BucketUnavailable: the Hub cannot be reached, or does not answer.
    """

    API_CALLS: ClassVar[dict[str, int]] = {
        "open": 1,
        "put": 2,
        "commit": 1,
        "read": 1,
        "stat": 1,
        "list": 1,
        "fetch": 1,
        "delete": 1,
        "now": 1,
    }

    def __init__(
        self, address: str, *, create: bool = False, token: str | None = None, endpoint: str | None = None
    ) -> None:
        self.address = address
        self._at = HubAddress.parse(address)
        # HF_ENDPOINT is read here: huggingface_hub reads it only when it is imported.
        self._api = HubApi(self._at.bucket, endpoint or os.environ.get("HF_ENDPOINT") or None, token)
        self._place = self._api.place
        self._expected: dict[bytes, str] = {}  # documents whose contents are stored -> their hashes
        self._documents: dict[str, bytes] = {}  # contents read last, by hash
        if create:
            self._create()
        else:
            self._api.is_private(patience=OPEN_SECONDS)

    @property
    def lag(self) -> float:
        return LAG_SECONDS

    def put(self, uploads: Sequence[Upload]) -> None:
        if not uploads:
            return
        names = [self._full(upload.name) for upload in uploads]
        action = f"write {_some(upload.name for upload in uploads)}"
        contents = self._upload([upload.source for upload in uploads], action)
        self._name(dict(zip(names, contents, strict=True)), action, verify=True)

    def commit(self, path: str, data: bytes) -> None:
        name, action = self._full(path), f"write {path}"
        content = self._expected.pop(data, None)
        if content is None:
            (content,) = self._upload([data], action)
        self._name({name: content}, action)

    def expect(self, documents: Mapping[str, bytes]) -> None:
        contents = self._upload(list(documents.values()), f"write {_some(documents)}")
        self._expected = dict(zip(documents.values(), contents, strict=True))

    def read(self, paths: Sequence[str], *, max_bytes: int = 64 << 20) -> dict[str, bytes]:
        try:
            return self._contents(self._look_up(paths), max_bytes)
        except ObjectMissing:  # deleted after the lookup
            return self._contents(self._look_up(paths), max_bytes)

    def beginnings(self, most: Mapping[str, int]) -> dict[str, bytes]:
        files = self._look_up(list(most))
        if not files:
            return {}
        action = f"read {_some(files)}"
        wanted = [(file.hash, file.size, min(file.size, most[path])) for path, file in files.items()]
        try:
            found = xet.beginnings(wanted, self._api.token("read", action), action, self._place)
        except ObjectMissing:  # deleted after the lookup
            return {}
        except BucketError:
            self._api.forget_tokens()
            raise
        return dict(zip(files, found, strict=True))

    def stat(self, paths: Sequence[str]) -> dict[str, Stat]:
        return {path: _stat(path, file) for path, file in self._look_up(paths).items()}

    def list(self, prefix: str = "", *, recursive: bool = True) -> list[Stat]:
        directory = self._full(checked_directory(prefix)) if prefix else self._at.prefix
        # The Hub matches prefixes of names, so siblings such as "run-2" of "run" are listed too.
        entries = self._api.tree(directory, recursive=recursive, action=f"list {prefix or self._at.prefix}")
        found = _stats(entries, directory + "/", len(self._at.prefix) + 1)
        return sorted(found, key=lambda entry: entry.path)

    def fetch(self, downloads: Sequence[Download]) -> None:
        if not downloads:
            return
        try:
            wanted = [d for d in downloads if not holds(d.destination, d.size, d.sha256)]
            wrong = self._fetch_all(self._fetch_all(wanted))
        except OSError as error:
            raise by_transfer(error, f"fetch {_some(d.path for d in downloads)}", self._place) from error
        if wrong:
            raise ObjectCorrupt(
                f"{_some(d.path for d in wrong)} in {self.address} does not have the size and SHA-256 that its "
                "manifest states, also on the second try: it was damaged or replaced. Check the run with `hubsync "
                "verify`. Replicas can catch up from a later anchor"
            )

    def copy_in(self, repo: str, revision: str, paths: Mapping[str, str]) -> dict[str, Copied] | None:
        try:
            found = self._api.model_files(repo, revision, list(paths))
        except BucketError:  # not a repository name, or not found with this token
            return None
        files = {file.get("path"): file for file in found}
        copies, copied = {}, {}
        for name, path in paths.items():
            file = files.get(name, {})
            content, lfs = file.get("xetHash"), file.get("lfs")
            if not isinstance(content, str) or not isinstance(lfs, dict):  # only files in Xet storage can be copied
                return None
            copies[self._full(path)] = content
            copied[path] = Copied(int(file["size"]), str(lfs["oid"]))
        self._name(copies, f"copy {repo}", source=repo, verify=True)
        return copied

    def now(self) -> float:
        return self._api.clock()

    def changes(self, paths: Sequence[str]) -> Changes:
        stream = stream_of(self._api)
        names = [self._full(path.rstrip("/")) + "/" * path.endswith("/") for path in paths]
        return Changes() if stream is None else HubChanges(stream, names)

    def delete(self, paths: Sequence[str]) -> None:
        names = [self._full(path) for path in paths]
        if not names:
            return
        action = f"delete {_some(paths)}"
        try:
            self._api.batch([{"type": "deleteFile", "path": name} for name in names], action)
        except Refused:
            # The Hub also answers this to a repeated request whose first answer was lost, and for unknown paths.
            for _ in attempts(LAG_SECONDS, waiting_for=f"names to disappear from {self.address}"):
                if not self.stat(paths):
                    return
            raise

    # --- writing ------------------------------------------------------------------------------------

    def _create(self) -> None:
        try:
            private = self._api.is_private(patience=OPEN_SECONDS)
        except (BucketMissing, BucketDenied):  # without a token the Hub also denies access to missing repositories
            self._api.create(patience=OPEN_SECONDS)
            return
        if not private:
            logger.warning(
                "the bucket %s exists and is public: everybody can read %s. If they must not, run `hf buckets settings "
                "%s --private`",
                self._at.bucket,
                self.address,
                self._at.bucket,
            )

    def _upload(self, sources: Sequence[Path | bytes | memoryview], action: str) -> Sequence[str]:
        """Hashes of contents that are stored. No name points to them yet, so a failure here changes nothing."""
        try:
            return xet.upload(sources, self._api.token("write", action), action, self._place)
        except OSError as error:
            raise by_transfer(error, action, self._place) from error
        except BucketError:
            self._api.forget_tokens()
            raise

    def _name(
        self, contents: Mapping[str, str], action: str, *, source: str | None = None, verify: bool = False
    ) -> None:
        """Point full names to contents: uploaded ones, or those of a model repository `source`.

        BucketUnavailable if the outcome is unknown. `verify`: look even if the Hub reports success, since large batches
        have lost files that way.
        """
        operations = [_operation(name, content, source) for name, content in contents.items()]
        unknown = self._batch(operations, action, None)
        if unknown is None and not verify:
            return
        invisible = self._await(contents, _RESEND_SECONDS, action, unknown)
        if invisible:
            again = [operation for operation in operations if operation["path"] in invisible]
            unknown = self._batch(again, action, 0.0)
            if unknown is None and not verify:
                return
            invisible = self._await(contents, LAG_SECONDS - _RESEND_SECONDS, action, unknown)
        if not invisible:
            return
        if unknown is not None:
            raise _unknown(unknown) from unknown
        some = _some(name[len(self._at.prefix) + 1 :] for name in sorted(invisible))
        raise BucketUnavailable(
            f"the Hub reported success twice, but {some} is not visible in {self.address} after {LAG_SECONDS:.0f} s. "
            "The outcome is unknown: it may still become visible. Try again later"
        )

    def _batch(
        self, operations: Sequence[dict[str, Any]], action: str, patience: float | None
    ) -> BucketUnavailable | None:
        """Run a batch. Returns the error if its outcome is unknown."""
        try:
            self._api.batch(operations, action, patience=patience)
        except BucketUnavailable as error:
            return error
        return None

    def _await(
        self, contents: Mapping[str, str], seconds: float, action: str, unknown: BucketUnavailable | None
    ) -> set[str]:
        """Wait until names point to contents. Returns those that do not.

        BucketUnavailable if the Hub does not answer; `unknown` is why the outcome is in doubt already.
        """
        missing = set(contents)
        for left in attempts(seconds, waiting_for=f"the Hub to show what was written ({action})", first=0.25):
            try:
                found = self._api.look_up(list(contents), f"{action}: look whether it was written", patience=0.0)
            except BucketUnavailable as error:
                if unknown is None and left > 0:
                    continue
                raise _unknown(unknown or error) from error
            missing = {name for name, content in contents.items() if name not in found or found[name].hash != content}
            if not missing:
                break
        return missing

    # --- reading ------------------------------------------------------------------------------------

    def _look_up(self, paths: Sequence[str]) -> dict[str, Entry]:
        names = {self._full(path): path for path in paths}
        if not names:
            return {}
        found = self._api.look_up(list(names), f"look up {_some(paths)}")
        return {names[name]: entry for name, entry in found.items()}

    def _contents(self, files: dict[str, Entry], max_bytes: int) -> dict[str, bytes]:
        for path, file in files.items():
            if file.size > max_bytes:
                raise FormatError(
                    f"{path} in {self.address} is larger than {max_bytes} bytes, the limit for such an object: it is "
                    "damaged or was replaced"
                )
        known = self._documents
        wanted = {path: file for path, file in files.items() if file.hash not in known}
        with tempfile.TemporaryDirectory(prefix="hubsync-") as directory:
            local = {path: Path(directory, str(n)) for n, path in enumerate(wanted)}
            self._download([(wanted[path], target) for path, target in local.items()])
            fetched = {path: _read_whole(target, wanted[path]) for path, target in local.items()}
        contents = {path: fetched[path] if path in fetched else known[file.hash] for path, file in files.items()}
        if sum(map(len, contents.values())) <= _KEPT_BYTES:
            self._documents = {files[path].hash: data for path, data in contents.items()}
        return contents

    def _fetch_all(self, downloads: Sequence[Download]) -> Sequence[Download]:
        """Fetch objects in one call. Returns those whose bytes are wrong."""
        if not downloads:
            return []
        files = self._existing([d.path for d in downloads])
        with ExitStack() as stack:
            staged = [(d, stack.enter_context(temporary(d.destination.parent))) for d in downloads]
            try:
                self._download([(files[d.path], path) for d, path in staged if files[d.path].size == d.size])
            except ObjectCorrupt:
                pass  # one of them; the loop below finds it
            wrong = []
            for download, path in staged:
                if holds(path, download.size, download.sha256):
                    os.replace(path, download.destination)
                else:
                    wrong.append(download)
            return wrong

    def _existing(self, paths: Sequence[str]) -> dict[str, Entry]:
        """Entries of objects that must exist. ObjectMissing if one stays invisible: it was deleted."""
        for _ in attempts(_MISSING_SECONDS, waiting_for=f"objects to become visible in {self.address}"):
            files = self._look_up(paths)
            missing = [path for path in paths if path not in files]
            if not missing:
                return files
        raise ObjectMissing(f"{_some(missing)} is not in {self.address}")

    def _download(self, files: Sequence[tuple[Entry, Path]]) -> None:
        """Download to temporary names; callers check the bytes."""
        for _, path in files:
            path.touch()  # hf_xet makes no file for an empty content
        moving = [(file.hash, file.size, path) for file, path in files if file.size > 0]
        if moving:
            action = f"read {_some(file.path for file, _ in files)}"
            try:
                xet.download(moving, self._api.token("read", action), action, self._place)
            except BucketError:
                self._api.forget_tokens()
                raise

    def _full(self, path: str) -> str:
        return f"{self._at.prefix}/{checked(path)}"


def _unknown(error: BucketUnavailable) -> BucketUnavailable:
    return BucketUnavailable(f"{error}. The outcome is unknown: what was written may still become visible")


def _operation(name: str, content: str, source: str | None) -> dict[str, Any]:
    """One line of a batch: point a name to an uploaded content, or to one that a model repository has."""
    added = {"path": name, "xetHash": content, "mtime": int(time.time() * 1000)}
    if source is None:
        return {"type": "addFile", **added}
    return {"type": "copyFile", **added, "sourceRepoType": "model", "sourceRepoId": source}


def _stats(entries: Iterable[Entry | str], directory: str, skip: int) -> Iterator[Stat]:
    """Entries in `directory` with an object name, relative to the run's prefix of `skip` characters."""
    for entry in entries:
        path = entry if isinstance(entry, str) else entry.path
        if not path.startswith(directory) or not is_name(path[skip:]):
            continue
        yield Stat(path[skip:] + "/", 0, "") if isinstance(entry, str) else _stat(path[skip:], entry)


def _stat(path: str, file: Entry) -> Stat:
    return Stat(path, file.size, file.hash, file.modified)


def _read_whole(local: Path, file: Entry) -> bytes:
    data = local.read_bytes()
    if len(data) != file.size:
        raise ObjectCorrupt(f"{file.path} arrived with {len(data)} bytes, the Hub lists {file.size}")
    return data


def _some(paths: Iterable[str]) -> str:
    """Paths as a message names them: the first, and the number of others."""
    first, *rest = paths
    return first if not rest else f"{first} and {len(rest)} more"
