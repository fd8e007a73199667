"""Contents of a bucket: uploads and downloads by hf_xet, given up when they stop moving.

hf_xet transfers outside of Python, and one of its calls may wait for ever. So each transfer runs in a thread while its
caller watches the bytes that have moved. After a silence it is cancelled, which ends the thread. So it is if it is much
slower than any line over which weights can be moved: a few bytes now and then must not hold a reader for days. A thread
that does not end all the same is left behind; there is a limit for these.

The session is hubsync's own, so that neither its settings nor cancelling affects other users of hf_xet in the process.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from hf_xet import SKIP_SHA256, XetConfig, XetFileInfo, XetSession

from hubsync.errors import BucketUnavailable
from hubsync.progress import Bar, progress
from hubsync.retry import REPORT_SECONDS, Deadline

from .abandonable import LEFT_BEHIND
from .hub_api import Token
from .hub_errors import FOREIGN, HubPlace, by_transfer

logger = logging.getLogger(__name__)

STALL_SECONDS = 60.0  # a transfer that moves no byte for this long is given up
# Bytes count as moved when the kernel has taken them, so the end of an upload is silent while its buffer drains, even
# over a slow line; and then the storage checks what it got.
_BUFFER, _SLOWEST = 4 << 20, 128 << 10  # bytes, bytes per second
_CHECKED = 500_000_000  # bytes per second
_LEAST_SPEED = 16 << 10  # bytes per second: a transfer that is slower as a whole is given up
_EACH_SECONDS = 1.0  # more for each file
_CANCEL_SECONDS = 10.0  # time for a cancelled transfer to end

# Unless the environment sets them (HF_XET_CLIENT_...). By itself hf_xet retries a failing server for almost five
# minutes per request, too long for a training loop with a next step to publish. With these it gives up after about
# 20 s. (Waits are random up to powers of the base: with 1 s they would never grow.) Its cache of downloaded chunks is
# off because it holds unverified bytes: the second try must not read a damaged chunk again. Small steps of progress
# show that a slow upload moves. Each transfer would end with a report to the storage, and wait for its answer.
_DEFAULTS = {
    "client.retry_max_attempts": 4,
    "client.retry_base_delay": "2s",
    "client.retry_max_duration": "60s",
    "client.connect_timeout": "20s",
    "client.upload_reporting_block_size": 65536,
    "chunk_cache.size_bytes": 0,
    "telemetry.enabled": False,
}
# Asking the storage for chunks that it has costs a round trip. Deltas and documents are always new; files of a model
# may hold tensors that it has.
_NEW_BYTES = {"deduplication.global_dedup_query_enabled": False}

T = TypeVar("T")


def upload(sources: Sequence[Path | bytes | memoryview], token: Token, action: str, place: HubPlace) -> list[str]:
    """Store contents. Returns the hash of each. No name points to them yet.

    BucketUnavailable if the storage is silent or fails; BucketError if a local file cannot be read.
    """

    def transfer(watch: Callable[[Any], None]) -> list[str]:
        commit = _session(are_new=not any(isinstance(source, Path) for source in sources)).new_upload_commit(
            **_access(token)
        )
        watch(commit)
        handles = [
            commit.start_upload_file(str(source), sha256=SKIP_SHA256)
            if isinstance(source, Path)
            else commit.start_upload_bytes(bytes(source), sha256=SKIP_SHA256)
            for source in sources
        ]
        commit.wait_to_finish()
        return [str(handle.result().xet_info.hash) for handle in handles]

    nbytes = sum(s.stat().st_size if isinstance(s, Path) else len(s) for s in sources)
    silent_end = min(nbytes, _BUFFER) / _SLOWEST + nbytes / _CHECKED
    longest = _longest(nbytes, len(sources)) + silent_end
    hashes: list[str] = _Transfer(transfer, nbytes, action, place).run(STALL_SECONDS + silent_end, longest)
    return hashes


def download(files: Sequence[tuple[str, int, Path]], token: Token, action: str, place: HubPlace) -> None:
    """Write contents (hash, size, path). hf_xet checks no content and writes in place, so callers check the bytes.

    Raises:
        ObjectMissing: the storage does not have a content.
        ObjectCorrupt: it sent bytes that cannot be unpacked.
        BucketUnavailable: it is silent or fails.
    """

    def transfer(watch: Callable[[Any], None]) -> None:
        group = _session().new_file_download_group(**_access(token))
        watch(group)
        for content, size, path in files:
            group.start_download_file(XetFileInfo(content, size), str(path))
        group.wait_to_finish()

    nbytes = sum(size for _, size, _ in files)
    _Transfer(transfer, nbytes, action, place).run(STALL_SECONDS, _longest(nbytes, len(files)))


def beginnings(files: Sequence[tuple[str, int, int]], token: Token, action: str, place: HubPlace) -> list[bytes]:
    """The first bytes of contents (hash, size, how many bytes). hf_xet checks no content. Errors as of `download`."""

    def transfer(watch: Callable[[Any], None]) -> list[bytes]:
        streams = _Streams(_session().new_download_stream_group(**_access(token)))
        watch(streams)
        found = [streams.read(content, size, end) for content, size, end in files]
        streams.group.finish()
        return found

    nbytes = sum(end for _, _, end in files)
    read: list[bytes] = _Transfer(transfer, nbytes, action, place).run(STALL_SECONDS, _longest(nbytes, len(files)))
    return read


class _Streams:
    """Streams, one after the other, as something that is watched: hf_xet counts the bytes of groups of files only."""

    def __init__(self, group: Any):
        self.group = group
        self._moved = 0

    def read(self, content: str, size: int, end: int) -> bytes:
        data = bytearray()
        for piece in self.group.download_stream(XetFileInfo(content, size), 0, end):
            data += piece
            self._moved += len(piece)
        return bytes(data)

    def progress(self) -> Any:
        return SimpleNamespace(total_bytes_completed=self._moved, total_transfer_bytes_completed=0)

    def abort(self) -> None:
        self.group.abort()


def _longest(nbytes: int, files: int) -> float:
    """Seconds that a transfer may take as a whole."""
    return 2 * STALL_SECONDS + _EACH_SECONDS * files + nbytes / _LEAST_SPEED


class _Transfer:
    """One transfer in its own thread, cancelled when it stops moving."""

    def __init__(self, act: Callable[[Callable[[Any], None]], T], nbytes: int, action: str, place: HubPlace):
        self._act, self._nbytes, self._action, self._place = act, nbytes, action, place
        self._group: Any = None  # what moves the bytes: can be asked for its progress, and aborted
        self._result: Any = None
        self._error: BaseException | None = None
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="hubsync-transfer", daemon=True)

    def run(self, limit: float, longest: float) -> Any:
        """Its result. BucketUnavailable after a silence of `limit` seconds, or after `longest` seconds."""
        LEFT_BEHIND.check(self._place.failed(self._action))
        self._thread.start()
        try:
            self._watch(limit, Deadline(longest))
        except BaseException:  # also KeyboardInterrupt
            self._cancel()
            raise
        if self._error is None:
            return self._result
        if not isinstance(self._error, FOREIGN):
            raise self._error
        raise by_transfer(self._error, self._action, self._place) from None

    def _work(self) -> None:
        try:
            self._result = self._act(self._start)
        except BaseException as error:
            self._error = error

    def _start(self, group: Any) -> None:
        self._group = group
        if self._given_up:
            group.abort()

    def _watch(self, limit: float, end: Deadline) -> None:
        """Return when the thread ends; BucketUnavailable after a silence, or at the end of its time."""
        with progress(self._action, self._nbytes) as shown:
            self._watch_shown(limit, end, shown)

    def _watch_shown(self, limit: float, end: Deadline, shown: Bar) -> None:
        silence, moved, report = Deadline(limit), self._moved(), Deadline(REPORT_SECONDS)
        while True:
            self._thread.join(min(1.0, limit / 4))
            if not self._thread.is_alive():
                return
            shown.at(self._moved()[0])
            if (now := self._moved()) != moved:
                silence, moved = Deadline(limit), now
            elif silence.passed:
                raise self._too_slow(f"has moved no byte for {limit:.0f} s", moved[0])
            if end.passed:
                raise self._too_slow(f"moves less than {_LEAST_SPEED / 1000:.0f} kB/s", moved[0])
            if report.passed:
                logger.info("%s: %.1f of %.1f MB", self._action, now[0] / 1e6, self._nbytes / 1e6)
                report = Deadline(REPORT_SECONDS)

    def _too_slow(self, how: str, moved: int) -> BucketUnavailable:
        return BucketUnavailable(
            f"{self._place.failed(self._action)}: the storage of the Hub {how} ({moved / 1e6:.1f} of "
            f"{self._nbytes / 1e6:.1f} MB done). Try again later{self._place.proxy}"
        )

    def _moved(self) -> tuple[int, ...]:
        """Counters that grow while the transfer moves: bytes, bytes on the wire, steps at the end of an upload."""
        progress = None if self._group is None else self._group.progress()
        if progress is None:
            return (0,)
        shard = getattr(progress, "shard", None)
        steps = [getattr(shard, name, 0) or 0 for name in ("total_shards_completed", _VALIDATED)]
        return (progress.total_bytes_completed, progress.total_transfer_bytes_completed, *steps)

    def _cancel(self) -> None:
        self._given_up = True
        if self._group is not None:
            try:
                self._group.abort()
            except Exception as error:
                logger.debug("hf_xet could not cancel a transfer: %s", error)
        self._thread.join(_CANCEL_SECONDS)
        if self._thread.is_alive():
            LEFT_BEHIND.add(self._thread)


_VALIDATED = "total_shard_validation_entries_completed"


class _Sessions:
    """The sessions of this process. A fork makes new ones: the threads of the old ones do not exist in the child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[bool, Any] = {}
        self._process = 0

    def get(self, *, are_new: bool = False) -> Any:
        """Args:
        are_new: whether the storage has no part of what is uploaded.
        """
        with self._lock:
            if self._process != os.getpid():
                self._sessions, self._process = {}, os.getpid()
            if are_new not in self._sessions:
                self._sessions[are_new] = XetSession(_config(_DEFAULTS | (_NEW_BYTES if are_new else {})))
            return self._sessions[are_new]


_sessions = _Sessions()
_session = _sessions.get


def _config(wanted: Mapping[str, Any] = _DEFAULTS) -> Any:
    mine = {name: value for name, value in wanted.items() if _variable(name) not in os.environ}
    return XetConfig().with_config(mine)


def _variable(setting: str) -> str:
    """The environment variable that hf_xet reads for a setting."""
    return "HF_XET_" + setting.replace(".", "_").upper()


def _access(token: Token) -> Mapping[str, Any]:
    """Where the storage is, and what it is told. The Hub's own token goes to the Hub only."""
    public = {name: value for name, value in token.refresh_headers.items() if name.lower() != "authorization"}
    return {
        "endpoint": token.url,
        "token": token.token,
        "token_expiry_unix_secs": token.expires,
        "token_refresh_url": token.refresh_url,
        "token_refresh_headers": dict(token.refresh_headers),
        "custom_headers": public,
    }
