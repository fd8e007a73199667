"""Push: bring many inference servers to a version in parallel, so that a dead or slow one does not delay the others.

Each server has one thread, which alone stages and commits there. A hot-load is a job on each of these threads: stage,
wait until all servers, or a quorum of them, have staged, then commit. A late server commits by itself when it is ready.
If another version was requested meanwhile, it goes there directly.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from hubsync.apply.protocol import KvPolicy, WorkerState
from hubsync.errors import ConfigError, HubsyncError, ReplicaBehind, ReplicaUnreachable
from hubsync.format.manifest import Position
from hubsync.retry import Deadline, attempts, wait_reporting

from .engines import connect, schemes
from .replica import Replica
from .reports import CommitReport, ReplicaStatus
from .server import checked_seconds, checked_urls, plain_url

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STATUS_S = 10.0  # a server that does not answer a status in this time is reported as unreachable
_RETRY_S = 0.5


@dataclass(frozen=True)
class ReplicaReport:
    """One server of a deployment.

    Attributes:
        url: of the server.
        state: state of its workers (`WorkerState`); "unreachable" or "unsuitable" if they do not answer.
        position: what it serves; None while unknown.
        lag: versions from there to the one requested last, negative if that is older; None while unknown.
        error: why it does not serve that version, or None.
        commit: its commit in this hot-load, or None.
    """

    url: str
    state: str
    position: Position | None
    lag: int | None
    error: HubsyncError | None
    commit: CommitReport | None = None

    @property
    def version(self) -> int | None:
        return None if self.position is None else self.position.version


@dataclass(frozen=True)
class HotloadReport:
    """One hot-load of a deployment.

    Attributes:
        position: the requested position.
        needed: number of servers that had to commit it.
        replicas: a report for each server, in the order of the deployment.
        hotload_s: seconds from the call until it returned.
    """

    position: Position
    needed: int
    replicas: tuple[ReplicaReport, ...]
    hotload_s: float

    @property
    def commits(self) -> tuple[CommitReport, ...]:
        """Commits of the servers that serve the position now, in the deployment's order."""
        return tuple(replica.commit for replica in self.replicas if replica.commit is not None)

    def raise_for_quorum(self) -> None:
        """Raise the first server's error if fewer than the needed servers have committed."""
        if len(self.commits) < self.needed:
            raise next(replica.error for replica in self.replicas if replica.error is not None)


class Deployment:
    """The servers that a publisher pushes to. Nothing is sent before the first call.

    The servers keep all state, so the deployment of a restarted trainer continues with servers as they are.

    Args:
        servers: base URLs, for example `http://10.0.0.7:8000`.
        kv_cache: see [`Replica`].
        api_key: the servers' `--api-key`, or the token of the proxy in front of them; default is `VLLM_API_KEY` of the
            environment.
        quorum: number of servers that must have staged a version before it is committed; 0 for all.
        request_timeout: seconds a server may take to answer one request.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        kv_cache: str = KvPolicy.DEFAULT,
        api_key: str | None = None,
        quorum: int = 0,
        request_timeout: float = 120.0,
    ):
        checked_seconds("request_timeout", request_timeout)
        urls = checked_urls(servers, schemes())
        self._members = [_Member(url, kv_cache, api_key, request_timeout) for url in urls]
        self._quorum = quorum
        self._request_timeout = request_timeout
        self._is_closed = False
        self._target: Position | None = None
        self._needed(quorum)

    def signal(self, position: Position) -> None:
        """Start staging `position` on all servers, and return at once. `hotload` reports what fails."""
        self._require_open()
        self._target = position
        for member in self._members:
            member.wanted = position
            member.thread.submit(member.stage, position)

    def hotload(self, position: Position, quorum: int | None = None, timeout: float = 600.0) -> HotloadReport:
        """Commit `position`, newer or older than the served one, once all servers or a quorum have staged it.

        Args:
            quorum: replaces the deployment's; 0 for all.
            timeout: seconds that servers have for staging. The ready ones then commit without the others.

        Errors of servers are in the report and are not raised; see its `raise_for_quorum`.
        """
        self._require_open()
        checked_seconds("timeout", timeout, zero=True)
        started, needed = time.perf_counter(), self._needed(self._quorum if quorum is None else quorum)
        self._target = position
        turn = _Hotload(position, len(self._members))
        try:
            for member in self._members:
                member.wanted = position
                member.thread.submit(member.bring, turn, timeout)
            turn.conduct(needed, timeout, self._request_timeout)
        finally:  # also when interrupted: no thread may wait for ever
            turn.let_go()
        reports = tuple(self._outcome(member, turn, timeout) for member in self._members)
        for member, report in zip(self._members, reports, strict=True):
            member.mention(report.error)
        return HotloadReport(position, needed, reports, time.perf_counter() - started)

    def status(self) -> tuple[ReplicaReport, ...]:
        """The status of each server now."""
        self._require_open()
        return self._each(self._look)

    def wait_ready(self, timeout: float = 600.0) -> tuple[ReplicaReport, ...]:
        """Return once all servers, or a quorum, are up and know their position in the run.

        Raises the first server's error if there are too few after `timeout` seconds, or too many are unsuitable.
        """
        self._require_open()
        deadline = Deadline(checked_seconds("timeout", timeout, zero=True))
        ready: list[str] = []

        def meet(member: _Member) -> None:
            member.meet(deadline, lambda: len(ready) >= self._needed(self._quorum))
            ready.append(member.url)

        errors = self._each(lambda member: _error_of(lambda: meet(member)))
        self._raise_unless_enough(errors)
        return self.status()

    def warm_up(self, retries: int = 10, timeout: float = 600.0) -> None:
        """Have each server generate one token, so that the first request does not pay for first-use initialisation.

        Args:
            retries: number of repeated attempts of a server.
            timeout: seconds after which no server makes another attempt.

        Raises the first server's error if all its attempts fail and fewer servers than the quorum are warm.
        """
        self._require_open()
        deadline = Deadline(checked_seconds("timeout", timeout, zero=True))
        errors = self._each(lambda member: _error_of(lambda: member.warm_up(retries, deadline)))
        self._raise_unless_enough(errors)

    def close(self, leave_serving: bool = True) -> None:
        """Close the deployment. Servers go on serving; with `leave_serving=False` they are paused until resumed."""
        if self._is_closed:
            return
        self._is_closed = True
        for member in self._members:
            member.wanted = None
        if not leave_serving:
            for error in self._each(lambda member: _error_of(member.replica.server.pause)):
                if error is not None:
                    logger.warning("not paused: %s", error)
        for member in self._members:
            member.close()

    # --- details ------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this deployment is closed: make a new one, it continues with the servers as they are")

    def _needed(self, quorum: int) -> int:
        if not isinstance(quorum, int) or not 0 <= quorum <= len(self._members):
            raise ConfigError(f"quorum must be 0 (all) or at most the {len(self._members)} servers, not {quorum}")
        return quorum or len(self._members)

    def _each(self, act: Callable[[_Member], T]) -> tuple[T, ...]:
        with ThreadPoolExecutor(len(self._members), thread_name_prefix="hubsync-deployment") as threads:
            return tuple(threads.map(act, self._members))

    def _raise_unless_enough(self, errors: Sequence[HubsyncError | None]) -> None:
        failed = [error for error in errors if error is not None]
        if failed and len(errors) - len(failed) < self._needed(self._quorum):
            raise failed[0]

    def _look(self, member: _Member) -> ReplicaReport:
        try:
            status = member.watcher.status()
        except HubsyncError as error:
            return self._report(member.url, _state_of(error), None, error)
        return self._report(member.url, status.state, status.position, status.error)

    def _outcome(self, member: _Member, turn: _Hotload, timeout: float) -> ReplicaReport:
        outcome, seen = turn.outcomes.get(member.url), member.seen
        if isinstance(outcome, CommitReport):
            return self._report(member.url, WorkerState.APPLIED, outcome.position, None, outcome)
        error = outcome or ReplicaBehind(
            f"{member.url} has not committed {turn.position} yet ({timeout:g} s allowed): it will when it is ready, or "
            "be taken along with the next version"
        )
        state = seen.state if seen is not None else _state_of(error)
        return self._report(member.url, state, None if seen is None else seen.position, error)

    def _report(
        self,
        url: str,
        state: str,
        position: Position | None,
        error: HubsyncError | None,
        commit: CommitReport | None = None,
    ) -> ReplicaReport:
        lag = None if position is None or self._target is None else self._target.version - position.version
        return ReplicaReport(url, state, position, lag, error, commit)


class _Hotload:
    """One hot-load: servers report that they are ready, are released together, and report the outcome."""

    def __init__(self, position: Position, members: int):
        self.position = position
        self.outcomes: dict[str, CommitReport | HubsyncError] = {}  # by URL
        self._members = members
        self._ready: set[str] = set()
        self._going = False
        self._changed = threading.Condition()

    def conduct(self, needed: int, timeout: float, commit_timeout: float) -> None:
        """Release the servers once `needed` are ready, no other can be, or time is up; then wait for their outcomes."""
        with self._changed:
            staged = f"{needed} servers to stage {self.position}"
            self._wait_for(lambda: len(self._ready) >= needed or self._all_have_reported(), timeout, staged)
            self.let_go()
            first = set(self._ready)
            committed = f"{len(first)} servers to commit {self.position}"
            self._wait_for(lambda: first <= self.outcomes.keys(), commit_timeout, committed)

    def let_go(self) -> None:
        """Release all servers that wait in `ready`, now and later."""
        with self._changed:
            self._going = True
            self._changed.notify_all()

    def ready(self, url: str) -> None:
        """Report that `url` is ready, and return when it may commit."""
        with self._changed:
            self._ready.add(url)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._going)

    def settle(self, url: str, outcome: CommitReport | HubsyncError) -> None:
        with self._changed:
            self.outcomes[url] = outcome
            self._changed.notify_all()

    def _wait_for(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        wait_reporting(lambda seconds: self._changed.wait_for(done, seconds), timeout, waiting_for=what)

    def _all_have_reported(self) -> bool:
        return len(self._ready | self.outcomes.keys()) == self._members


class _Member:
    """One server of a deployment.

    Attributes:
        thread: stages and commits, one after the other.
        wanted: position that the server was last asked for; jobs for another one give up.
        seen: its last status before a version is reached; None if the last attempt did not reach it.
        watcher: reads the status while `thread` works, with a short timeout.
    """

    def __init__(self, url: str, kv_cache: str, api_key: str | None, timeout: float):
        self.url = plain_url(url)
        self.replica = Replica(connect(url, api_key, timeout=timeout), kv_cache)
        self.watcher = Replica(connect(url, api_key, timeout=min(timeout, _STATUS_S)))
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="hubsync-replica")
        self.wanted: Position | None = None
        self.seen: ReplicaStatus | None = None
        self._is_known = False
        self._mentioned: type[HubsyncError] | None = None

    def mention(self, error: HubsyncError | None) -> None:
        """Log why the server is behind, once per kind of error: it is asked again for every version."""
        kind = None if error is None else type(error)
        if kind is self._mentioned:
            return
        self._mentioned = kind
        if error is None:
            logger.info("%s follows again", self.url)
        else:
            logger.warning("%s is left behind: %s", self.url, error)

    def stage(self, position: Position) -> None:
        if self.wanted != position:
            return
        try:
            self._know()
            if self.replica.status().position is None:
                self.replica.attach()
            self.replica.stage(position)
        except HubsyncError as error:
            logger.debug("not staged yet: %s", error)

    def bring(self, turn: _Hotload, timeout: float) -> None:
        """Stage and commit; a success or an error is an outcome of the hot-load."""
        self.seen = None
        try:
            outcome: CommitReport | HubsyncError = self._bring(turn, timeout)
        except HubsyncError as error:
            outcome = error
        except Exception as error:  # an unexpected error must not leave the other servers waiting
            outcome = HubsyncError(f"{self.url}: {type(error).__name__}: {error}")
            logger.exception("while bringing %s to %s", self.url, turn.position)
        turn.settle(self.url, outcome)

    def _bring(self, turn: _Hotload, timeout: float) -> CommitReport:
        position = turn.position
        self._require_wanted(position)
        self._know()
        self.replica.prepare(position, timeout, lambda status: self._is_wanted(position, status))
        turn.ready(self.url)
        self._require_wanted(position)
        return self.replica.commit(position)

    def meet(self, deadline: Deadline, is_enough: Callable[[], bool]) -> None:
        """Return once the server is up and attached.

        While it is unreachable, it is asked again until the deadline, or until the others are enough.
        """

        def attach() -> None:
            self._know()
            if self.replica.status().position is None:
                self.replica.attach(deadline.left)

        for left in attempts(deadline, waiting_for=f"{self.url} to be ready", longest=_RETRY_S):
            try:
                return attach()
            except ReplicaUnreachable as error:
                self.mention(error)
                if left == 0.0 or is_enough():
                    raise

    def warm_up(self, retries: int, deadline: Deadline) -> None:
        """Return once the server has generated a token. Raises the error of the last attempt."""
        what = f"{self.url} to generate a token"
        for done, left in enumerate(attempts(deadline, waiting_for=what, first=_RETRY_S, longest=_RETRY_S)):
            try:
                return self.replica.server.generate_a_token()
            except HubsyncError as error:
                if done >= retries or left == 0.0:
                    raise
                logger.debug("trying again: %s", error)

    def close(self) -> None:
        """Cancel queued work. Close connections once the thread has finished work in progress, for example a commit."""
        self.thread.submit(self.replica.server.close)
        self.thread.shutdown(wait=False)
        self.watcher.server.close()

    def _know(self) -> None:
        if not self._is_known:
            self.replica.check()
            self._is_known = True

    def _is_wanted(self, position: Position, status: ReplicaStatus) -> bool:
        self.seen = status
        return self.wanted == position

    def _require_wanted(self, position: Position) -> None:
        if self.wanted != position:
            raise ReplicaBehind(f"{self.url} is wanted at {self.wanted or 'no version'} now, not at {position}")


def _state_of(error: HubsyncError) -> str:
    return "unreachable" if isinstance(error, (ReplicaUnreachable, ReplicaBehind)) else "unsuitable"


def _error_of(act: Callable[[], None]) -> HubsyncError | None:
    try:
        act()
    except HubsyncError as error:
        return error
    return None
