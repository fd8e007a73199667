"""Errors of hubsync.

Each message says what happened and what to do next. Errors of transport libraries are translated into these classes
where the libraries are called, so callers need to catch only these.
"""

from __future__ import annotations

import re

# User and password of a URL. The second form is for passwords with a slash, which should be written as %2F.
_USER_OF_URL = re.compile(r"""(?<=://)(?:[^/?#\s]*|[^/\s'"]*:(?!\d+/)[^\s'"]*)@""")


def without_users(text: str) -> str:
    """The text with `***` for user and password of every URL in it: `http://***@host`."""
    return _USER_OF_URL.sub("***@", text)


class HubsyncError(Exception):
    """Base of all errors of hubsync. Messages show no user and password of a URL."""

    def __init__(self, *args: object):
        super().__init__(*(without_users(part) if isinstance(part, str) else part for part in args))


class ConfigError(HubsyncError):
    """A setting or argument cannot work, or an optional package is not installed."""


class CheckpointFailed(HubsyncError):
    """A background save or the commit of its step failed. The step does not become visible."""


# --- bucket -----------------------------------------------------------------------------------------


class BucketError(HubsyncError):
    """Base of errors of a bucket."""


class BucketMissing(BucketError):
    """The bucket (or the directory) does not exist."""


class BucketDenied(BucketError):
    """No token, a bad token, or one without the needed permission (read-only, foreign namespace)."""


class BucketUnavailable(BucketError):
    """Network failure, 429 or 5xx after all retries. Trying later may work."""


class ObjectMissing(BucketError):
    """An object is missing from the bucket (deleted, or never written)."""


class ObjectCorrupt(BucketError):
    """An object does not have the size or SHA-256 of its manifest."""


# --- format -----------------------------------------------------------------------------------------


class FormatError(HubsyncError):
    """A file, manifest or message breaks the format: truncated, hostile, or of an unknown version."""


class UnknownFormat(FormatError):
    """A document has a format that this version of hubsync does not know. A newer version may read it."""


class Untrusted(FormatError):
    """A document is not signed by the key of the run."""


# --- chain ------------------------------------------------------------------------------------------


class ChainError(HubsyncError):
    """Base of errors about the order of versions."""


class RunMismatch(ChainError):
    """The run in the bucket is of another model: other tensors, other dtypes, or another base."""


class WrongParent(ChainError):
    """The parent (version and digest) of a delta is not the current position."""


class NoPath(ChainError):
    """No chain of deltas and anchors in the bucket leads from the current position to the target."""


class HeadTooOld(ChainError):
    """The head is older than this reader accepts: the trainer has stopped, or something withholds newer heads."""


class Fenced(ChainError):
    """A newer writer epoch exists. This publisher has been replaced and must stop."""


# --- trainer ----------------------------------------------------------------------------------------


class RankError(HubsyncError):
    """Another rank of this training has ended, or failed with an error that only it can raise."""


# --- replica ----------------------------------------------------------------------------------------


class ReplicaError(HubsyncError):
    """Base of errors of an inference server."""


class ReplicaUnreachable(ReplicaError):
    """Connection refused, reset or timed out."""


class ReplicaUnsuitable(ReplicaError):
    """The server answers but does not support hubsync: not in dev mode, no worker extension, or too old."""


class ReplicaRefused(ReplicaError):
    """A worker refused (wrong model, unsupported layout, wrong parent, not staged). Its weights are unchanged."""


class ReplicaBehind(ReplicaError):
    """A server did not reach a version, because of a timeout or because another version is wanted. The next commit
    includes it."""


class ReplicaPoisoned(ReplicaError):
    """A worker's weights may be wrong. It refuses forward passes until it is re-anchored."""
