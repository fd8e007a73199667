"""Client side of versions on one inference server: attach, stage, commit, recover. Any process may die at any moment.

Staging runs during generation. The commit is one request: in one turn of the engine's loop, between two forward
passes, caches of the old weights are invalidated, all ranks vote and write, and later responses state the new version
(`hubsync.apply.engine_commit`). It is atomic, so a client can die at any moment.

Where data parallel engines share forward passes (experts spread over them), one request does not reach all ranks
between the same two passes. The server must be paused around the commit, and a client can die in between:

    open      the workers record the window: its position and the token of its client
    pause     requests freeze between two forward passes
    commit    as above
    resume    frozen requests go on
    close     the workers forget the window

The server itself ends a window that is not closed in time (setting `window_timeout`), and so does the next client that
finds one (`recover`). All steps are idempotent.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from hubsync.apply.protocol import KV_POLICIES, PROTOCOL, KvPolicy, WorkerMethod, WorkerState
from hubsync.errors import (
    ConfigError,
    HubsyncError,
    ReplicaBehind,
    ReplicaError,
    ReplicaPoisoned,
    ReplicaRefused,
    ReplicaUnsuitable,
    WrongParent,
)
from hubsync.format.manifest import Position
from hubsync.retry import Deadline, attempts

from .reports import (
    CommitReport,
    PauseWindow,
    ReplicaStatus,
    commit_report,
    heals,
    longest_turn,
    merged_status,
    position_of,
)
from .server import InferenceServer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_S = 0.05
_WAIT_S = 0.5  # that a server may wait before it answers: afterwards it is looked whether anybody still waits

# For engines of a data parallel server that did not commit with the others: time to stage again.
_CATCH_UP_S = 60.0


class Replica:
    """One inference server that follows a run.

    Args:
        server: client of the server.
        kv_cache: what a commit does with keys and values that the old weights computed; see `KvPolicy`. `"recompute"`:
            none is used again. Running requests keep their tokens and go on once the new weights have recomputed the
            keys and values of those. `"keep"`: running requests go on at once with theirs, so they mix both versions;
            later requests never use any of them.
        pause: whether to pause the server around every commit. None: only if it must be.
    """

    def __init__(self, server: InferenceServer, kv_cache: str = KvPolicy.DEFAULT, *, pause: bool | None = None):
        if kv_cache not in KV_POLICIES:
            raise ConfigError(f"kv_cache must be one of {', '.join(KV_POLICIES)}, not {kv_cache!r}")
        self.server = server
        self.kv_cache = kv_cache
        self._pause = pause
        self._token: str | None = None  # of the window that we opened last; it may still be open
        self._waits = False  # does the server know `hubsync_wait`?

    def check(self) -> None:
        """ReplicaUnsuitable unless the server is one that hubsync can drive."""
        self.server.version()
        ranks = self.status().ranks
        protocol = next((rank.get("protocol") for rank in ranks if rank.get("protocol") != PROTOCOL), PROTOCOL)
        if protocol != PROTOCOL:
            raise ReplicaUnsuitable(
                f"{self.server.url} speaks protocol {protocol}, this side {PROTOCOL}: install the same hubsync on both"
            )
        workers = self.server.world_size()
        if workers != len(ranks):
            raise ReplicaUnsuitable(
                f"{self.server.url} has {workers} workers, but only {len(ranks)} are within its reach: address each of "
                "its API servers (without data parallel load balancing outside of vLLM there is only one)"
            )

    def status(self) -> ReplicaStatus:
        return self._read_status(self.server.rpc(WorkerMethod.STATUS))

    def _read_status(self, ranks: list[dict[str, Any]]) -> ReplicaStatus:
        if not all("engine" in rank for rank in ranks):
            raise ReplicaUnsuitable(
                f"the engine of {self.server.url} does not know hubsync's commits: its log says why, or "
                "VLLM_PLUGINS keeps hubsync from being loaded"
            )
        self._waits = self._understood(lambda: all(rank["engine"].get("waits") for rank in ranks))
        return self._understood(lambda: merged_status(self.server.url, ranks))

    def attach(self, timeout: float = 600.0) -> ReplicaStatus:
        """Have the workers find their position in the run, and close a window that a dead client left open.

        Raises:
            RunMismatch, NoPath, ReplicaRefused, ...: why the workers cannot follow the run.
            ReplicaUnsuitable: see `check`; or still attaching after `timeout` seconds.
        """
        self.check()
        self.server.rpc(WorkerMethod.ATTACH)
        status = self._settled(timeout)
        if status.state == WorkerState.MAPPED:
            self._join(status)
            status = self._settled(timeout)
        self._raise_if_lost(status)
        return self._without_window()

    def stage(self, position: Position) -> None:
        """Start staging `position` in the background. Idempotent; a newer target replaces an older one."""
        self.server.rpc(WorkerMethod.STAGE, position.version, position.digest)

    def prepare(
        self, position: Position, timeout: float = 600.0, wanted: Callable[[ReplicaStatus], bool] | None = None
    ) -> None:
        """`wait_staged` from any server state, also just (re)started or poisoned."""
        deadline, status = Deadline(timeout), self.status()
        if status.state == WorkerState.POISONED:
            self.heal()
        elif status.position is None:
            self.attach(timeout)
        self.wait_staged(position, deadline.left, wanted)

    def wait_staged(
        self, position: Position, timeout: float = 600.0, wanted: Callable[[ReplicaStatus], bool] | None = None
    ) -> None:
        """Return once every rank has staged `position`, or already serves it. Starts the staging if needed.

        Args:
            wanted: called with every status on the way; ReplicaBehind once it returns False.
        """
        self.stage(position)

        def staged(status: ReplicaStatus) -> bool:
            self._raise_if_lost(status)
            if status.all_ready_for(position):
                return True
            if wanted is not None and not wanted(status):
                raise ReplicaBehind(f"{self.server.url} is to serve another version: {position} is not committed")
            if status.state == WorkerState.STAGING:
                return False
            if status.error is not None:
                raise status.error
            self.stage(position)  # another client had something else staged
            return False

        self._until(staged, timeout, f"stage {position}")

    def commit(self, position: Position) -> CommitReport:
        """Make all ranks serve the staged `position`; see the top of this file.

        After an error the server serves the old weights, or the new ones if the commit happened before the error. In
        both cases it runs again if it can be reached. If it cannot, it ends the window by itself.
        """
        status = self._without_window()
        if status.all_at(position):
            return CommitReport(position, pause_s=0.0, commit_s=0.0, stage_s=0.0, changed=0)
        pause = not status.atomic if self._pause is None else self._pause
        if not pause:
            applied = self._commit(position)
            return self._understood(lambda: commit_report(position, applied, pause_s=longest_turn(applied)))
        window = PauseWindow(position, uuid.uuid4().hex)
        self._token = window.token
        self.server.rpc(WorkerMethod.OPEN, position.version, position.digest, window.token)
        started = time.perf_counter()
        try:
            self.server.pause()
            applied = self._commit(position)
            resumed = self._end(window)
        except BaseException:
            self._try_to_recover()
            raise
        return self._understood(lambda: commit_report(position, applied, pause_s=resumed - started))

    def recover(self) -> bool:
        """Close a commit window that a client left open. True if there was one."""
        return self._recover(self.status())

    def wait_verified(self, position: Position, timeout: float = 600.0) -> None:
        """Return once every rank has verified the digest of its live weights at `position`.

        Raises:
            ReplicaPoisoned: a digest was wrong.
            WrongParent: the server serves another position, or was restarted and does not know its own.
        """

        def verified(status: ReplicaStatus) -> bool:
            self._raise_if_lost(status)
            if status.state == WorkerState.DETACHED:  # nothing is verified before it is attached
                raise WrongParent(f"{self.server.url} was restarted: attach it first")
            if status.position is not None and status.position != position:
                raise WrongParent(f"{self.server.url} serves {status.position}, not {position}")
            return status.position == position and status.state != WorkerState.APPLIED

        self._until(verified, timeout, f"verify {position}")

    def verify(self, timeout: float = 600.0) -> ReplicaStatus:
        """Have every worker look at all of its live weights now, while requests go on. Returns the status afterwards.

        Raises:
            ReplicaPoisoned: they are wrong, or were wrong and the server has rebuilt them meanwhile.
            ReplicaRefused: the server knows no version that they should be.
        """
        before = self._settled(timeout)
        self._raise_if_lost(before)
        if before.position is None:
            raise ReplicaRefused(
                f"{self.server.url} is {before.state}: it does not know which version its weights should be. Bring it "
                "to one first, for example with `hubsync follow --once`"
            )
        asked = [rank["verification"]["asked"] for rank in self.server.rpc(WorkerMethod.VERIFY)]

        def answered(status: ReplicaStatus) -> bool:
            self._raise_if_lost(status)
            answers = [rank["verification"]["answered"] for rank in status.ranks]
            if len(answers) != len(asked) or any(rank["verification"]["asked"] == 0 for rank in status.ranks):
                raise ReplicaRefused(f"{self.server.url} was restarted meanwhile: attach it first")
            return all(answer >= number for answer, number in zip(answers, asked, strict=True))

        after = self._until(answered, timeout, "verify its weights")
        for rank, (then, now) in enumerate(zip(before.ranks, after.ranks, strict=True)):
            if heals(now) > heals(then):
                raise ReplicaPoisoned(
                    f"{self.server.url}: rank {rank} was wrong: {now['verification']['healed']}. It has rebuilt its "
                    f"weights, and they are those of {after.position} now"
                )
        return after

    def heal(self) -> None:
        """Rebuild poisoned weights from the run, and drop what the wrong weights have cached.

        Raises:
            ReplicaRefused: the weights are not poisoned.
            NoPath, BucketError: it was not possible.
        """
        self.server.rpc(WorkerMethod.HEAL)

    def _settled(self, timeout: float) -> ReplicaStatus:
        """The status once no rank is still attaching."""
        return self._until(
            lambda status: status.state not in (WorkerState.DETACHED, WorkerState.ATTACHING),
            timeout,
            "find out where its weights are",
        )

    def _join(self, status: ReplicaStatus) -> None:
        """Have the ranks, which know what each holds, agree on their common position.

        The ranks wait for each other. Where a forward pass of one engine waits for another engine (experts spread over
        data parallel engines), the server is paused meanwhile.
        """
        if status.adapter is not None:
            self.server.load_adapter(status.adapter, str(status.adapter_path))
            return
        if not status.spans_engines:
            self.server.rpc(WorkerMethod.JOIN)
            return
        token = uuid.uuid4().hex
        self.server.rpc(WorkerMethod.HOLD, token)
        self.server.pause()
        try:
            self.server.rpc(WorkerMethod.JOIN)
        finally:
            self.server.resume()
            self.server.rpc(WorkerMethod.CLOSE, token)

    def _without_window(self) -> ReplicaStatus:
        """The status once no commit window is open. Other clients get time to close theirs."""
        while True:
            status = self.status()
            if status.window is None:
                return status
            if status.window.token == self._token or status.window.abandoned:
                self._recover(status)
            else:
                time.sleep(_PAUSE_S)

    def _commit(self, position: Position) -> list[dict[str, Any]]:
        """The commit request. Data parallel engines vote independently; those that did not commit are tried again."""
        commit = WorkerMethod.COMMIT, position.version, position.digest, self.kv_cache
        try:
            return self.server.rpc(*commit)
        except HubsyncError:
            status = self.status()
            if status.all_at(position) or not any(position_of(rank) == position for rank in status.ranks):
                raise
            logger.warning("only some engines of %s are at %s; trying again with the others", self.server.url, position)
        try:
            self.wait_staged(position, _CATCH_UP_S)
            return self.server.rpc(*commit)
        except HubsyncError as error:
            raise ReplicaRefused(
                f"some engines of {self.server.url} are at {position} and some are not (each serves one version, and "
                f"says which): {error}; commit again, or restart the server"
            ) from error

    def _end(self, window: PauseWindow) -> float:
        """Resume requests and close the window. Returns `time.perf_counter()` of the moment when requests went on."""
        self.server.resume()
        resumed = time.perf_counter()
        self.server.rpc(WorkerMethod.CLOSE, window.token)
        return resumed

    def _recover(self, status: ReplicaStatus) -> bool:
        if status.window is None:
            return False
        self._end(status.window)
        return True

    def _try_to_recover(self) -> None:
        try:
            self.recover()
        except ReplicaError as error:
            logger.warning("a commit window stays open until the server or the next client ends it: %s", error)

    def _understood(self, read: Callable[[], T]) -> T:
        """`read()`, with errors of unexpected answers as ReplicaUnsuitable."""
        try:
            return read()
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ReplicaUnsuitable(
                f"the workers of {self.server.url} do not answer as this side expects ({type(error).__name__}: "
                f"{error!s:.80}): install the same hubsync on both"
            ) from error

    def _raise_if_lost(self, status: ReplicaStatus) -> None:
        if status.state not in (WorkerState.POISONED, WorkerState.REFUSED):
            return
        if status.error is not None:
            raise status.error
        kind = ReplicaPoisoned if status.state == WorkerState.POISONED else ReplicaRefused
        raise kind(f"{self.server.url} is {status.state}; see the server's log")

    def _until(self, done: Callable[[ReplicaStatus], bool], timeout: float, what: str) -> ReplicaStatus:
        """The first status that is `done`; ReplicaUnsuitable after `timeout` seconds.

        The server answers when its workers have ended what they do. One that cannot wait is asked again and again.
        """
        for left in attempts(timeout, waiting_for=f"{self.server.url} to {what}", first=0.01, longest=0.25):
            if done(status := self._settling_status(left)):
                return status
        raise ReplicaUnsuitable(
            f"{self.server.url} did not {what} within {timeout:g} s (state {status.state}); "
            "see the server's log, or allow more time"
        )

    def _settling_status(self, left: float) -> ReplicaStatus:
        """The status once the workers have no job under way, or soon if that takes longer."""
        if not self._waits:
            return self.status()
        return self._read_status(self.server.rpc(WorkerMethod.WAIT, min(left, _WAIT_S)))
