"""Worker RPC: the methods of a worker that clients call, for any engine. docs/protocol.md is the reference."""

from __future__ import annotations

import re
from typing import Any

import hubsync
from hubsync.errors import FormatError
from hubsync.format.manifest import MAX_VERSION, Position

from .protocol import PROTOCOL, Answer, KvPolicy, answering
from .session import Session

_DIGEST = re.compile(r"[0-9a-f]{32}")
_TOKEN = re.compile(r"[\w.-]{1,128}")


class WorkerMethods:
    """Delta weight sync for one worker. An engine's integration implements `_hubsync_session` and `_hubsync_about`.

    Every method returns a JSON-able dict and never raises. A failure is `{"error": {"type", "message"}}`, with a class
    of `hubsync.errors` as type. Success is the worker's status afterwards, with `error` None; only `hubsync_status`
    reports errors of the background.

    The bucket is pinned when the server starts. Requests carry versions and digests only, because control endpoints of
    inference servers are not always guarded: the worst they can do is to move the server to another committed version.

    A worker whose weights turn out wrong rebuilds them before its next forward pass, from the run's newest anchor or
    the local base checkpoint and the deltas. If that fails the forward pass raises and the engine ends with that
    message: it never runs with weights that are not known to be right. Entries that wrong weights left in caches stay
    there: `metrics["heals"]` counts that, and resetting the prefix cache drops them.
    """

    # All names are prefixed, because an engine may mix the class into its own worker class. So it has no __init__ and
    # no attributes.

    def _hubsync_session(self) -> Session:
        """The worker's session, made at its first request."""
        raise NotImplementedError

    def _hubsync_about(self) -> dict[str, Any]:
        """`rank`, `parallel` (sizes `tp`, `pp`, `dp` and flag `ep`), and versions of the engine, for the status."""
        raise NotImplementedError

    @answering
    def hubsync_status(self) -> Answer:
        """The worker's status. The first call also starts mapping its model."""
        self._hubsync_session().start()
        return status(self._hubsync_session(), self._hubsync_about())

    @answering
    def hubsync_attach(self) -> Answer:
        """Start attaching: read the run, map the model, find the position of the live weights. Idempotent.

        The only worker of a server goes all the way to `ready`; one of several stops at `mapped`.
        """
        self._hubsync_session().attach()
        return _done(self)

    @answering
    def hubsync_join(self) -> Answer:
        """With all workers `mapped`: find their common position, and go on to `ready`.

        A collective, so no worker may be in a forward pass that waits for another engine: where experts are spread over
        data parallel engines, pause the server for this call.
        """
        self._hubsync_session().join()
        return _done(self)

    @answering
    def hubsync_layout(self) -> Answer:
        """The layout of every tensor of the run in this worker's memory: `tensors`, name to class, elements, reason."""
        return {"rank": self._hubsync_about()["rank"], **self._hubsync_session().layout(), "error": None}

    @answering
    def hubsync_stage(self, version: int, digest: str) -> Answer:
        """Start staging this position. Idempotent; a new target replaces the old one."""
        self._hubsync_session().stage(position_of(version, digest))
        return _done(self)

    @answering
    def hubsync_open(self, version: int, digest: str, token: str) -> Answer:
        """A client is about to pause the server and commit this position."""
        self._hubsync_session().open(position_of(version, digest), _token(token))
        return _done(self)

    @answering
    def hubsync_commit(self, version: int, digest: str, kv_cache: str = KvPolicy.DEFAULT) -> Answer:
        """Apply the staged change to this position, if all workers can. Also answers `changed`, the elements written.

        `kv_cache` is for the engine around the workers: see `hubsync.apply.engine_commit`.
        """
        changed = self._hubsync_session().commit(position_of(version, digest))
        return {**_done(self), "changed": changed}

    @answering
    def hubsync_close(self, token: str) -> Answer:
        """The client has resumed the server."""
        self._hubsync_session().close(_token(token))
        return _done(self)

    @answering
    def hubsync_undo(self) -> Answer:
        """Write the old values of the last commit back."""
        self._hubsync_session().undo()
        return _done(self)

    @answering
    def hubsync_heal(self) -> Answer:
        """Rebuild poisoned weights now instead of before the next forward pass."""
        self._hubsync_session().heal()
        return _done(self)

    @answering
    def hubsync_verify(self) -> Answer:
        """Start looking at all live weights now; `verification` of the status says when it is done."""
        self._hubsync_session().verify()
        return _done(self)


def status(session: Session, about: dict[str, Any]) -> Answer:
    """A worker's status. Asking has no effect.

    Args:
        about: see `WorkerMethods._hubsync_about`.
    """
    return {"protocol": PROTOCOL, **about, **session.status(), "hubsync": hubsync.__version__}


def _done(worker: WorkerMethods) -> Answer:
    """The status as the answer to a request that succeeded: an error recorded earlier is not this request's."""
    return {**status(worker._hubsync_session(), worker._hubsync_about()), "error": None}


def position_of(version: object, digest: object) -> Position:
    """The position that a request names, or FormatError."""
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise FormatError(f"version must be an integer from 0 to {MAX_VERSION}, not {version!r:.80}")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise FormatError(f"digest must be 32 hex digits, not {digest!r:.80}")
    return Position(version, digest)


def _token(token: object) -> str:
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise FormatError(f"token must be 1 to 128 letters, digits, dots, dashes or underscores, not {token!r:.80}")
    return token
