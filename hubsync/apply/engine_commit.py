"""Engine-side commit: caches, weights and label change in one turn of the engine's loop, and every pause ends.

An engine core runs one loop: schedule, forward pass, outputs; requests of clients are handled between two turns of it.
A commit is one such request, and everything that belongs to it happens within it:

    caches      keys and values that old weights computed become unreachable (see `protocol.KvPolicy`)
    weights     every worker votes and writes (`hubsync_commit` of the workers)
    label       outputs of later forward passes state the new version

So a client cannot leave anything half done, and no forward pass is scheduled in between. Where a forward pass may still
be on its way through pipeline stages when the next turn begins, the turn waits for it.

A version that the workers found by themselves (attached) becomes the label in the turn in which they first state it. A
client could only set it later, when another client may have committed something else.

Where forward passes wait for those of other engines (experts spread over data parallel engines), the client must pause
the engines first. It announces that (`hubsync_open`), and from then on a *watchdog* runs: if the client has not closed
its window in time, it counts as dead, and the engine resumes by itself.

This module imports neither torch nor an inference engine.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hubsync.errors import ConfigError, HubsyncError, ReplicaRefused

from .engine import Answers, EngineCore
from .protocol import KV_POLICIES, WINDOW_TIMEOUT_S, KvPolicy, WorkerMethod, error_to_json, first_error

logger = logging.getLogger("vllm.hubsync")

LONGEST_WAIT_S = 60.0
"""Limit of `hubsync_wait`."""

_RETRY_S = 1.0  # after the watchdog could not finish

ASLEEP = "this server sleeps, so its weights cannot be read: wake it up first (POST /wake_up)"

_READING = (
    WorkerMethod.ATTACH,
    WorkerMethod.JOIN,
    WorkerMethod.STAGE,
    WorkerMethod.COMMIT,
    WorkerMethod.UNDO,
    WorkerMethod.HEAL,
    WorkerMethod.VERIFY,
)
_WRITING = (WorkerMethod.COMMIT, WorkerMethod.UNDO, WorkerMethod.HEAL)


class EngineCommit:
    """hubsync's part of one engine core.

    Args:
        engine: the engine core.
        window_timeout: seconds after which an open commit window counts as abandoned.
    """

    def __init__(self, engine: EngineCore, window_timeout: float = WINDOW_TIMEOUT_S):
        self._engine = engine
        self._timeout = window_timeout
        self._window: str | None = None  # token of the commit window that the watchdog waits for
        self._ended: str | None = None  # token of the window that the watchdog ended last, until another is opened
        self._cancel: Callable[[], None] = lambda: None
        self._labelled: tuple[Any, Any] | None = None  # position that the label was set for

    def wait(self, seconds: Any = 0) -> Answers | Future[Answers]:
        """Answer `hubsync_wait`: the statuses once no worker has a job under way, or after so many seconds.

        Where that is not at once, a Future, completed in a turn: the engine goes on meanwhile.
        """
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        end = time.monotonic() + (min(max(0.0, seconds), LONGEST_WAIT_S) if number else 0.0)

        def idle() -> bool:
            return time.monotonic() >= end or not any(rank.get("busy") for rank in self._engine.statuses())

        waiting = self._engine.until(idle)
        if waiting is None:
            return self.handle(WorkerMethod.STATUS)
        answers: Future[Answers] = Future()

        def answer(_: Future[None]) -> None:
            try:
                answers.set_result(self.handle(WorkerMethod.STATUS))
            except Exception as error:
                answers.set_exception(error)

        waiting.add_done_callback(answer)
        return answers

    def handle(self, method: str, *args: Any, **kwargs: Any) -> Answers:
        """Answer any other `hubsync_*` request of a client. Errors are answers, as those of the workers are."""
        try:
            answers = self._answer(method, args, kwargs)
        except (HubsyncError, TypeError) as error:  # TypeError: a request with wrong arguments
            logger.warning("hubsync: %s", error)
            answers = [{"error": error_to_json(error)}]
        self.label(answers)
        about = self._about()
        for answer in answers:
            answer["engine"] = about | answer.get("engine", {})
        return answers

    def _answer(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answers:
        if self._engine.asleep and method in _READING:
            raise ReplicaRefused(ASLEEP)
        if self._engine.asleep and method == WorkerMethod.STATUS:
            return self._engine.statuses()  # the other would begin to attach
        if method in _WRITING:
            return self._write(method, args, kwargs)
        if method == WorkerMethod.HOLD:
            return self._hold(*args, **kwargs)
        if method == WorkerMethod.OPEN:
            return self._open(*args, **kwargs)
        if method == WorkerMethod.CLOSE:
            return self._close(*args, **kwargs)
        return self._engine.call(method, *args, **kwargs)

    def _about(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "index": engine.index,
            "atomic": engine.alone,
            "paused": engine.paused,
            "label": engine.label,
            "window_timeout_s": self._timeout,
            "waits": True,
        }

    # --- writing ------------------------------------------------------------------------------------

    def _write(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answers:
        if method == WorkerMethod.COMMIT:
            version, digest, policy = _commit_arguments(*args, **kwargs)
            return self.change(lambda: self._engine.call(method, version, digest), policy)
        # Weights that need healing are in no forward pass: each worker holds its own back.
        call = functools.partial(self._engine.call, method, *args, **kwargs)
        return self.change(call, KvPolicy.RECOMPUTE, anytime=method == WorkerMethod.HEAL)

    def change(self, write: Callable[[], Answers], policy: str, *, anytime: bool = False) -> Answers:
        """Let the workers write, and change caches and label in the same turn.

        The caches come first: a failure there happens before a weight was touched, and a write that the workers refuse
        has cost no more than cached prefixes.

        Args:
            write: has the workers write, and returns their answers.
            policy: one of `protocol.KV_POLICIES`.
            anytime: allow it while forward passes of other engines are under way?

        Raises:
            ConfigError: an unknown policy.
            ReplicaRefused: not paused where that is needed, or the caches cannot be cleared. Nothing was written.
        """
        if policy not in KV_POLICIES:
            raise ConfigError(f"kv_cache must be one of {', '.join(KV_POLICIES)}, not {policy!r:.40}")
        engine, started = self._engine, time.perf_counter()
        if not (engine.alone or engine.still or anytime):
            raise ReplicaRefused(
                "the data parallel engines of this server share forward passes, so its weights can only change while "
                f"all are paused, and {self._why_not_still()}"
            )
        try:
            engine.settle()
            engine.recompute() if policy == KvPolicy.RECOMPUTE else engine.isolate()
        except Exception as error:
            raise ReplicaRefused(
                f"the caches of this server could not be cut off ({type(error).__name__}: {error}); "
                "its weights were not touched"
            ) from error
        answers = write()
        # After an error too: a worker whose write failed after the vote has the position of the others, and is rebuilt
        # there.
        self._labelled = None
        self.label(answers if first_error(answers) is None else engine.statuses())
        for answer in answers:
            answer["engine"] = {"turn_s": time.perf_counter() - started}
        return answers

    def label(self, ranks: Answers) -> None:
        """Set the label to the position in which all workers are, in the turn in which they have stated it.

        Once for each position: later labels of the server's owner stay (`/finish_weight_update`).
        """
        positions = _positions(ranks)
        if len(positions) != 1 or any(rank.get("version") is None for rank in ranks) or self._labelled in positions:
            return
        self._labelled = positions.pop()
        self._engine.set_label(str(self._labelled[0]))

    def _why_not_still(self) -> str:
        if self._engine.paused:
            return "one is still finishing a forward pass: try again"
        if self._ended is not None:
            return (
                f"it is running again: the window was not closed within {self._timeout:g} s and was ended "
                "(HUBSYNC_WINDOW_TIMEOUT allows more)"
            )
        return "it is running: open a window and pause it first"

    # --- windows, and the watchdog ------------------------------------------------------------------

    def _hold(self, token: str) -> Answers:
        """A client is about to pause for something other than a commit. `hubsync_close` ends that too."""
        self._watch(token, self._timeout)
        return [{"error": None}]

    def _open(self, version: int, digest: str, token: str) -> Answers:
        answers = self._engine.call(WorkerMethod.OPEN, version, digest, token)
        if first_error(answers) is None:
            self._watch(token, self._timeout)
        return answers

    def _close(self, token: str) -> Answers:
        answers = self._engine.call(WorkerMethod.CLOSE, token)
        if first_error(answers) is None and token == self._window:
            self._cancel()
            self._window = None
        return answers

    def _watch(self, token: str, seconds: float) -> None:
        self._cancel()
        self._window, self._ended = token, None
        self._cancel = self._engine.later(seconds, lambda: self._expire(token))

    def _expire(self, token: str) -> None:
        """The client of this window counts as dead: resume the engine without it."""
        if self._window != token:
            return
        try:
            if self._end(token):
                self._window, self._ended = None, token
                return
        except Exception:
            logger.exception("hubsync: an abandoned commit window could not be ended yet")
        self._watch(token, _RETRY_S)

    def _end(self, token: str) -> bool:
        """Close a window in the client's place. False if it has to be tried again."""
        engine = self._engine
        ranks = engine.statuses()
        if len(_positions(ranks)) > 1:  # the vote of the workers rules that out
            logger.error("hubsync: the workers are at different versions, so this server stays paused: %s", ranks)
            return False
        if engine.paused:
            engine.resume()
        engine.call(WorkerMethod.CLOSE, token)
        logger.warning("hubsync: a client has left its window open; the server goes on with version %s", engine.label)
        return True


def _commit_arguments(version: Any, digest: Any, kv_cache: Any = KvPolicy.DEFAULT) -> tuple[Any, Any, Any]:
    return version, digest, kv_cache


def _positions(ranks: Answers) -> set[tuple[Any, Any]]:
    return {(rank.get("version"), rank.get("digest")) for rank in ranks if rank.get("version") is not None}
