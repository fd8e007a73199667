"""Session: one worker's state machine with one run: attach, stage in the background, commit, verify, heal.

The state machine is the same for whole models and for LoRA adapters. `Served` holds the differences: how weights are
found, and how a version is prepared, loaded and verified. `served_model` and `served_adapter` implement it.

Two threads meet here. The worker's *main* thread runs forward passes and answers requests. It commits, undoes and
heals, so a write never meets a forward pass. One *background* thread attaches, downloads, stages and verifies, one job
after the other, and only reads weights. A verification queued by a commit therefore always ends before anything that is
staged after it, and everything staged is based on verified weights.

With several ranks the main threads of all of them get the same requests in the same order. The collectives in `join`,
`commit` and `undo` rest on that: whether one is made depends only on requests that all ranks had, never on how far this
rank's background thread is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from hubsync.errors import FormatError, HubsyncError, ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.format.manifest import Position

from .background import Background
from .protocol import WorkerState, error_to_json

logger = logging.getLogger("vllm.hubsync")


class Served(Protocol):
    """What a worker serves of a run, and how a version of it is prepared and loaded.

    `attach`, `stage` and `verify` run on the background thread and only read live weights. All else runs on the main
    thread. All methods may raise HubsyncErrors.
    """

    metrics: dict[str, float]
    """Part of the status. The session adds its own."""

    remedy: str
    """A sentence: what an operator does when healing fails."""

    @property
    def run_id(self) -> str | None: ...

    @property
    def position(self) -> Position | None:
        """Position of the served weights; None until it is known."""
        ...

    @property
    def staged(self) -> Position | None: ...

    @property
    def mapped(self) -> bool:
        """Has `attach` found what this rank holds?"""
        ...

    @property
    def joined(self) -> bool:
        """Have the ranks agreed on what all of them hold?"""
        ...

    @property
    def verified(self) -> bool:
        """Has the digest been recomputed from the served weights since the last write?"""
        ...

    @property
    def poisoned(self) -> str | None:
        """Why the served weights are not known to be right; None if they are."""
        ...

    def details(self) -> dict[str, Any]:
        """More fields for the status."""
        ...

    def attach(self) -> None:
        """Map this rank's weights and, once the ranks have joined or there is only one, find its position."""
        ...

    def join(self, obstacle: HubsyncError | None) -> HubsyncError | None:
        """Combine the inventories of all ranks. A collective.

        Args:
            obstacle: why this rank cannot join.

        Returns:
            why the parts do not form a whole; None if they do.

        Raises:
            the first rank's obstacle, on all ranks.
        """
        ...

    def layout(self) -> dict[str, Any] | None:
        """The class of every tensor in this rank's memory; None before it is mapped."""
        ...

    def expect(self, target: Position) -> None:
        """`target` is wanted next. Raise if it cannot be staged now."""
        ...

    def stage(self, target: Position) -> int:
        """Prepare the version at `target`. Returns bytes downloaded."""
        ...

    def discard(self) -> None:
        """Forget the staged version."""
        ...

    def commit(self, target: Position) -> int:
        """Serve `target` on all ranks, or on none. A collective. Returns elements written."""
        ...

    def undo(self) -> Position:
        """Take the last commit back, on all ranks or on none. A collective. Returns the position afterwards."""
        ...

    def doubt(self) -> None:
        """A sound delta did not fit: require another verification, if there is a digest."""
        ...

    def verify(self) -> bool:
        """Recompute the digest of the served weights. False if they changed meanwhile, so that nothing is known."""
        ...

    def heal(self, background: Background) -> int:
        """Rebuild the served weights. Returns elements written. Take `background.working` to use the run's reader."""
        ...

    def poison(self, reason: str) -> None:
        """From here on the served weights are not known to be right."""
        ...


@dataclass
class CommitWindow:
    """A commit that a client is driving: it has paused the server, or is about to."""

    position: Position
    token: str
    committed: bool
    opened: float

    @property
    def age(self) -> float:
        """Seconds."""
        return time.monotonic() - self.opened

    def to_json(self) -> dict[str, Any]:
        return {**_position_json(self.position), "token": self.token, "committed": self.committed, "age_s": self.age}


class Session:
    """State of one worker.

    Methods raise HubsyncErrors. All but `status` must be called on the thread that runs the forward passes.
    """

    def __init__(self, served: Served):
        self.served = served
        self._attaching = False
        self._wanted: Position | None = None  # being staged, or queued for it
        self._window: CommitWindow | None = None
        self._error: HubsyncError | None = None
        self._background = Background()

    # --- status -------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """One of `protocol.STATES`."""
        served = self.served
        if served.position is None:
            if self._attaching:
                return WorkerState.ATTACHING
            if self._error is not None:
                return WorkerState.REFUSED
            return WorkerState.MAPPED if served.mapped else WorkerState.DETACHED
        if served.poisoned is not None:
            return WorkerState.POISONED
        if not served.verified:
            return WorkerState.APPLIED
        if self._wanted is not None:
            return WorkerState.STAGING
        return WorkerState.READY if served.staged is None else WorkerState.STAGED

    def status(self) -> dict[str, Any]:
        """The answer to `hubsync_status`, as far as the session knows it."""
        served, window, error = self.served, self._window, self._error
        position, staged, reason = served.position, served.staged, served.poisoned
        if position is not None and reason is not None and not isinstance(error, ReplicaPoisoned):
            error = ReplicaPoisoned(f"the weights are not known to be right: {reason}")
        return {
            "state": self.state,
            "run_id": served.run_id,
            **(_position_json(position) if position else {"version": None, "digest": None}),
            "staged": _position_json(staged) if staged else None,
            "window": window.to_json() if window else None,
            "error": error_to_json(error) if error else None,
            "metrics": dict(served.metrics),
            **served.details(),
        }

    def layout(self) -> dict[str, Any]:
        """Class of every tensor that this rank holds, and the parameters that are derived from others.

        Available also where tensors were refused.
        """
        layout = self.served.layout()
        if layout is None:
            raise ReplicaRefused(f"this worker is {self.state}: it has not mapped its model")
        return layout

    # --- attach -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Attach at the first request, whatever it is."""
        if self.state == WorkerState.DETACHED:
            self.attach()

    def attach(self) -> None:
        """Start finding the position of the served weights, unless it is known or being found. Retries after a refusal.

        One rank of several stops at `mapped`; `join` goes on.
        """
        if self.state not in (WorkerState.DETACHED, WorkerState.REFUSED):
            return
        self._attaching, self._error = True, None
        self._background.submit(self._attach)

    def join(self) -> None:
        """Find the common position of all ranks, after each has mapped its weights. A collective.

        ReplicaRefused, on all ranks, if one has not mapped its part, or if the parts do not form a whole.
        """
        served, attaching = self.served, self._attaching
        if served.joined:
            return
        obstacle = None if attaching else self._error
        if obstacle is None and (attaching or not served.mapped):
            obstacle = ReplicaRefused(f"this worker is {self.state}; call hubsync_attach and wait until it is mapped")
        mismatch = served.join(obstacle)
        if mismatch is not None:
            self._error = mismatch
            raise mismatch
        self._attaching, self._error = True, None
        self._background.submit(self._attach)

    def attempt(self, what: str, act: Callable[[], None]) -> bool:
        """Do `act`. An error is recorded in the status, as "could not `what`", instead of raised.

        For calls of the engine itself, which must not see exceptions: its answer queues would get out of step.
        Returns whether it succeeded.
        """
        try:
            act()
        except Exception as error:
            self._fail(f"could not {what}", error)
            return False
        return True

    # --- stage and commit ---------------------------------------------------------------------------

    def stage(self, target: Position) -> None:
        """Start staging from the current position to `target`, which replaces any other target."""
        self._require_position()
        served = self.served
        served.expect(target)
        if self._wanted is None and target in (served.position, served.staged):
            return
        if self._wanted != target:
            self._error, self._wanted = None, target
            self._background.submit(self._stage)

    def open(self, position: Position, token: str) -> None:
        """A client begins a commit window. Refused while another one is open."""
        self._require_position()
        window = self._window
        if window is None:
            self._window = CommitWindow(position, token, self.served.position == position, time.monotonic())
        elif (window.token, window.position) != (token, position):
            raise ReplicaRefused(
                f"a commit window to {window.position} has been open for {window.age:.1f} s (token {window.token}); "
                "complete that one first"
            )

    def close(self, token: str) -> None:
        """The client has finished its window. Closing it again is fine; closing another client's is not."""
        window = self._window
        if window is not None and window.token != token:
            raise ReplicaRefused(f"the open commit window to {window.position} has another token ({window.token})")
        self._window = None

    def commit(self, target: Position) -> int:
        """Serve what all ranks have staged. A collective. Returns elements written.

        Raises:
            the same error on every rank, if one of them cannot.
        """
        served = self.served
        before, started = served.position, time.perf_counter()
        try:
            changed = served.commit(target)
        except WrongParent:
            self._doubt()
            raise
        if changed or served.position != before:
            served.metrics["commit_s"] = time.perf_counter() - started
            served.metrics["changed"] = changed
            self._background.submit(self._verify)
        self._mark_window(target)
        return changed

    def undo(self) -> None:
        """Take the last commit back. A collective."""
        position = self.served.undo()
        self._background.submit(self._verify)
        self._mark_window(position)

    # --- heal ---------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Rebuild poisoned weights now, from an anchor or the base checkpoint and the deltas after it.

        Raises:
            ReplicaRefused: nothing is poisoned.
            NoPath, BucketError, ...: it was not possible. Still poisoned.
        """
        self._require_position()
        served, reason = self.served, self.served.poisoned
        if reason is None:
            raise ReplicaRefused("there is nothing to heal: the weights are not poisoned")
        logger.warning("hubsync: rebuilding the weights: %s", reason)
        started = time.perf_counter()
        written = served.heal(self._background)
        self._error = None
        served.metrics["heal_s"] = time.perf_counter() - started
        served.metrics["heals"] = served.metrics.get("heals", 0) + 1
        logger.warning("hubsync: the weights are at %s again; %d elements were written", served.position, written)

    def weights_lost(self, reason: str) -> None:
        """Something else has replaced the served weights. They are rebuilt before the next forward pass."""
        if self.served.position is not None:
            self.served.poison(reason)

    def before_forward(self) -> None:
        """Keep a model from running with weights that are not known to be right.

        Called ahead of every forward pass, so its usual cost is one comparison. Poisoned weights are healed first,
        while the forward pass waits. If that fails, ReplicaPoisoned propagates into the engine, which ends: no answer
        is better than one of unknown weights, and the server's supervisor starts it again.
        """
        served = self.served
        if served.poisoned is None or served.position is None:
            return
        reason = served.poisoned
        try:
            self.heal()
        except Exception as error:
            raise ReplicaPoisoned(
                f"refusing to run the model: {reason}; rebuilding failed: {type(error).__name__}: {error}. "
                f"{served.remedy}"
            ) from error

    # --- background jobs ----------------------------------------------------------------------------

    def _attach(self) -> None:
        try:
            self.served.attach()
        except Exception as error:
            self._fail("could not attach", error)
        finally:
            self._attaching = False

    def _stage(self) -> None:
        served, target = self.served, self._wanted
        if target is None:
            return
        started = time.perf_counter()
        try:
            served.metrics["stage_bytes"] = served.stage(target)
            served.metrics["stage_s"] = time.perf_counter() - started
            self._error = None
        except Exception as error:
            served.discard()
            self._fail(f"could not stage {target}", error)
            if isinstance(error, (WrongParent, FormatError)):
                self._doubt()
        finally:
            if self._wanted == target:  # else a newer target is queued behind
                self._wanted = None

    def _doubt(self) -> None:
        """Have the live weights verified after a delta did not fit them.

        Parts are checked before they are decoded, so the live weights may be wrong instead. Without this they would be
        served on with an error that blames the delta.
        """
        if self.served.poisoned is None:
            self.served.doubt()
            self._background.submit(self._verify)

    def _verify(self) -> None:
        served, started = self.served, time.perf_counter()
        if served.position is None or served.verified:
            return
        try:
            if served.verify():
                served.metrics["verify_s"] = time.perf_counter() - started
        except Exception as error:
            if served.poisoned is None:  # without a digest the weights are as unknown as with a wrong one
                served.poison(f"the digest could not be recomputed: {type(error).__name__}: {error}")
            self._fail("the weights are poisoned", error)

    # --- details ------------------------------------------------------------------------------------

    def _require_position(self) -> None:
        if self.served.position is None:
            if self._error is not None:
                raise self._error
            raise ReplicaRefused(f"this worker is {self.state}; call hubsync_attach and wait until it is ready")

    def _mark_window(self, position: Position) -> None:
        if self._window is not None:
            self._window.committed = self._window.position == position

    def _fail(self, what: str, error: Exception) -> None:
        unexpected = not isinstance(error, HubsyncError)
        self._error = ReplicaRefused(f"{type(error).__name__}: {error}") if unexpected else error  # type: ignore[assignment]
        level = logging.ERROR if unexpected or self.state == WorkerState.POISONED else logging.WARNING
        logger.log(level, "hubsync: %s: %s", what, error, exc_info=unexpected)


def _position_json(position: Position) -> dict[str, Any]:
    return {"version": position.version, "digest": position.digest}
