"""What both adapters share in a worker: its one session, and vLLM's weight transfer methods without exceptions.

The functions here take the worker. `vllm_plugin.extension` calls them in its methods,
`hubsync.apply.engine_commit` sends them to the workers.
"""

from __future__ import annotations

import re
from typing import Any

import hubsync
from hubsync.apply.adapter_session import AdapterSession
from hubsync.apply.protocol import PROTOCOL, answering
from hubsync.apply.session import Session
from hubsync.errors import FormatError
from hubsync.format.manifest import MAX_VERSION, Position

from . import compat


def session_of(worker: Any) -> Session | AdapterSession:
    """The worker's session, made at its first request; from then on every forward pass is guarded."""
    worker = compat.unwrap(worker)
    session: Session | AdapterSession | None = getattr(worker, "_hubsync", None)
    if session is None:
        ranks = compat.find_ranks()
        if worker.vllm_config.lora_config is None:
            session = Session(lambda: compat.host_of(worker, ranks), ranks)
        else:
            session = AdapterSession(lambda: compat.adapter_host_of(worker), ranks)
            compat.guard_adapter(worker, session.registered)
        compat.guard_forward(worker, session.before_forward)
        compat.guard_weights(worker, session.weights_lost)
        worker._hubsync = session
    return session


def status_of(worker: Any) -> dict[str, Any]:
    """What `hubsync_status` answers."""
    return {
        "protocol": PROTOCOL,
        "rank": int(worker.rank),
        "parallel": compat.parallel_of(worker.vllm_config),
        **session_of(worker).status(),
        "vllm": compat.vllm_version(),
        "hubsync": hubsync.__version__,
    }


def position_of(version: object, digest: object) -> Position:
    """The position that a request names, or FormatError."""
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise FormatError(f"version must be an integer from 0 to {MAX_VERSION}, not {version!r:.80}")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{32}", digest):
        raise FormatError(f"digest must be 32 hex digits, not {digest!r:.80}")
    return Position(version, digest)


# --- sent by the engine core ------------------------------------------------------------------------


@answering
def status(worker: Any) -> dict[str, Any]:
    """The status, and `target`: the position that the native backend has been told to stage, if any."""
    target = getattr(compat.transfer_engine(worker), "target", None)
    return {
        **status_of(worker),
        "target": None if target is None else {"version": target.version, "digest": target.digest},
    }


@answering
def call(worker: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """One of vLLM's weight transfer methods."""
    compat.transfer_engine(worker).session = session_of(worker)
    getattr(worker, method)(*args, **kwargs)
    return {**status(worker), "error": None}


@answering
def join(worker: Any) -> dict[str, Any]:
    """`hubsync_join`, also where the extension is not loaded."""
    session_of(worker).join()
    return {**status(worker), "error": None}


@answering
def abandon(worker: Any) -> dict[str, Any]:
    """The weight update under way has failed: a new one may start."""
    compat.transfer_engine(worker).target = None
    compat.end_weight_update(worker)
    return {"error": None}
