"""Worker protocol: the names and values that trainers, followers, engine cores and workers exchange.

Both ends import this module, so it imports neither torch nor numba nor an inference engine.

Errors travel as answers, because a worker that raises puts vLLM's answer queues out of step: with several workers vLLM
reads only the first worker's failure and leaves the others in their queues. After one exception every later answer
would belong to an earlier question.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from hubsync import errors
from hubsync.errors import HubsyncError, ReplicaRefused

logger = logging.getLogger("vllm.hubsync")

PROTOCOL = 1
"""Version of the protocol. Clients refuse a server with another one."""

WINDOW_TIMEOUT_S = 15.0
"""Default number of seconds after which an open commit window counts as abandoned."""

VERIFY_SHARE = 0.02
"""Default share of the time in which a worker looks at its weights again while it has nothing else to do."""

METHOD_PREFIX = "hubsync_"


class WorkerMethod:
    """Names of the worker methods. docs/protocol.md describes them."""

    STATUS = "hubsync_status"
    WAIT = "hubsync_wait"  # answered by the engine core, if the `engine` of its statuses has `waits`
    ATTACH = "hubsync_attach"
    JOIN = "hubsync_join"
    LAYOUT = "hubsync_layout"
    STAGE = "hubsync_stage"
    OPEN = "hubsync_open"
    HOLD = "hubsync_hold"  # answered by the engine core
    COMMIT = "hubsync_commit"
    CLOSE = "hubsync_close"
    UNDO = "hubsync_undo"
    HEAL = "hubsync_heal"
    VERIFY = "hubsync_verify"


REPORTING = (WorkerMethod.STATUS, WorkerMethod.WAIT)
"""Methods whose answers report an earlier error, if there was one."""

CONTROL_PATH = "/v1/hubsync"
"""Where a server that loads hubsync's endpoint plugin answers, behind its API key: `POST /v1/hubsync/stage`, ..."""

VERSION_HEADER, MIN_VERSION_HEADER = "X-Hubsync-Version", "X-Hubsync-Min-Version"
"""Headers of requests that demand a version."""

VERSIONS_HEADER = "X-Hubsync-Versions"
"""Header of their answers: the oldest and the newest version, as `41-42`."""

PARAMETERS: dict[str, tuple[str, ...]] = {
    WorkerMethod.STATUS: (),
    WorkerMethod.WAIT: ("seconds",),
    WorkerMethod.ATTACH: (),
    WorkerMethod.JOIN: (),
    WorkerMethod.LAYOUT: (),
    WorkerMethod.STAGE: ("version", "digest"),
    WorkerMethod.OPEN: ("version", "digest", "token"),
    WorkerMethod.HOLD: ("token",),
    WorkerMethod.COMMIT: ("version", "digest", "kv_cache"),
    WorkerMethod.CLOSE: ("token",),
    WorkerMethod.UNDO: (),
    WorkerMethod.HEAL: (),
    WorkerMethod.VERIFY: (),
}
"""The parameters of every worker method, in their order."""


def control_path(method: str) -> str:
    """Where the endpoint plugin answers a worker method."""
    return f"{CONTROL_PATH}/{method.removeprefix(METHOD_PREFIX)}"


class WorkerState:
    """States of a worker.

    Attributes:
        POISONED: the live weights are known or suspected to be wrong. No forward pass runs with them.
        REFUSED: attaching failed; the status has the error. Attaching again retries.
        DETACHED: nothing has been asked yet.
        ATTACHING: reading the run and mapping the live weights.
        MAPPED: this rank has mapped its weights; the ranks have not joined. Of adapters: the engine has not loaded the
            adapter yet.
        STAGING: downloading and preparing a version.
        APPLIED: committed; the digest of the live weights is being recomputed.
        READY: committed and verified.
        STAGED: ready, and a version is prepared for commit.
    """

    POISONED = "poisoned"
    REFUSED = "refused"
    DETACHED = "detached"
    ATTACHING = "attaching"
    MAPPED = "mapped"
    STAGING = "staging"
    APPLIED = "applied"
    READY = "ready"
    STAGED = "staged"


STATES = (
    WorkerState.POISONED,
    WorkerState.REFUSED,
    WorkerState.DETACHED,
    WorkerState.ATTACHING,
    WorkerState.MAPPED,
    WorkerState.STAGING,
    WorkerState.APPLIED,
    WorkerState.READY,
    WorkerState.STAGED,
)
"""All states, the one furthest from ready first."""

BUSY = (WorkerState.ATTACHING, WorkerState.STAGING, WorkerState.APPLIED)
"""States that a worker leaves without another request."""


class KvPolicy:
    """What a commit does with keys and values that the old weights computed.

    Attributes:
        RECOMPUTE: nothing of them is used again. Running requests are preempted. They go on with the tokens that they
            have, after the new weights have recomputed the keys and values of those. All cached prefixes are dropped.
        KEEP: running requests go on at once, with the keys and values that they have. No other request sees those, nor
            what they compute from then on: all cached prefixes are dropped, and the blocks that running requests fill
            later are cached under names that no other request asks for. So a request that started before the commit
            mixes to its end, and one that starts after it never does. The default, as of other asynchronous trainers:
            it stops generation for milliseconds, the other for a prefill of all tokens in flight.
    """

    RECOMPUTE = "recompute"
    KEEP = "keep"
    DEFAULT = KEEP


KV_POLICIES = (KvPolicy.RECOMPUTE, KvPolicy.KEEP)

Answer = dict[str, Any]


def answering(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """Turn every error of a worker's method into an answer, `{"error": {"type", "message"}}`."""

    @functools.wraps(method)
    def answer(*args: Any, **kwargs: Any) -> Answer:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            expected = isinstance(error, HubsyncError)
            logger.log(logging.WARNING if expected else logging.ERROR, "hubsync: %s", error, exc_info=not expected)
            return {"error": error_to_json(error)}

    return answer


def error_to_json(error: Exception) -> dict[str, str]:
    """An error as it travels: its class in `hubsync.errors`, and its message."""
    if isinstance(error, HubsyncError):
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": "ReplicaError", "message": f"{type(error).__name__}: {error}"}


def error_from_json(document: Any, prefix: str = "") -> HubsyncError:
    """The error that a worker names. Classes outside of `hubsync.errors` become ReplicaRefused.

    Args:
        document: `{"type", "message"}`, from an untrusted peer.
        prefix: put before the message.
    """
    named = document if isinstance(document, dict) else {"message": document}
    kind = getattr(errors, str(named.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, HubsyncError)):
        kind = ReplicaRefused
    return kind(f"{prefix}{named.get('message')}")


def first_error(answers: Iterable[Answer]) -> HubsyncError | None:
    """The error of the first worker that answered with one."""
    for answer in answers:
        if answer.get("error"):
            return error_from_json(answer["error"])
    return None
