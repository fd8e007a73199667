"""The worker extension: hubsync's methods on vLLM's workers, callable through `collective_rpc`.

    HUBSYNC_BUCKET=hf://buckets/me/runs/my-run VLLM_SERVER_DEV_MODE=1 \\
        vllm serve MODEL --worker-extension-cls vllm_plugin.DeltaWorkerExtension

vLLM mixes the class into its worker class. Requests reach a worker strictly between two forward passes.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import hubsync
from hubsync.errors import FormatError, HubsyncError
from hubsync.manifest import MAX_VERSION, Position

from . import compat
from .session import describe
from .worker import session_of

# vLLM imports this module in the worker process because the extension class is named on its command line, and it does
# so before it loads the model: the last moment at which packing can be avoided, and only in servers that use hubsync.
compat.keep_linears_live()

PROTOCOL = 1

logger = logging.getLogger("vllm.hubsync")

Method = Callable[..., dict[str, Any]]


def _answers(method: Method) -> Method:
    """Turn every error into an answer.

    With several workers vLLM reads only the first one's failure and leaves the others' in their queues, so after one
    exception every later answer would belong to an earlier question.
    """

    @functools.wraps(method)
    def answer(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            expected = isinstance(error, HubsyncError)
            logger.log(logging.WARNING if expected else logging.ERROR, "hubsync: %s", error, exc_info=not expected)
            return {"error": describe(error)}

    return answer


class DeltaWorkerExtension:
    """Delta weight sync for one vLLM worker. The methods are the table "Worker RPC" of docs/ARCHITECTURE.md.

    Every method returns a JSON-able dict and never raises; a failure is `{"error": {"type", "message"}}`, with a class
    of `hubsync.errors` as type. Success is the worker's status after it, with `error` None; only `hubsync_status`
    reports what went wrong in the background.

    The bucket is pinned when the server starts. Requests carry versions and digests only, because vLLM's control
    endpoints are not guarded by its API key: the worst they can do is to move the server to another committed version.

    A worker whose weights turn out wrong rebuilds them before its next forward pass, from the run's newest anchor or
    the local base checkpoint and the deltas. If that fails the forward pass raises and the engine ends with that
    message: it never runs with weights that are not known to be right. What had been cached by wrong weights is the
    client's to drop (`/reset_prefix_cache`); `metrics["heals"]` tells that it happened.
    """

    # vLLM refuses an extension with a name that its worker has, and never calls its __init__: every name is prefixed,
    # and all state is one object, `self._hubsync`.

    @_answers
    def hubsync_status(self) -> dict[str, Any]:
        """Where this worker is. The first call also starts mapping its model."""
        session_of(self).start()
        return _status(self)

    @_answers
    def hubsync_attach(self) -> dict[str, Any]:
        """Start attaching: read the run, map the model, find the position of the live weights. Idempotent.

        The only worker of a server goes all the way to `ready`; one of several stops at `mapped`.
        """
        session_of(self).attach()
        return _done(self)

    @_answers
    def hubsync_join(self) -> dict[str, Any]:
        """With all workers `mapped`: find out together what the whole is, and go on to `ready`.

        A collective, so no worker may be in a forward pass that waits for another engine: where experts are spread over
        data parallel engines, pause the server for this call.
        """
        session_of(self).join()
        return _done(self)

    @_answers
    def hubsync_layout(self) -> dict[str, Any]:
        """How every tensor of the run lies in this worker's memory: `tensors`, name to class, elements and reason."""
        return {"rank": int(self.rank), **session_of(self).layout(), "error": None}  # type: ignore[attr-defined]

    @_answers
    def hubsync_stage(self, version: int, digest: str) -> dict[str, Any]:
        """Start staging this position. Idempotent; a new target replaces the old one."""
        session_of(self).stage(parse_position(version, digest))
        return _done(self)

    @_answers
    def hubsync_open(self, version: int, digest: str, token: str) -> dict[str, Any]:
        """A client is about to pause the server and commit this position."""
        session_of(self).open(parse_position(version, digest), _token(token))
        return _done(self)

    @_answers
    def hubsync_commit(self, version: int, digest: str, kv_cache: str = "recompute") -> dict[str, Any]:
        """Apply what is staged for this position, if all workers can. Also answers `changed`, the elements written.

        `kv_cache` is for the engine around the workers: see `vllm_plugin.core`.
        """
        changed = session_of(self).commit(parse_position(version, digest))
        return {**_done(self), "changed": changed}

    @_answers
    def hubsync_close(self, token: str) -> dict[str, Any]:
        """The client has reset the caches and resumed the server."""
        session_of(self).close(_token(token))
        return _done(self)

    @_answers
    def hubsync_undo(self) -> dict[str, Any]:
        """Write the old values of the last commit back."""
        session_of(self).undo()
        return _done(self)

    @_answers
    def hubsync_heal(self) -> dict[str, Any]:
        """Rebuild poisoned weights now instead of before the next forward pass."""
        session_of(self).heal()
        return _done(self)


def _status(worker: Any) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "rank": int(worker.rank),
        "parallel": compat.parallel_of(worker.vllm_config),
        **session_of(worker).status(),
        "vllm": compat.vllm_version(),
        "hubsync": hubsync.__version__,
    }


def _done(worker: Any) -> dict[str, Any]:
    """The status, as the answer to a request that succeeded: an error recorded earlier is not this request's."""
    return {**_status(worker), "error": None}


def parse_position(version: object, digest: object) -> Position:
    """FormatError unless both are what they should be."""
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise FormatError(f"version must be an integer from 0 to {MAX_VERSION}, not {version!r:.80}")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{32}", digest):
        raise FormatError(f"digest must be 32 hex digits, not {digest!r:.80}")
    return Position(version, digest)


def _token(token: object) -> str:
    if not isinstance(token, str) or not re.fullmatch(r"[\w.-]{1,128}", token):
        raise FormatError(f"token must be 1 to 128 letters, digits, dots, dashes or underscores, not {token!r:.80}")
    return token
