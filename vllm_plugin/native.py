"""Native backend, engine core side: vLLM's own weight transfer calls drive a commit of hubsync.

`backend` is the worker side. vLLM answers `init` and `update` when the workers are attached, or have staged, and
generates meanwhile: the engine core polls its workers between turns of its loop.

Errors of workers travel as answers, as `hubsync.apply.protocol` explains, and are raised once, here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hubsync.apply.engine import Answers
from hubsync.apply.engine_commit import ASLEEP, EngineCommit
from hubsync.apply.protocol import WorkerState, first_error
from hubsync.errors import HubsyncError, ReplicaRefused, ReplicaUnsuitable

from .engine_core import VLLMEngineCore

METHODS = (
    "init_weight_transfer_engine",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
    "shutdown_weight_transfer_engine",
)
"""vLLM's weight transfer methods of a worker, which `vllm_plugin.backend` implements."""

_TIMEOUT_S = 600.0


class NativeCalls:
    """vLLM's weight transfer requests to one engine core.

    Args:
        engine: the engine core.
        commit: changes caches and label around the workers' writes.
        policy: one of `KV_POLICIES`, of these commits.
    """

    def __init__(self, engine: VLLMEngineCore, commit: EngineCommit, policy: str):
        self._engine = engine
        self._commit = commit
        self._policy = policy

    def handle(self, method: str, *args: Any, **kwargs: Any) -> list[None] | Future[None]:
        """Answer one of `METHODS`. Raises the first worker's error, once."""
        if self._engine.asleep and method != "shutdown_weight_transfer_engine":
            raise ReplicaRefused(ASLEEP)
        call = functools.partial(self._engine.on_workers, "call", method, args, kwargs)
        try:
            if method == "finish_weight_update":
                _raise_first(self._commit.change(call, self._policy))
            else:
                _raise_first(call())
        except Exception:
            if method in ("update_weights", "finish_weight_update"):  # the update ends, as with vLLM's own engines
                self._engine.on_workers("abandon")
            raise
        if method == "init_weight_transfer_engine":
            return self._when("ready", self._is_attached)
        if method == "update_weights":
            return self._when("staged", _is_staged)
        return [None]

    def _when(self, goal: str, reached: Callable[[Answers], bool]) -> list[None] | Future[None]:
        """Wait until the workers have reached the goal, while the engine goes on with its forward passes."""
        deadline = time.monotonic() + _TIMEOUT_S

        def check() -> bool:
            try:
                ranks = self._engine.statuses()
                if not all("state" in rank for rank in ranks):
                    _raise_first(ranks)
                if reached(ranks):
                    return True
                if time.monotonic() > deadline:
                    states = ", ".join(sorted({str(rank["state"]) for rank in ranks}))
                    raise ReplicaUnsuitable(f"not {goal} after {_TIMEOUT_S:g} s, but {states}; see the log")
            except Exception:
                self._engine.on_workers("abandon")
                raise
            return False

        return self._engine.until(check) or [None]

    def _is_attached(self, ranks: Answers) -> bool:
        states = {rank["state"] for rank in ranks}
        if WorkerState.REFUSED in states:
            raise _recorded(ranks, WorkerState.REFUSED)
        if states <= {WorkerState.MAPPED}:
            if not (self._engine.alone or self._engine.still):
                raise ReplicaRefused("this server must be paused while its workers join: pause it first")
            _raise_first(self._engine.on_workers("join"))
            return False
        if states & {WorkerState.DETACHED, WorkerState.ATTACHING, WorkerState.MAPPED}:
            return False
        self._commit.label(ranks)
        return True


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


def _raise_first(answers: Answers) -> None:
    if (error := first_error(answers)) is not None:
        raise error


def _recorded(ranks: Answers, state: str) -> HubsyncError:
    """The first error that a worker has recorded in the background."""
    return first_error(ranks) or ReplicaRefused(f"the workers are {state}; see the log")
