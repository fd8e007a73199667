"""The session of a vLLM worker, and the steps of the native backend that its engine core sends.

The functions here take the worker, so they also work where the worker extension is not loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hubsync.apply.protocol import Answer, answering
from hubsync.apply.served_adapter import ServedAdapter
from hubsync.apply.served_model import ServedModel
from hubsync.apply.session import Session
from hubsync.apply.worker_methods import status as status_of

from . import compat, guards, lora
from .bell import ring
from .settings import read_settings


def session_of(worker: Any) -> Session:
    """The worker's session, made at its first request. From then on every forward pass is guarded."""
    worker = compat.unwrap(worker)
    session: Session | None = getattr(worker, "_hubsync", None)
    if session is None:
        session = _adapter_session(worker) if worker.vllm_config.lora_config is not None else _model_session(worker)
        guards.guard_forward(worker, session.before_forward)
        guards.guard_weights(worker, session)
        worker._hubsync = session
    return session


def _model_session(worker: Any) -> Session:
    served = ServedModel(lambda: compat.model_host_of(worker), compat.find_group())
    return Session(served, read_settings(worker.vllm_config).verify_share)


def _adapter_session(worker: Any) -> Session:
    served = ServedAdapter(lambda: lora.adapter_host_of(worker), compat.find_group())
    session = Session(served, read_settings(worker.vllm_config).verify_share)

    def registered(number: int, load: Callable[[], bool]) -> bool:
        return session.attempt("load the adapter", lambda: served.registered(number, load))

    lora.guard_adapter(worker, registered)
    return session


# --- sent by the engine core ------------------------------------------------------------------------


@answering
def status(worker: Any) -> Answer:
    """The status, and `target`: the position that the native backend was asked to stage, if any."""
    target = getattr(compat.transfer_engine(worker), "target", None)
    return {
        **status_of(session_of(worker), compat.about(compat.unwrap(worker))),
        "target": None if target is None else {"version": target.version, "digest": target.digest},
    }


@answering
def report_to(worker: Any, address: bytes) -> Answer:
    """Ring this bell whenever a background job has ended."""
    session_of(worker).on_change = functools.partial(ring, address)
    return {"error": None}


@answering
def call(worker: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
    """One of vLLM's weight transfer methods."""
    compat.transfer_engine(worker).session = session_of(worker)
    getattr(worker, method)(*args, **kwargs)
    return {**status(worker), "error": None}


@answering
def join(worker: Any) -> Answer:
    """`hubsync_join`."""
    session_of(worker).join()
    return {**status(worker), "error": None}


@answering
def abandon(worker: Any) -> Answer:
    """The weight update under way has failed: a new one may start."""
    compat.transfer_engine(worker).target = None
    compat.end_weight_update(worker)
    return {"error": None}
