"""Bringing one inference server from version to version, whatever dies on the way.

Staging happens beside generation. The commit is a small state machine, and every step of it may be a client's last:

    open      the workers record that a window opens, for which position and by whom
    pause     requests freeze between two forward passes; what they have cached is dropped
    commit    all ranks apply what they have staged, or none does
    label     responses from here on state the new version
    reset     no cached prefix of the old weights is left
    resume    frozen requests go on, with the new weights
    close     the workers forget the window

The next client finds the window in the workers' status and completes it (`recover`): from `label` on if the commit
happened, from `resume` on if it did not. If none comes, the engine core does so itself after a while. All steps are
idempotent.

With `kv_cache="keep"` the commit is one call, between two forward passes of a server that goes on: the engine core
labels the weights and empties the prefix cache in the same call. Where one forward pass is not at the same place on
all ranks (pipeline stages, experts spread over engines) there is a window all the same, in which requests keep their
caches.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hubsync.errors import (
    ConfigError,
    HubsyncError,
    ReplicaError,
    ReplicaPoisoned,
    ReplicaRefused,
    ReplicaUnsuitable,
    WrongParent,
)
from hubsync.manifest import Position

from .server import PROTOCOL, VLLMServer, worker_error

logger = logging.getLogger(__name__)

KV_CACHE = ("recompute", "keep")

# A window that is older than this has lost its client: a commit takes well under a second.
_ABANDONED_S = 15.0

# The reset after a commit can only fail while blocks are held, and nothing holds any while requests are frozen with
# their caches dropped; a transfer of cached blocks to other storage may still be ending.
_RESET_ATTEMPTS = 20
_PAUSE_S = 0.05


@dataclass(frozen=True)
class Window:
    """A commit window that some client opened.

    Attributes:
        position: where it was going.
        token: what closes it.
        age_s: seconds for which it has been open.
    """

    position: Position
    token: str
    age_s: float = 0.0


@dataclass(frozen=True)
class ReplicaStatus:
    """What all ranks of one server say, taken together.

    Attributes:
        state: of the rank that is furthest from being ready.
        position: where the live weights are; None while unknown, or when the ranks differ.
        staged: the position that all ranks have staged; None if there is none.
        window: a commit window left open, or None.
        error: the first rank's recorded error, or None.
        run_id: the run that the server follows, or None.
        ranks: the untouched answers, in rank order.
    """

    state: str
    position: Position | None
    staged: Position | None
    window: Window | None
    error: HubsyncError | None
    run_id: str | None
    ranks: tuple[dict[str, Any], ...]

    @property
    def core(self) -> bool:
        """Is hubsync's plugin active in the engine core?"""
        return all(bool(rank.get("core")) for rank in self.ranks)

    @property
    def atomic(self) -> bool:
        """Do all ranks that run one forward pass together get a request between the same two passes?

        Not where a pass is spread over pipeline stages, or over data parallel engines that share experts.
        """
        return all(int(rank.get("parallel", {}).get("pp", 1)) == 1 for rank in self.ranks) and not self.spans_engines

    @property
    def spans_engines(self) -> bool:
        """Does a forward pass of one engine wait for another engine?"""
        return any(int(rank.get("parallel", {}).get("dp", 1)) > 1 for rank in self.ranks)


@dataclass(frozen=True)
class CommitReport:
    """One commit.

    Attributes:
        position: where the server is now.
        pause_s: seconds in which no request could make progress (0 with `kv_cache="keep"`).
        commit_s: seconds the slowest rank says it needed to apply.
        stage_s: seconds the slowest rank says staging took (fetch, verify, decode, map).
        changed: elements written, over all ranks' shards; None if the workers do not say.
    """

    position: Position
    pause_s: float
    commit_s: float
    stage_s: float
    changed: int | None

    @property
    def version(self) -> int:
        return self.position.version


class Replica:
    """One inference server that follows a run.

    Args:
        server: how to reach it.
        kv_cache: what happens to the keys and values of running requests at a commit. `"recompute"`: requests freeze,
            and go on with everything they have recomputed by the new weights. `"keep"`: no pause; running requests go
            on with the keys and values they have, and no later request shares those. What running requests add to
            their caches after the commit may be shared, until they end.
    """

    def __init__(self, server: VLLMServer, kv_cache: str = "recompute"):
        if kv_cache not in KV_CACHE:
            raise ConfigError(f"kv_cache must be one of {', '.join(KV_CACHE)}, not {kv_cache!r}")
        self.server = server
        self.kv_cache = kv_cache
        self._token: str | None = None  # of the window that we opened last; it may still be open

    def check(self) -> None:
        """ReplicaUnsuitable unless the server is one that hubsync can drive."""
        self.server.version()
        ranks = self.server.rpc("hubsync_status")
        protocol = next((rank.get("protocol") for rank in ranks if rank.get("protocol") != PROTOCOL), PROTOCOL)
        if protocol != PROTOCOL:
            raise ReplicaUnsuitable(
                f"{self.server.url} speaks protocol {protocol}, this side {PROTOCOL}: install the same hubsync on both"
            )
        workers = self.server.world_size()
        if workers != len(ranks):
            raise ReplicaUnsuitable(
                f"{self.server.url} has {workers} workers but only {len(ranks)} can be reached; with data parallel "
                "engines hubsync's plugin must be active in the server (VLLM_PLUGINS): or start one server per engine"
            )

    def status(self) -> ReplicaStatus:
        return _merge(self.server.url, self.server.rpc("hubsync_status"))

    def attach(self, timeout: float = 600.0) -> ReplicaStatus:
        """Have the workers find out where their weights are, and finish what a dead client left open.

        Raises:
            RunMismatch, NoPath, ReplicaRefused, ...: whatever the workers say keeps them from following the run.
            ReplicaUnsuitable: see `check`; or still attaching after `timeout` seconds.
        """
        self.check()
        self.server.rpc("hubsync_attach")
        status = self._settled(timeout)
        if status.state == "mapped":
            self._join(status)
            status = self._settled(timeout)
        self._raise_if_lost(status)
        status = self._without_window()
        if status.position is not None:
            self.server.set_weight_version(str(status.position.version))
        return status

    def stage(self, position: Position) -> None:
        """Start staging `position` in the background. Idempotent; a newer target replaces an older one."""
        self.server.rpc("hubsync_stage", position.version, position.digest)

    def wait_staged(self, position: Position, timeout: float = 600.0) -> None:
        """Return once every rank has staged `position`, or already serves it. Starts the staging if nobody has."""
        self.stage(position)

        def staged(status: ReplicaStatus) -> bool:
            self._raise_if_lost(status)
            if position in (status.staged, status.position):
                return True
            if status.error is not None and status.state != "staging":
                raise status.error
            return False

        self._until(staged, timeout, f"stage {position}")

    def commit(self, position: Position) -> CommitReport:
        """Make all ranks serve the staged `position`; see the top of this file.

        An error means that the old weights are still served, or, where the commit had happened before the error, that
        the new ones are. In both cases the server is running again if it can be reached at all; if it cannot, the
        next `commit`, `attach` or `recover` of any client finishes the window.
        """
        status = self._without_window()
        if status.position == position:
            self.server.set_weight_version(str(position.version))
            return CommitReport(position, pause_s=0.0, commit_s=0.0, stage_s=0.0, changed=0)
        keep = self.kv_cache == "keep"
        if keep and not status.core:
            raise ReplicaUnsuitable(
                f"{self.server.url} cannot empty its prefix cache while it runs: hubsync's plugin is not active in its "
                'engine core (VLLM_PLUGINS, or a vLLM that has moved it); use kv_cache="recompute"'
            )
        if keep and status.atomic:
            applied = self.server.rpc("hubsync_commit", position.version, position.digest, "keep")
            return self._report(position, applied, pause_s=0.0)
        window = Window(position, uuid.uuid4().hex)
        self._token = window.token
        self.server.rpc("hubsync_open", position.version, position.digest, window.token)
        started = time.perf_counter()
        try:
            self.server.pause(clear_cache=not keep)
            applied = self.server.rpc("hubsync_commit", position.version, position.digest, self.kv_cache)
            resumed = self._complete(window, reset=not keep)
        except BaseException:
            self._try_to_recover()
            raise
        return self._report(position, applied, pause_s=resumed - started)

    def recover(self) -> bool:
        """Complete a commit window that a client left open. True if there was one."""
        return self._recover(self.status())

    def wait_verified(self, position: Position, timeout: float = 600.0) -> None:
        """Return once every rank has recomputed the digest of its live weights at `position` and found it right.

        Raises:
            ReplicaPoisoned: it was wrong.
            WrongParent: the server serves another position.
        """

        def verified(status: ReplicaStatus) -> bool:
            self._raise_if_lost(status)
            if status.position is not None and status.position != position:
                raise WrongParent(f"{self.server.url} serves {status.position}, not {position}")
            return status.position == position and status.state != "applied"

        self._until(verified, timeout, f"verify {position}")

    def heal(self) -> None:
        """Rebuild poisoned weights from the run, and drop what wrong weights have cached.

        ReplicaRefused if they are not poisoned; NoPath or a BucketError if it was not possible.
        """
        self.server.rpc("hubsync_heal")
        self._reset_prefix_cache()

    def _settled(self, timeout: float) -> ReplicaStatus:
        """The status once no rank is still finding out where its weights are."""
        return self._until(
            lambda status: status.state not in ("detached", "attaching"), timeout, "find out where its weights are"
        )

    def _join(self, status: ReplicaStatus) -> None:
        """Have the ranks, which know what each holds, agree on what they hold together.

        They wait for each other, so where a forward pass of one engine waits for another engine (experts spread over
        data parallel engines) the server is paused meanwhile.
        """
        if not status.spans_engines:
            self.server.rpc("hubsync_join")
            return
        self.server.pause()
        try:
            self.server.rpc("hubsync_join")
        finally:
            self.server.resume()

    def _without_window(self) -> ReplicaStatus:
        """The status once no commit window is open: other clients are given time to close theirs."""
        while True:
            status = self.status()
            if status.window is None:
                return status
            if status.window.token == self._token or status.window.age_s > _ABANDONED_S:
                self._recover(status)
            else:
                time.sleep(_PAUSE_S)

    def _complete(self, window: Window, reset: bool = True) -> float:
        """Everything after the commit. The server runs again afterwards even if something in here fails.

        Returns `time.perf_counter()` of when requests went on.
        """
        try:
            self.server.set_weight_version(str(window.position.version))
            if reset:
                self._reset_prefix_cache()
        finally:
            self.server.resume()
        resumed = time.perf_counter()
        self.server.rpc("hubsync_close", window.token)
        return resumed

    def _reset_prefix_cache(self) -> None:
        for _ in range(_RESET_ATTEMPTS):
            if self.server.reset_prefix_cache():
                return
            time.sleep(_PAUSE_S)
        raise ReplicaRefused(
            f"{self.server.url} would not reset its prefix cache: it may hold keys and values of older weights; "
            "try `recover` again, or restart the server"
        )

    def _recover(self, status: ReplicaStatus) -> bool:
        window = status.window
        if window is None:
            return False
        arrived = [_position(rank) == window.position for rank in status.ranks]
        if any(arrived) and not all(arrived):
            # The ranks of one engine commit together, but engines do so one by one. Those that have not may still hold
            # it staged; if not, the others take it back.
            try:
                self.server.rpc("hubsync_commit", window.position.version, window.position.digest)
            except ReplicaError as error:
                logger.warning("taking back a commit that not every engine has made: %s", error)
                self.server.answers("hubsync_undo")  # engines that have nothing to take back say so
                arrived = [False]
        if any(arrived):
            self._complete(window)
        else:
            self.server.resume()
            self.server.rpc("hubsync_close", window.token)
        return True

    def _try_to_recover(self) -> None:
        try:
            self.recover()
        except ReplicaError as error:
            logger.warning("a commit window stays open until the next commit, of any client: %s", error)

    def _report(self, position: Position, applied: list[dict[str, Any]], pause_s: float) -> CommitReport:
        changed = [int(rank["changed"]) for rank in applied if "changed" in rank]
        return CommitReport(
            position=position,
            pause_s=pause_s,
            commit_s=_slowest(applied, "commit_s"),
            stage_s=_slowest(applied, "stage_s"),
            changed=sum(changed) if len(changed) == len(applied) else None,
        )

    def _raise_if_lost(self, status: ReplicaStatus) -> None:
        if status.state not in ("poisoned", "refused"):
            return
        if status.error is not None:
            raise status.error
        kind = ReplicaPoisoned if status.state == "poisoned" else ReplicaRefused
        raise kind(f"{self.server.url} is {status.state}; see the server's log")

    def _until(self, done: Callable[[ReplicaStatus], bool], timeout: float, what: str) -> ReplicaStatus:
        """The first status that is `done`, asking at growing intervals; ReplicaUnsuitable after `timeout` seconds."""
        deadline, pause = time.monotonic() + timeout, 0.005
        while not done(status := self.status()):
            if time.monotonic() > deadline:
                raise ReplicaUnsuitable(
                    f"{self.server.url} did not {what} within {timeout:g} s (state {status.state}); "
                    "see the server's log, or allow more time"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        return status


# Furthest from ready first; of several ranks, the worst speaks for the server.
_STATES = ("poisoned", "refused", "detached", "attaching", "mapped", "staging", "applied", "ready", "staged")


def _merge(url: str, ranks: list[dict[str, Any]]) -> ReplicaStatus:
    positions = {_position(rank) for rank in ranks}
    staged = {_position(rank.get("staged") or {}) for rank in ranks}
    windows = [rank["window"] for rank in ranks if rank.get("window")]
    failures = [rank["error"] for rank in ranks if rank.get("error")]
    return ReplicaStatus(
        state=min((str(rank.get("state")) for rank in ranks), key=_badness),
        position=positions.pop() if len(positions) == 1 else None,
        staged=staged.pop() if len(staged) == 1 else None,
        window=_window(windows[0]) if windows else None,
        error=worker_error(failures[0], url) if failures else None,
        run_id=ranks[0].get("run_id"),
        ranks=tuple(ranks),
    )


def _window(document: dict[str, Any]) -> Window:
    position = Position(int(document["version"]), str(document["digest"]))
    return Window(position, str(document["token"]), float(document.get("age_s", 0.0)))


def _badness(state: str) -> int:
    return _STATES.index(state) if state in _STATES else 0


def _position(document: dict[str, Any]) -> Position | None:
    version, digest = document.get("version"), document.get("digest")
    return None if version is None or digest is None else Position(int(version), str(digest))


def _slowest(ranks: list[dict[str, Any]], metric: str) -> float:
    return max(float((rank.get("metrics") or rank).get(metric) or 0.0) for rank in ranks)
