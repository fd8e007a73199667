"""Pull: keep one inference server at the served version of a run. The trainer need not know the server.

A follower polls the head of the run, at once when the storage reports a change of it, and brings its server to the
served version. It keeps no state: it may be killed at any moment, run several times, or run while a publisher pushes,
because all operations on a server are idempotent. It needs network access to the Hub and to its server only.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from hubsync.apply.protocol import WorkerState
from hubsync.bucket.base import Changes
from hubsync.chain import ChainReader
from hubsync.errors import BucketUnavailable, ConfigError, HubsyncError, ReplicaBehind, RunMismatch
from hubsync.format.manifest import Position
from hubsync.retry import REPORT_SECONDS, Deadline

from .replica import Replica
from .reports import CommitReport, ReplicaStatus
from .server import checked_seconds

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0
_IDLE_S = 600.0  # between two messages that there is no newer version


@dataclass(frozen=True)
class Followed:
    """One commit that a follower made.

    Attributes:
        commit: what was done.
        lag: versions that the server was behind; negative if it went back.
        nbytes: bytes that its workers downloaded for it; None if they do not report it.
    """

    commit: CommitReport
    lag: int
    nbytes: int | None


class Follower:
    """Keeps one server at the served version of a run.

    Args:
        open_reader: returns a reader of the run. Called when first needed, so the run need not exist yet.
        replica: the server.
        interval: seconds between two polls of the head, at most: a report of the storage ends the pause at once. A
            poll costs two or three requests to the Hub.
        stage_timeout: seconds the server may take to find its position in the run, or to stage a version.

    Attributes:
        on_found: called by `step` once, with the version that the run serves and the server's status. Assign your own
            function.
        on_commit: called by `run` with every commit. Assign your own function to receive them.
        on_status: called by `step` with the server's status after it. Assign your own function.
        on_error: called by `run` with an error, and the seconds until the next attempt. Assign your own function.
    """

    def __init__(
        self,
        open_reader: Callable[[], ChainReader],
        replica: Replica,
        *,
        interval: float = 5.0,
        stage_timeout: float = 600.0,
    ):
        checked_seconds("interval", interval)
        checked_seconds("stage_timeout", stage_timeout)
        self._open_reader = open_reader
        self._replica = replica
        self._interval = interval
        self._stage_timeout = stage_timeout
        self._stop = threading.Event()
        self._reader: ChainReader | None = None
        self._changes: Changes | None = None
        self._is_known = self._is_found = False
        self._idle, self._behind = _Reminder(_IDLE_S), _Reminder(REPORT_SECONDS)
        self.on_found: Callable[[Position, ReplicaStatus], None] = lambda served, status: None
        self.on_commit: Callable[[Followed], None] = lambda followed: None
        self.on_status: Callable[[ReplicaStatus], None] = lambda status: None
        self.on_error: Callable[[HubsyncError, float], None] = lambda error, retry_s: None

    def run(self) -> None:
        """Follow until `stop` is called. Errors go to `on_error` and are retried with backoff. Raises ConfigError."""
        failures = 0
        while not self._stop.is_set():
            try:
                followed = self.step()
                failures = 0
            except ConfigError:
                raise
            except (HubsyncError, OSError) as error:
                failures += 1
                pause = min(_LONGEST_PAUSE_S, self._interval * 2 ** min(failures, 16)) * random.uniform(0.5, 1.0)
                self.on_error(_explained(error), pause)
                self._stop.wait(pause)  # reports must not shorten it: what failed may be a limit of requests
            else:
                if followed is not None:
                    self.on_commit(followed)
                self._wait_for_change(self._interval * random.uniform(0.75, 1.0))

    def stop(self) -> None:
        """End `run`. Staging is abandoned, a commit under way is finished. Any thread may call this."""
        self._stop.set()
        if self._changes is not None:
            self._changes.close()

    def _wait_for_change(self, timeout_s: float) -> None:
        assert self._reader is not None  # a step was made
        if self._changes is None:
            self._changes = self._reader.changes()
        if self._stop.is_set():
            self._changes.close()
        self._changes.wait(timeout_s)

    def step(self) -> Followed | None:
        """Read the head once, and bring the server to the served version.

        Returns:
            what was committed; None if the server serves it already, or another client commits on it.

        Raises:
            ConfigError: the bucket holds another run now, or the server follows another one. Retrying does not help.
        """
        if self._reader is None:
            self._reader = self._open_reader()
        try:
            target = self._reader.served()
        except RunMismatch as replaced:
            raise ConfigError(str(replaced)) from replaced
        status = self._status()
        self._require_same_run(self._reader.run().run_id, status)
        if not self._is_found:
            self._is_found = True
            self.on_found(target, status)
        if status.position == target and status.window is None:
            self._idle.say(
                f"{self._replica.server.url} is at {target}: waiting for the next version of the run ({self._how()})"
            )
            self.on_status(status)
            return None
        try:
            self._replica.wait_staged(target, self._stage_timeout, lambda now: self._is_undisturbed(status, now))
            if not self._is_undisturbed(status, self._replica.status()):
                return None
            commit = self._replica.commit(target)
        except ReplicaBehind as behind:
            self._behind.say(f"{self._replica.server.url} has not reached {target}, trying again: {behind}")
            return None
        self._idle, self._behind = _Reminder(_IDLE_S), _Reminder(REPORT_SECONDS)
        after = self._replica.status()
        self.on_status(after)
        if status.position is None or status.position == target:
            return None
        return Followed(commit, target.version - status.position.version, _downloaded(after))

    def _how(self) -> str:
        """How it will hear of the next version."""
        events = self._changes is not None and self._changes.live
        return f"{'the events of the Hub arrive; ' if events else ''}a look every {self._interval:g} s"

    def _status(self) -> ReplicaStatus:
        """The status of the server after attaching it, or healing it, if needed."""
        if not self._is_known:
            self._replica.check()
            self._is_known = True
        status = self._replica.status()
        if status.state == WorkerState.POISONED:
            logger.warning("%s is poisoned: rebuilding its weights", self._replica.server.url)
            self._replica.heal()
            return self._replica.status()
        if status.position is None:
            return self._replica.attach(self._stage_timeout)
        return status

    def _require_same_run(self, ours: str, status: ReplicaStatus) -> None:
        if status.run_id not in (None, ours):
            raise ConfigError(
                f"{self._replica.server.url} follows the run {status.run_id}, and the bucket given here holds {ours}: "
                "give both the same bucket (HUBSYNC_BUCKET of the server); restart the server if its run was recreated"
            )

    def _is_undisturbed(self, before: ReplicaStatus, now: ReplicaStatus) -> bool:
        """Whether the server is still at the position it had before. If not, another client has committed."""
        return now.position == before.position and not self._stop.is_set()


class _Reminder:
    """Logs what is waited for, each time that the wait has lasted some seconds more."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._next = Deadline(seconds)

    def say(self, message: str) -> None:
        if self._next.passed:
            logger.warning("%s", message)
            self._next = Deadline(self._seconds)


def _explained(error: HubsyncError | OSError) -> HubsyncError:
    """An error of this machine's disk, which waiting can cure as well, in hubsync's words."""
    if isinstance(error, HubsyncError):
        return error
    explained = BucketUnavailable(
        f"cannot use a local file or directory: {error}. Free some space on its disk, or point HUBSYNC_CACHE and "
        "TMPDIR to directories that this user can write"
    )
    explained.__cause__ = error
    return explained


def _downloaded(status: ReplicaStatus) -> int | None:
    sizes = [rank.get("metrics", {}).get("stage_bytes") for rank in status.ranks]
    known = [int(size) for size in sizes if size is not None]
    return max(known) if len(known) == len(sizes) else None
