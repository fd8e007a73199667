"""Several servers that follow one run, some of which may be slow, restarting or dead.

Each server has a thread of its own that brings it to the newest position asked for, so none waits for a slower one. A
position counts as delivered when a quorum of the servers serves it; the others are still on their way then, or will be
asked again with the next position.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hubsync.errors import ConfigError, HubsyncError, NoPath, ReplicaError, ReplicaPoisoned, ReplicaUnreachable
from hubsync.manifest import Position

from .sync import CommitReport, Replica

logger = logging.getLogger(__name__)

_RETRY_S = 1.0  # until a server that could not be reached is asked again
_GRACE_S = 5.0  # at the end, for threads that are between two requests


@dataclass(frozen=True)
class Delivery:
    """A position that a quorum serves.

    Attributes:
        position: what was delivered.
        commits: reports of the servers that serve it, in the order of the fleet.
        behind: URL -> what is known of why not, for the others.
    """

    position: Position
    commits: tuple[CommitReport, ...]
    behind: dict[str, str]


class Fleet:
    """The servers of a run, known by name.

    Args:
        replicas: one for each server. They are used from threads of the fleet only.
        quorum: how many of them must serve a position for it to be delivered; None is all of them.
        stage_timeout: seconds one server may take to find its place in the run, or to stage a position.
        make_path: called where the run holds no way from what a server has to the position, and makes one.

    Raises:
        ConfigError: without a server, or with a quorum that is not between 1 and their number.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        quorum: int | None = None,
        stage_timeout: float = 600.0,
        make_path: Callable[[], object] = lambda: None,
    ):
        if not replicas:
            raise ConfigError("a fleet needs at least one server")
        self.quorum = len(replicas) if quorum is None else quorum
        if not 1 <= self.quorum <= len(replicas):
            raise ConfigError(f"quorum must be between 1 and the number of servers ({len(replicas)}), not {quorum}")
        self._news = threading.Condition()
        self._followers = [_Follower(replica, self._news, stage_timeout, make_path) for replica in replicas]
        for follower in self._followers:
            follower.start()

    def deliver(self, position: Position, timeout: float = 600.0) -> Delivery:
        """Bring the servers to `position`; return once a quorum serves it.

        A server that cannot be reached is asked again until then, because it may be starting.

        Raises:
            ReplicaError: `timeout` seconds have passed, or too many servers have refused. It names every server that is
                missing, and why. With one server, its own error.
        """
        deadline = time.monotonic() + timeout
        with self._news:
            for follower in self._followers:
                follower.ask(position)
            self._news.notify_all()
            while True:
                there = [follower.report for follower in self._followers if follower.report is not None]
                if len(there) >= self.quorum:
                    return Delivery(position, tuple(there), self._behind())
                possible = sum(not follower.gave_up for follower in self._followers)
                left = deadline - time.monotonic()
                if possible < self.quorum or left <= 0:
                    raise self._missed(position, len(there), timeout if left <= 0 else None)
                self._news.wait(left)

    def close(self) -> None:
        """End the threads. A server that is on its way to a position is left to find the rest by itself."""
        with self._news:
            for follower in self._followers:
                follower.stop()
            self._news.notify_all()
        for follower in self._followers:
            follower.join(_GRACE_S)

    def _behind(self) -> dict[str, str]:
        return {
            follower.url: str(follower.failure or "still on its way")
            for follower in self._followers
            if follower.report is None
        }

    def _missed(self, position: Position, there: int, timeout: float | None) -> HubsyncError:
        if len(self._followers) == 1 and self._followers[0].failure is not None:
            return self._followers[0].failure
        when = "" if timeout is None else f" after {timeout:g} s"
        missing = "; ".join(f"{url}: {reason}" for url, reason in self._behind().items())
        return ReplicaError(
            f"{there} of {len(self._followers)} servers serve {position}{when}, and {self.quorum} must. {missing}. "
            "Restart what is missing, or set a quorum that does without it"
        )


class _Follower(threading.Thread):
    """Brings one server to the newest position asked for. All attributes are guarded by the fleet's condition.

    Attributes:
        report: of the commit of the position asked for; None until then.
        failure: of the last attempt.
        gave_up: there is no point in trying again before another position is asked for.
    """

    def __init__(
        self, replica: Replica, news: threading.Condition, stage_timeout: float, make_path: Callable[[], object]
    ):
        super().__init__(name=f"hubsync-follow-{replica.server.url}", daemon=True)
        self.url = replica.server.url
        self.report: CommitReport | None = None
        self.failure: HubsyncError | None = None
        self.gave_up = False
        self._replica = replica
        self._news = news
        self._stage_timeout = stage_timeout
        self._make_path = make_path
        self._target: Position | None = None
        self._stopped = False

    def ask(self, position: Position) -> None:
        self._target, self.report, self.failure, self.gave_up = position, None, None, False

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        while (target := self._next()) is not None:
            self._attempt(target)
        self._replica.server.close()

    def _next(self) -> Position | None:
        """What to bring the server to; waits while there is nothing to do. None: stop."""
        with self._news:
            if self.failure is not None and not self.gave_up and not self._stopped:
                self._news.wait(_RETRY_S)
            while not self._stopped and (self._target is None or self.report is not None or self.gave_up):
                self._news.wait()
            return None if self._stopped else self._target

    def _attempt(self, target: Position) -> None:
        report: CommitReport | None = None
        failure: HubsyncError | None = None
        gave_up = False
        try:
            report = self._bring_to(target)
        except ReplicaUnreachable as error:
            failure = error
        except HubsyncError as error:
            failure, gave_up = error, True
        except Exception as error:  # a defect of ours must not look like a server that never answers
            logger.exception("while bringing %s to %s", self.url, target)
            failure, gave_up = ReplicaError(f"{self.url}: {type(error).__name__}: {error}"), True
        with self._news:
            if self._target == target:  # else something newer was asked for meanwhile
                self.report, self.failure, self.gave_up = report, failure, gave_up
                self._news.notify_all()

    def _bring_to(self, target: Position) -> CommitReport:
        try:
            return self._commit(target)
        except NoPath as no_path:
            logger.warning("making a new way to %s: %s", target, no_path)
            self._make_path()
        except ReplicaPoisoned as poisoned:
            logger.warning("%s. Rebuilding the server's weights", poisoned)
            self._replica.heal()
        return self._commit(target)

    def _commit(self, target: Position) -> CommitReport:
        replica = self._replica
        if replica.status().position is None:
            replica.attach(self._stage_timeout)
        replica.wait_staged(target, self._stage_timeout)
        return replica.commit(target)
