"""Guards in vLLM's workers: what must be known before a forward pass, and whatever vLLM does to weights by itself.

Used here: `model_runner.execute_model`, and the functions of worker, model runner and models in `_REPLACING`, each only
where it exists. The same names in vLLM 0.26, 0.27, 0.32 and 0.33.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hubsync.apply.session import Session

_REPLACING = {
    "load_model": "the server has loaded its model again",
    "reload_weights": "the server has reloaded its weights",
    "reset_weights": "the server has set its weights to zero",
    "elastic_ep_execute": "the server has moved experts between its workers",
    "checkpoint_restore": "the server was restored from a snapshot of its process",
}
"""Functions of a worker, or of its model runner, that may replace weights, and what to say about them."""

_TRANSFER = ("start_weight_update", "start_draft_weight_update", "update_weights", "finish_weight_update")


def guard_forward(worker: Any, before: Callable[[], None]) -> None:
    """Call `before` ahead of every forward pass of this worker, on the thread that runs it.

    The model runner's method is wrapped, not the module's `forward`: captured CUDA graphs replay without it.
    """
    _wrap(worker.model_runner, "execute_model", functools.partial(_after, before))


def guard_weights(worker: Any, session: Session) -> None:
    """Tell the session of everything that vLLM does to this worker's weights. Called again, it adds what is new.

    The session then verifies them before the next forward pass. Nothing reads them meanwhile: those of a server that
    sleeps are not in memory.
    """
    _wrap(worker, "sleep", functools.partial(_sleeping, session))
    _wrap(worker, "wake_up", functools.partial(_waking, session))
    for name, reason in _REPLACING.items():
        for owner in (worker, worker.model_runner):
            _wrap(owner, name, functools.partial(_replacing, session, reason))
    if not _uses_hubsync(worker):
        for name in _TRANSFER:
            _wrap(worker, name, functools.partial(_transferring, session, worker))
    for model in _modules(worker):
        _wrap(model, "load_weights", functools.partial(_loading, session))


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the instance's method by `wrapper(method)`, unless it has none or that was done before."""
    method = getattr(owner, name, None)
    if method is None or hasattr(method, "_hubsync_original"):
        return
    wrapped = functools.wraps(method)(wrapper(method))
    wrapped._hubsync_original = method  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _after(before: Callable[[], None], execute: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        before()
        return execute(*args, **kwargs)

    return guarded


def _sleeping(session: Session, sleep: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level < 1:
            return sleep(level, *args, **kwargs)
        session.weights_away(f"the server slept at level {level}")
        return sleep(level, *args, **kwargs)

    return guarded


def _waking(session: Session, wake_up: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(tags: list[str] | None = None, *args: Any, **kwargs: Any) -> Any:
        if tags is not None and "weights" not in tags:
            return wake_up(tags, *args, **kwargs)
        with session.weights_changing("the server has woken up"):  # unless they are away already
            answer = wake_up(tags, *args, **kwargs)
        session.weights_back()
        return answer

    return guarded


def _replacing(session: Session, reason: str, replace: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with session.weights_changing(reason):
            return replace(*args, **kwargs)

    return guarded


def _loading(session: Session, load: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if session.working:
            return load(*args, **kwargs)
        with session.weights_changing("something has called the model's load_weights"):
            return load(*args, **kwargs)

    return guarded


def _transferring(session: Session, worker: Any, transfer: Callable[..., Any]) -> Callable[..., Any]:
    """A call of another weight transfer backend. Between the first and the last one weights may be anything."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        session.weights_away("another backend has updated the weights of this server")
        try:
            return transfer(*args, **kwargs)
        finally:
            if not getattr(worker, "_weight_update_active", False):
                session.weights_back()

    return guarded


def _uses_hubsync(worker: Any) -> bool:
    from .hooks import uses_backend

    return uses_backend(worker.vllm_config)


def _modules(worker: Any) -> list[Any]:
    """The served module and the draft module."""
    runner = worker.model_runner
    draft = runner.get_draft_model() if hasattr(runner, "get_draft_model") else None
    return [model for model in (runner.get_model(), draft) if hasattr(model, "load_weights")]
