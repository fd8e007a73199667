"""Session: one worker's state machine with one run: attach, stage in the background, commit, verify, heal.

The state machine is the same for whole models and for LoRA adapters. `Served` holds the differences: how weights are
found, and how a version is prepared, loaded and verified. `served_model` and `served_adapter` implement it.

Two threads meet here. The worker's *main* thread runs forward passes and answers requests. It commits, undoes and
heals, so a write never meets a forward pass. One *background* thread attaches, downloads, stages and verifies, one job
after the other, and only reads weights. A verification queued by a commit therefore always ends before anything that is
staged after it, and everything staged is based on verified weights. While there is no job it looks at verified weights
again, a slice at a time, for a small share of the time.

Whatever the engine does to its weights by itself (sleep, reload, another backend) is between `weights_away` and
`weights_back`: nothing reads them meanwhile, and the next forward pass waits until they are verified again.

With several ranks the main threads of all of them get the same requests in the same order. The collectives in `join`,
`commit` and `undo` rest on that: whether one is made depends only on requests that all ranks had, never on how far this
rank's background thread is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hubsync.errors import FormatError, HubsyncError, ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.format.manifest import Position

from .background import Background
from .protocol import VERIFY_SHARE, WorkerState, error_to_json
from .served import Served
from .verification import Verification
from .window import CommitWindow, position_json

logger = logging.getLogger("vllm.hubsync")


class Session:
    """State of one worker.

    Methods raise HubsyncErrors. All but `status` must be called on the thread that runs the forward passes.

    Args:
        served: the model or adapter.
        verify_share: of the time, for looking at verified weights again while there is nothing else to do.
    """

    def __init__(self, served: Served, verify_share: float = VERIFY_SHARE):
        self.served = served
        self.verification = Verification(verify_share)
        self._writing = False
        self._away: str | None = None  # what the engine is doing to its weights
        self._attaching = False
        self._wanted: Position | None = None  # being staged, or queued for it
        self._window: CommitWindow | None = None
        self._error: HubsyncError | None = None
        self.on_change: Callable[[], None] = lambda: None  # called after each background job, on its thread
        self._background = Background(self._look_again, lambda: self.on_change())

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
            "busy": self._background.busy,
            "run_id": served.run_id,
            **(position_json(position) if position else {"version": None, "digest": None}),
            "staged": position_json(staged) if staged else None,
            "window": window.to_json() if window else None,
            "error": error_to_json(error) if error else None,
            "metrics": dict(served.metrics),
            "verification": {"verified": position is not None and served.verified, **self.verification.to_json()},
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
            with self._write():
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
        with self._write():
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
        if self._away is not None:
            raise ReplicaRefused(f"the weights cannot be rebuilt now: {self._away}; wake the server up first")
        logger.warning("hubsync: rebuilding the weights: %s", reason)
        started = time.perf_counter()
        with self._write():
            written = served.heal(self._background)
        self._error = None
        self.verification.healed, self.verification.pending = reason, None
        self.verification.passed()
        served.metrics["heal_s"] = time.perf_counter() - started
        served.metrics["heals"] = served.metrics.get("heals", 0) + 1
        logger.warning("hubsync: the weights are at %s again; %d elements were written", served.position, written)

    # --- verify -------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Start looking at all served weights now. Done when the status has answered this request."""
        self._require_position()
        self.verification.asked += 1
        self._background.submit(self._answer)

    def weights_away(self, reason: str) -> None:
        """The engine begins to move or replace its weights: nothing reads them until `weights_back`. Idempotent."""
        if self._away is None:
            self._background.reading.acquire()
            self._doubt_weights()
            self._away = reason

    def weights_back(self) -> None:
        """It has ended. The next forward pass waits until they are verified, or rebuilt if they are others."""
        reason, self._away = self._away, None
        if reason is None:
            return
        self._background.reading.release()
        self.verification.pending = reason
        self._doubt_weights()
        self._background.submit(self._verify)

    @property
    def working(self) -> bool:
        """Is it this session that calls the engine's functions now: to map, write or rebuild weights?"""
        return self._writing or self._background.current

    @contextmanager
    def _write(self) -> Iterator[None]:
        self._writing = True
        try:
            yield
        finally:
            self._writing = False

    @contextmanager
    def weights_changing(self, reason: str) -> Iterator[None]:
        """`weights_away` and `weights_back` around what the engine does, unless they are away already."""
        if self._away is not None:
            yield
            return
        self.weights_away(reason)
        try:
            yield
        finally:
            self.weights_back()

    def _doubt_weights(self) -> None:
        if self.served.position is not None and self.served.poisoned is None:
            self.served.doubt()

    def before_forward(self) -> None:
        """Keep a model from running with weights that are not known to be right.

        Called ahead of every forward pass, so its usual cost is one comparison. Weights that the engine has moved or
        replaced are verified first, and poisoned ones are healed, while the forward pass waits. If that fails,
        ReplicaPoisoned propagates into the engine, which ends: no answer is better than one of unknown weights, and the
        server's supervisor starts it again.
        """
        served = self.served
        self.weights_back()
        if served.position is None:
            return
        if self.verification.pending is not None:
            while not served.verified and served.poisoned is None:
                self._verify()
            self.verification.pending = None
        if served.poisoned is None:
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
            with self._background.reading:
                self.served.attach()
        except Exception as error:
            self._fail("could not attach", error)
        else:
            if self.served.verified and self.served.position is not None:
                self.verification.passed()
            if self.verification.pending is not None:
                self._doubt_weights()
        finally:
            self._attaching = False
        self._verify()

    def _stage(self) -> None:
        served, target = self.served, self._wanted
        if target is None:
            return
        started = time.perf_counter()
        try:
            served.metrics["stage_bytes"] = served.stage(target, self._background.reading)
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
        """Verify what is not verified."""
        served = self.served
        if served.position is not None and not served.verified and served.poisoned is None:
            self._look_at_all()

    def _answer(self) -> None:
        """Verify because a client has asked for it."""
        asked = self.verification.asked
        if self._look_at_all() or self.served.poisoned is not None:
            self.verification.answered = asked
        else:  # a commit came in between
            self._background.submit(self._answer)

    def _look_at_all(self) -> bool:
        with self._background.reading:
            started = time.perf_counter()
            if seen := self._look(self.served.verify):
                self.served.metrics["verify_s"] = time.perf_counter() - started
            return seen

    def _look_again(self) -> float | None:
        """Look at some verified weights while there is no job. Returns the seconds to rest."""
        served, reading, rules = self.served, self._background.reading, self.verification
        known = served.position is not None and served.verified
        if rules.share == 0 or not known or not reading.acquire(blocking=False):
            return rules.retry
        try:
            started = time.perf_counter()
            ended = self._look(served.verify_slice)
            return rules.rest(time.perf_counter() - started, ended)
        finally:
            reading.release()

    def _look(self, look: Callable[[], bool]) -> bool:
        """Whether `look` has seen that all served weights are right. What is wrong with them poisons them."""
        try:
            if seen := look():
                self.verification.passed()
            return seen
        except Exception as error:
            if self.served.poisoned is None:  # without a digest the weights are as unknown as with a wrong one
                self.served.poison(f"the digest could not be recomputed: {type(error).__name__}: {error}")
            self._fail("the weights are poisoned", error)
            return False

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
