"""What a commit does to the engine around the workers: caches, label, and a pause that always ends.

vLLM's engine core runs one loop: schedule, forward pass, outputs; requests of clients are handled between two turns of
it. A commit is one such request, and everything that belongs to it happens within it:

    caches      what old weights have computed is made unreachable (see `protocol.KvPolicy`)
    weights     every worker votes and writes (`hubsync_commit` of the worker extension)
    label       outputs of later forward passes state the new version

So there is nothing that a client could leave half done, and nobody can schedule a forward pass in between. Where a
forward pass may still be on its way through pipeline stages when the next turn begins, the turn waits for it. Where
forward passes wait for those of other engines (experts spread over data parallel engines), the client must have paused
the engines. It says so beforehand (`hubsync_open`), and from then on a *watchdog* runs: if the client has not closed
its window in time, it is taken for dead, and the engine resumes itself.

This module imports neither vLLM nor torch. `vllm_plugin.hooks` connects it to vLLM.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from hubsync.errors import ConfigError, HubsyncError, ReplicaRefused, ReplicaUnsuitable

from .protocol import KV_POLICIES, KvPolicy, WorkerMethod, WorkerState, error_to_json, first_error

logger = logging.getLogger("vllm.hubsync")

Answers = list[dict[str, Any]]  # one of each worker

_RETRY_S = 1.0  # after the watchdog could not finish
_POLL_S = 0.01  # between two looks at the workers, growing
_LONGEST_POLL_S = 0.25
_NATIVE_TIMEOUT_S = 600.0

_WRITING = (WorkerMethod.COMMIT, WorkerMethod.UNDO, WorkerMethod.HEAL)

# vLLM's own weight transfer methods of a worker, which `vllm_plugin.backend` implements.
NATIVE = (
    "init_weight_transfer_engine",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
    "shutdown_weight_transfer_engine",
)


class Engine(Protocol):
    """One engine core of vLLM. All of it is called on the thread that schedules."""

    index: int
    """Of the engine among the data parallel ones of its server."""

    @property
    def alone(self) -> bool:
        """Can this engine's forward passes end without those of other engines?"""
        ...

    @property
    def still(self) -> bool:
        """Is this engine paused, with all others that it shares forward passes with, and none under way?"""
        ...

    def settle(self) -> None:
        """Return when no worker is in a forward pass, or when all will get the next request between the same two."""
        ...

    @property
    def paused(self) -> bool: ...

    @property
    def label(self) -> str: ...

    def call(self, method: str, *args: Any, **kwargs: Any) -> Answers:
        """The answers of all workers to one of their methods."""
        ...

    def native(self, step: str, *args: Any) -> Answers:
        """The answers of all workers to a function of `vllm_plugin.worker`."""
        ...

    def recompute(self) -> None:
        """Preempt running requests, drop all keys and values."""
        ...

    def isolate(self) -> None:
        """Keep running requests, but make sure that no other request gets to see what they have computed, or will."""
        ...

    def set_label(self, version: str) -> None:
        """What outputs of forward passes that begin from now on state as their weights."""
        ...

    def resume(self) -> None: ...

    def later(self, seconds: float, turn: Callable[[], None]) -> Callable[[], None]:
        """Have `turn` called on the scheduling thread after a while. Returns what cancels that."""
        ...

    def until(self, look: Callable[[], bool]) -> Future[None] | None:
        """Have `look` called, in turns of the loop, until it returns True or raises.

        None if that is over when this returns; else a Future of it.
        """
        ...


class Core:
    """hubsync's part of one engine core.

    Args:
        engine: the engine core.
        settings: `(window timeout in seconds, KV policy of the native backend)`, as pinned at launch.
    """

    def __init__(self, engine: Engine, settings: tuple[float, str]):
        self._engine = engine
        self._timeout, self._policy = settings
        self._window: str | None = None  # token of the commit window that the watchdog waits for
        self._ended: str | None = None  # token of the window that the watchdog ended last, until another is opened
        self._cancel: Callable[[], None] = lambda: None

    def handle(self, method: str, *args: Any, **kwargs: Any) -> Answers:
        """A `hubsync_*` request of a client. Errors are answers, as those of the workers are."""
        try:
            if method in _WRITING:
                found = self._write(method, args, kwargs)
            elif method == WorkerMethod.HOLD:
                found = self._hold(*args, **kwargs)
            elif method == WorkerMethod.OPEN:
                found = self._open(*args, **kwargs)
            elif method == WorkerMethod.CLOSE:
                found = self._close(*args, **kwargs)
            else:
                found = self._engine.call(method, *args, **kwargs)
        except (HubsyncError, TypeError) as error:  # of the second kind are requests with wrong arguments
            logger.warning("hubsync: %s", error)
            found = [{"error": error_to_json(error)}]
        about = self._about()
        for answer in found:
            answer["engine"] = about | answer.get("engine", {})
        return found

    # --- writing ------------------------------------------------------------------------------------

    def _write(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answers:
        if method == WorkerMethod.COMMIT:
            version, digest, policy = _commit_arguments(*args, **kwargs)
            return self._change(lambda: self._engine.call(method, version, digest), policy)
        # Weights that are to be healed are in no forward pass: each worker holds back its own.
        call = functools.partial(self._engine.call, method, *args, **kwargs)
        return self._change(call, KvPolicy.RECOMPUTE, anytime=method == WorkerMethod.HEAL)

    def _change(self, write: Callable[[], Answers], policy: str, *, anytime: bool = False) -> Answers:
        """Let the workers write, in one turn with what that means for caches and label.

        The caches come first: what fails there fails before a weight was touched, and a write that the workers refuse
        has cost no more than cached prefixes.
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
        found = write()
        # After an error too: a worker whose write failed after the vote is where the others are, and is rebuilt there.
        positions = _positions(found if first_error(found) is None else engine.native("status"))
        if len(positions) == 1:
            engine.set_label(str(positions.pop()[0]))
        for answer in found:
            answer["engine"] = {"turn_s": time.perf_counter() - started}
        return found

    def _why_not_still(self) -> str:
        if self._engine.paused:
            return "one is still finishing a forward pass: try again"
        if self._ended is not None:
            return (
                f"it is running again: the window was not closed within {self._timeout:g} s and was ended "
                "(HUBSYNC_WINDOW_TIMEOUT allows more)"
            )
        return "it is running: open a window and pause it first"

    # --- windows, and the watchdog --------------------------------------------------------------------

    def _hold(self, token: str) -> Answers:
        """A client is about to pause for something that is no commit; `hubsync_close` ends that too."""
        self._watch(token, self._timeout)
        return [{"error": None}]

    def _open(self, version: int, digest: str, token: str) -> Answers:
        found = self._engine.call(WorkerMethod.OPEN, version, digest, token)
        if first_error(found) is None:
            self._watch(token, self._timeout)
        return found

    def _close(self, token: str) -> Answers:
        found = self._engine.call(WorkerMethod.CLOSE, token)
        if first_error(found) is None and token == self._window:
            self._cancel()
            self._window = None
        return found

    def _watch(self, token: str, seconds: float) -> None:
        self._cancel()
        self._window, self._ended = token, None
        self._cancel = self._engine.later(seconds, lambda: self._expire(token))

    def _expire(self, token: str) -> None:
        """The client of this window is dead, or as good as that: bring the engine back by ourselves."""
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
        ranks = engine.native("status")
        if len(_positions(ranks)) > 1:  # the vote of the workers rules that out
            logger.error("hubsync: the workers are at different versions, so this server stays paused: %s", ranks)
            return False
        if engine.paused:
            engine.resume()
        engine.call(WorkerMethod.CLOSE, token)
        logger.warning("hubsync: a client has left its window open; the server goes on with version %s", engine.label)
        return True

    # --- vLLM's own weight transfer calls ---------------------------------------------------------------

    def handle_native(self, method: str, *args: Any, **kwargs: Any) -> list[None] | Future[None]:
        """One of vLLM's weight transfer requests; raises what a worker says, once.

        With several workers an exception in them would leave vLLM's queues of answers out of step, so theirs come as
        answers, and are raised here.
        """
        call = functools.partial(self._engine.native, "call", method, args, kwargs)
        try:
            _raise_first(self._change(call, self._policy) if method == "finish_weight_update" else call())
        except Exception:
            if method in ("update_weights", "finish_weight_update"):  # over, as with vLLM's own engines; on all workers
                self._engine.native("abandon")
            raise
        if method == "init_weight_transfer_engine":
            return self._when("ready", self._is_attached)
        if method == "update_weights":
            return self._when("staged", self._is_staged)
        return [None]

    def _native(self, step: str, *args: Any) -> Answers:
        found = self._engine.native(step, *args)
        _raise_first(found)
        return found

    def _when(self, what: str, reached: Callable[[Answers], bool]) -> list[None] | Future[None]:
        """Wait until the workers are there, without keeping the engine from its forward passes."""
        deadline = time.monotonic() + _NATIVE_TIMEOUT_S

        def look() -> bool:
            try:
                ranks = self._engine.native("status")
                if not all("state" in rank for rank in ranks):
                    _raise_first(ranks)
                if reached(ranks):
                    return True
                if time.monotonic() > deadline:
                    states = ", ".join(sorted({str(rank["state"]) for rank in ranks}))
                    raise ReplicaUnsuitable(f"not {what} after {_NATIVE_TIMEOUT_S:g} s, but {states}; see the log")
            except Exception:
                self._engine.native("abandon")
                raise
            return False

        return self._engine.until(look) or [None]

    def _is_attached(self, ranks: Answers) -> bool:
        states = {rank["state"] for rank in ranks}
        if WorkerState.REFUSED in states:
            raise _recorded(ranks, WorkerState.REFUSED)
        if states <= {WorkerState.MAPPED}:
            if not (self._engine.alone or self._engine.still):
                raise ReplicaRefused("this server must be paused while its workers join: pause it first")
            self._native("join")
            return False
        return not states & {WorkerState.DETACHED, WorkerState.ATTACHING, WorkerState.MAPPED}

    @staticmethod
    def _is_staged(ranks: Answers) -> bool:
        waiting = [
            rank
            for rank in ranks
            if rank["target"] not in (rank["staged"], {"version": rank["version"], "digest": rank["digest"]})
        ]
        for rank in ranks:
            failed = rank in waiting and rank["error"] is not None and rank["state"] != WorkerState.STAGING
            if failed or rank["state"] in (WorkerState.POISONED, WorkerState.REFUSED):
                raise _recorded(ranks, rank["state"])
        return not waiting

    def _about(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "index": engine.index,
            "atomic": engine.alone,
            "paused": engine.paused,
            "label": engine.label,
            "window_timeout_s": self._timeout,
        }


def intervals() -> Callable[[], float]:
    """Growing pauses between two looks, in seconds."""
    pause = _POLL_S / 2

    def following() -> float:
        nonlocal pause
        pause = min(2 * pause, _LONGEST_POLL_S)
        return pause

    return following


def _commit_arguments(version: Any, digest: Any, kv_cache: Any = KvPolicy.RECOMPUTE) -> tuple[Any, Any, Any]:
    return version, digest, kv_cache


def _positions(ranks: Answers) -> set[tuple[Any, Any]]:
    return {(rank.get("version"), rank.get("digest")) for rank in ranks if rank.get("version") is not None}


def _raise_first(answers: Answers) -> None:
    if (error := first_error(answers)) is not None:
        raise error


def _recorded(ranks: Answers, state: str) -> HubsyncError:
    """The first error that a worker has recorded in the background."""
    return first_error(ranks) or ReplicaRefused(f"the workers are {state}; see the log")
