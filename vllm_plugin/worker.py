"""One session for each vLLM worker, whichever of the two adapters asks first."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from . import compat
from .session import Session

_sessions: WeakKeyDictionary[Any, Session] = WeakKeyDictionary()  # by served module


def session_of(worker: Any) -> Session:
    """The worker's session, made at its first request; from then on every forward pass is guarded."""
    worker = getattr(worker, "worker", worker)  # the engine core hands us vLLM's wrapper of it
    session: Session | None = getattr(worker, "_hubsync", None)
    if session is None:
        ranks = compat.find_ranks()
        session = Session(lambda: compat.host_of(worker, ranks), ranks)
        compat.guard_forward(worker, session.before_forward)
        compat.guard_weights(worker, session.weights_lost)
        worker._hubsync = session
        _sessions[worker.model_runner.get_model()] = session
    return session


def session_of_model(model: Any) -> Session | None:
    """The session of the worker that serves this module, if it has one."""
    return _sessions.get(model)


def take_native_failure(worker: Any) -> str | None:
    """What went wrong in the last call of vLLM's own to our weight transfer engine, once; see `backend`."""
    failure: str | None = worker.weight_transfer_engine.take_failure()
    return failure
