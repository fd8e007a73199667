"""A Hugging Face bucket, through `huggingface_hub` and hf_xet."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import ClassVar, TypeVar

from huggingface_hub import BucketFile, BucketFolder, HfApi, constants
from huggingface_hub.errors import BucketBatchError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
)

from hubsync import __version__
from hubsync.errors import BucketError, BucketUnavailable, FormatError, ObjectCorrupt, ObjectMissing
from hubsync.retry import retry

from .address import HubAddress
from .base import Bucket, Copied, Download, Stat, Upload
from .files import holds, temporary
from .hub_errors import translate, translated
from .names import checked, checked_directory, is_name

# Defaults for hf_xet, unless the environment sets them. By itself it retries a failing server for almost five minutes
# per request, too long for a training loop with a next step to publish. With these it gives up after about 20 s. (Waits
# are random up to powers of the base: with 1 s they would never grow.) Its cache of downloaded chunks is off because it
# holds unverified bytes: the second try must not read a damaged chunk again.
_XET_DEFAULTS = {
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "4",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "2s",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": "60s",
    "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0",
}
_OPEN_SECONDS = 8.0  # deadline of the calls that huggingface_hub does not retry itself
_WORTH_A_BAR = 64 << 20  # bytes; a smaller transfer ends before its progress bar can be read

T = TypeVar("T")


class HubBucket(Bucket):
    """A prefix of a Hugging Face bucket: `hf://buckets/<namespace>/<name>/<run>`. Opening it checks that it exists.

    The Hub limits API calls (1000 in 5 minutes on the free plan). `API_CALLS` states the most that each method makes
    for up to 1000 objects when nothing fails. `read` and `fetch` also make one resolver call, which has its own limit.
    The Hub writes names last, and they point to immutable content: a reader of one name sees old or new, never a mix.

    `put` does not notice that it replaces an object by one of another size. Checking first would cost a call, and names
    contain the writer's epoch.

    The first `HubBucket` of a process sets defaults for hf_xet in the environment (retries, chunk cache; see
    `_XET_DEFAULTS`). Variables that are already set stay. hf_xet reads them at its first transfer: if another library
    has used it before in this process, they have no effect.

    Raises:
        ConfigError: the address has another form.
        BucketMissing: the bucket does not exist, or the token cannot see it.
        BucketDenied: the token has no access.
        BucketUnavailable: the Hub cannot be reached.
    """

    API_CALLS: ClassVar[dict[str, int]] = {
        "open": 1,
        "put": 3,
        "commit": 2,
        "read": 2,
        "stat": 1,
        "list": 1,
        "fetch": 2,
        "delete": 1,
        "now": 1,
    }

    def __init__(
        self, address: str, *, create: bool = False, token: str | None = None, endpoint: str | None = None
    ) -> None:
        self.address = address
        self._at = HubAddress.parse(address)
        for name, value in _XET_DEFAULTS.items():
            os.environ.setdefault(name, value)
        # HF_ENDPOINT is read here: huggingface_hub reads it only when it is imported.
        endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
        self._api = HfApi(endpoint=endpoint, token=token, library_name="hubsync", library_version=__version__)
        if create:
            self._patiently(
                "create the run", lambda: self._api.create_bucket(self._at.bucket, private=True, exist_ok=True)
            )
        else:
            self._patiently("open the run", lambda: self._api.bucket_info(self._at.bucket))

    def put(self, uploads: Sequence[Upload]) -> None:
        if not uploads:
            return
        names = [self._full(upload.path) for upload in uploads]
        with self._translated("read the files to upload"):
            sizes = {upload.path: upload.size for upload in uploads}
        with self._translated(f"write {_some(sizes)}"), _bars(sum(sizes.values())):
            add: list[tuple[str | Path | bytes, str]] = [
                (u.source, name) for u, name in zip(uploads, names, strict=True)
            ]
            self._api.batch_bucket_files(self._at.bucket, add=add)
        self._check_written(sizes)

    def commit(self, path: str, data: bytes) -> None:
        name = self._full(path)
        try:
            with self._translated(f"write {path}"), _bars(len(data)):
                self._api.batch_bucket_files(self._at.bucket, add=[(data, name)])
        except BucketUnavailable:
            if not self._was_written(path, data):
                raise

    def read(self, paths: Sequence[str], *, max_bytes: int = 64 << 20) -> dict[str, bytes]:
        try:
            return self._contents(self._look_up(paths), max_bytes)
        except ObjectMissing:  # deleted after the lookup
            return self._contents(self._look_up(paths), max_bytes)

    def stat(self, paths: Sequence[str]) -> dict[str, Stat]:
        return {path: _stat(path, file) for path, file in self._look_up(paths).items()}

    def list(self, prefix: str = "", *, recursive: bool = True) -> list[Stat]:
        directory = self._full(checked_directory(prefix)) if prefix else self._at.prefix
        with self._translated(f"list {prefix or self._at.prefix}"):
            # The Hub matches prefixes of names, so siblings such as "run-2" of "run" are listed too.
            entries = list(self._api.list_bucket_tree(self._at.bucket, prefix=directory, recursive=recursive))
        below = (entry for entry in entries if entry.path.startswith(directory + "/"))
        return sorted(_stats(below, len(self._at.prefix) + 1), key=lambda entry: entry.path)

    def fetch(self, downloads: Sequence[Download]) -> None:
        if not downloads:
            return
        with self._translated(f"fetch {_some(d.path for d in downloads)}"):
            wanted = [d for d in downloads if not holds(d.destination, d.size, d.sha256)]
            wrong = self._fetch_all(self._fetch_all(wanted))
        if wrong:
            raise ObjectCorrupt(
                f"{_some(d.path for d in wrong)} in {self.address} does not have the size and SHA-256 that its "
                "manifest states, also on the second try: it was damaged or replaced. Check the run with `hubsync "
                "verify`. Replicas can catch up from a later anchor"
            )

    def copy_in(self, repo: str, revision: str, paths: Mapping[str, str]) -> dict[str, Copied] | None:
        try:
            found = self._api.get_paths_info(repo, list(paths), revision=revision, repo_type="model")
        except (HfHubHTTPError, ValueError):  # not a repository name, or not found with this token
            return None
        files = {file.path: file for file in found if isinstance(file, RepoFile)}
        copies, copied = [], {}
        for name, path in paths.items():
            file = files.get(name)
            if file is None or file.xet_hash is None or file.lfs is None:  # only files in Xet storage can be copied
                return None
            copies.append(("model", repo, file.xet_hash, self._full(path)))
            copied[path] = Copied(file.size, file.lfs.sha256)
        with self._translated(f"copy {repo}"):
            self._api.batch_bucket_files(self._at.bucket, copy=copies)
        self._check_written({path: file.size for path, file in copied.items()})
        return copied

    def now(self) -> float:
        url = f"{self._api.endpoint}/api/buckets/{self._at.bucket}"
        with self._translated("read the clock"):
            date = get_session().get(url, headers=build_hf_headers(token=self._api.token)).headers.get("Date", "")
        try:
            return parsedate_to_datetime(date).timestamp()
        except ValueError:
            raise BucketError(
                f"cannot read the clock of {self._api.endpoint}: its answer has the Date {date!r}"
            ) from None

    def delete(self, paths: Sequence[str]) -> None:
        names = [self._full(path) for path in paths]
        if not names:
            return
        with self._translated(f"delete {_some(paths)}"):
            try:
                self._api.batch_bucket_files(self._at.bucket, delete=names)
            except BucketBatchError as error:
                # The Hub also answers this to a repeated request whose first answer was lost, and for unknown paths.
                if self.stat(paths):
                    raise translate(error, f"delete {_some(paths)}", self._at) from error

    # --- writing ------------------------------------------------------------------------------------

    def _check_written(self, sizes: dict[str, int]) -> None:
        """Check a batch afterwards: it is not a transaction, and large ones have lost files while reporting success."""
        found = self.stat(list(sizes))
        wrong = [path for path, size in sizes.items() if path not in found or found[path].size != size]
        if wrong:
            raise BucketError(
                f"the Hub reported success, but {_some(wrong)} is missing or incomplete in {self.address}; try again"
            )

    def _was_written(self, path: str, data: bytes) -> bool:
        """Whether an object exists whose answer was lost. False when in doubt."""
        try:
            return self.read([path], max_bytes=len(data)).get(path) == data
        except (BucketError, FormatError):
            return False

    # --- reading ------------------------------------------------------------------------------------

    def _look_up(self, paths: Sequence[str]) -> dict[str, BucketFile]:
        names = {self._full(path): path for path in paths}
        if not names:
            return {}
        with self._translated(f"look up {_some(paths)}"):
            found = list(self._api.get_bucket_paths_info(self._at.bucket, list(names)))
        return {names[file.path]: file for file in found if file.path in names}

    def _contents(self, files: dict[str, BucketFile], max_bytes: int) -> dict[str, bytes]:
        for path, file in files.items():
            if file.size > max_bytes:
                raise FormatError(
                    f"{path} in {self.address} is larger than {max_bytes} bytes, the limit for such an object: it is "
                    "damaged or was replaced"
                )
        with tempfile.TemporaryDirectory(prefix="hubsync-") as directory:
            local = {path: Path(directory, str(n)) for n, path in enumerate(files)}
            self._download([(files[path], target) for path, target in local.items()])
            return {path: _read_whole(target, files[path]) for path, target in local.items()}

    def _fetch_all(self, downloads: Sequence[Download]) -> Sequence[Download]:
        """Fetch objects in one call. Returns those whose bytes are wrong."""
        if not downloads:
            return []
        files = self._look_up([d.path for d in downloads])
        if missing := [d.path for d in downloads if d.path not in files]:
            raise ObjectMissing(f"{_some(missing)} is not in {self.address}")
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

    def _download(self, files: Sequence[tuple[BucketFile, Path]]) -> None:
        """Download to temporary names. hf_xet checks no content and writes in place, so callers check the bytes."""
        if not files:
            return
        with self._translated(f"read {_some(file.path for file, _ in files)}"), _bars(sum(f.size for f, _ in files)):
            self._api.download_bucket_files(self._at.bucket, list(files))

    # --- names and errors ---------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self._at.prefix}/{checked(path)}"

    def _translated(self, action: str) -> AbstractContextManager[None]:
        return translated(action, self._at)

    def _patiently(self, action: str, call: Callable[[], T]) -> T:
        def attempt() -> T:
            with self._translated(action):
                return call()

        return retry(
            attempt, timeout=_OPEN_SECONDS, on=BucketUnavailable, waiting_for=self.address, first=1.0, longest=4.0
        )


def _stats(entries: Iterable[BucketFile | BucketFolder], skip: int) -> Iterator[Stat]:
    """Entries with an object name, relative to the run's prefix of `skip` characters (slash included)."""
    for entry in entries:
        path = entry.path[skip:]
        if not is_name(path):
            continue
        if isinstance(entry, BucketFile):
            yield _stat(path, entry)
        else:
            yield Stat(path + "/", 0, "")


def _stat(path: str, file: BucketFile) -> Stat:
    # `mtime` would be the uploader's clock.
    modified = None if file.uploaded_at is None else file.uploaded_at.timestamp()
    return Stat(path, file.size, file.xet_hash, modified)


def _read_whole(local: Path, file: BucketFile) -> bytes:
    data = local.read_bytes()
    if len(data) != file.size:
        raise ObjectCorrupt(f"{file.path} arrived with {len(data)} bytes, the Hub lists {file.size}")
    return data


def _some(paths: Iterable[str]) -> str:
    """Paths as a message names them: the first, and the number of others."""
    first, *rest = paths
    return first if not rest else f"{first} and {len(rest)} more"


class _Bars:
    """Progress bars of huggingface_hub, which are a setting of the process: counts the transfers that need them off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._quiet = 0
        self._restore = False

    @contextmanager
    def for_transfer(self, nbytes: int) -> Iterator[None]:
        """Draw bars only for large transfers on a terminal. HF_HUB_DISABLE_PROGRESS_BARS takes precedence."""
        if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or (nbytes >= _WORTH_A_BAR and sys.stderr.isatty()):
            yield
            return
        with self._lock:
            if self._quiet == 0:
                self._restore = not are_progress_bars_disabled()
                disable_progress_bars()
            self._quiet += 1
        try:
            yield
        finally:
            with self._lock:
                self._quiet -= 1
                if self._quiet == 0 and self._restore:
                    enable_progress_bars()


_bars = _Bars().for_transfer
