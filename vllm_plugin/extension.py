"""The worker extension: hubsync's methods on vLLM's workers, callable through `collective_rpc`.

    HUBSYNC_BUCKET=hf://buckets/me/runs/my-run VLLM_SERVER_DEV_MODE=1 \\
        vllm serve MODEL --worker-extension-cls vllm_plugin.DeltaWorkerExtension

vLLM mixes the class into its worker class. Requests reach a worker strictly between two forward passes.
"""

from __future__ import annotations

import re
from typing import Any

from hubsync.apply.protocol import KvPolicy, answering
from hubsync.errors import FormatError

from . import compat
from .worker import position_of, session_of, status_of

# vLLM imports this module in the worker process because the extension class is named on its command line, and it does
# so before it loads the model: the last moment at which packing can be avoided, and only in servers that use hubsync.
compat.keep_linears_live()


class DeltaWorkerExtension:
    """Delta weight sync for one vLLM worker. The methods are the table "Worker RPC" of docs/ARCHITECTURE.md.

    Every method returns a JSON-able dict and never raises; a failure is `{"error": {"type", "message"}}`, with a class
    of `hubsync.errors` as type. Success is the worker's status after it, with `error` None; only `hubsync_status`
    reports what went wrong in the background.

    The bucket is pinned when the server starts. Requests carry versions and digests only, because vLLM's control
    endpoints are not guarded by its API key: the worst they can do is to move the server to another committed version.

    A worker whose weights turn out wrong rebuilds them before its next forward pass, from the run's newest anchor or
    the local base checkpoint and the deltas. If that fails the forward pass raises and the engine ends with that
    message: it never runs with weights that are not known to be right. What had been cached by wrong weights stays
    cached: `metrics["heals"]` tells that it happened, and `/reset_prefix_cache` drops it.
    """

    # vLLM refuses an extension with a name that its worker has, and never calls its __init__: every name is prefixed,
    # and all state is one object, `self._hubsync`.

    @answering
    def hubsync_status(self) -> dict[str, Any]:
        """Where this worker is. The first call also starts mapping its model."""
        session_of(self).start()
        return status_of(self)

    @answering
    def hubsync_attach(self) -> dict[str, Any]:
        """Start attaching: read the run, map the model, find the position of the live weights. Idempotent.

        The only worker of a server goes all the way to `ready`; one of several stops at `mapped`.
        """
        session_of(self).attach()
        return _done(self)

    @answering
    def hubsync_join(self) -> dict[str, Any]:
        """With all workers `mapped`: find out together what the whole is, and go on to `ready`.

        A collective, so no worker may be in a forward pass that waits for another engine: where experts are spread over
        data parallel engines, pause the server for this call.
        """
        session_of(self).join()
        return _done(self)

    @answering
    def hubsync_layout(self) -> dict[str, Any]:
        """How every tensor of the run lies in this worker's memory: `tensors`, name to class, elements and reason."""
        return {"rank": int(self.rank), **session_of(self).layout(), "error": None}  # type: ignore[attr-defined]

    @answering
    def hubsync_stage(self, version: int, digest: str) -> dict[str, Any]:
        """Start staging this position. Idempotent; a new target replaces the old one."""
        session_of(self).stage(position_of(version, digest))
        return _done(self)

    @answering
    def hubsync_open(self, version: int, digest: str, token: str) -> dict[str, Any]:
        """A client is about to pause the server and commit this position."""
        session_of(self).open(position_of(version, digest), _token(token))
        return _done(self)

    @answering
    def hubsync_commit(self, version: int, digest: str, kv_cache: str = KvPolicy.RECOMPUTE) -> dict[str, Any]:
        """Apply what is staged for this position, if all workers can. Also answers `changed`, the elements written.

        `kv_cache` is for the engine around the workers: see `hubsync.apply.engine_commit`.
        """
        changed = session_of(self).commit(position_of(version, digest))
        return {**_done(self), "changed": changed}

    @answering
    def hubsync_close(self, token: str) -> dict[str, Any]:
        """The client has resumed the server."""
        session_of(self).close(_token(token))
        return _done(self)

    @answering
    def hubsync_undo(self) -> dict[str, Any]:
        """Write the old values of the last commit back."""
        session_of(self).undo()
        return _done(self)

    @answering
    def hubsync_heal(self) -> dict[str, Any]:
        """Rebuild poisoned weights now instead of before the next forward pass."""
        session_of(self).heal()
        return _done(self)


def _done(worker: Any) -> dict[str, Any]:
    """The status, as the answer to a request that succeeded: an error recorded earlier is not this request's."""
    return {**status_of(worker), "error": None}


def _token(token: object) -> str:
    if not isinstance(token, str) or not re.fullmatch(r"[\w.-]{1,128}", token):
        raise FormatError(f"token must be 1 to 128 letters, digits, dots, dashes or underscores, not {token!r:.80}")
    return token
