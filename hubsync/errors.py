"""Every error a user of hubsync can meet, as one small tree.

Each message says what happened and what to do next. Transport libraries (`huggingface_hub`, `hf_xet`,
`requests`) are translated into these classes where they are called, so callers never need to know them.
"""

from __future__ import annotations


class HubsyncError(Exception):
    """Base of everything hubsync raises on purpose."""


class ConfigError(HubsyncError):
    """A setting or argument that cannot work, or an optional package that is not installed."""


class CheckpointFailed(HubsyncError):
    """A save in the background, or the commit of its step, failed; the step does not become visible."""


# --- bucket -----------------------------------------------------------------------------------------


class BucketError(HubsyncError):
    """Base of what can go wrong between us and a bucket."""


class BucketMissing(BucketError):
    """The bucket (or the directory) does not exist."""


class BucketDenied(BucketError):
    """No token, a bad token, or one without the needed permission (read-only, foreign namespace)."""


class BucketUnavailable(BucketError):
    """Network failure, 429 or 5xx after all retries. Nothing is known to be wrong; trying later may work."""


class ObjectMissing(BucketError):
    """An object that should be in the bucket is not there (deleted, or never written)."""


class ObjectCorrupt(BucketError):
    """Bytes that do not have the size or SHA-256 that the manifest states."""


# --- format -----------------------------------------------------------------------------------------


class FormatError(HubsyncError):
    """A file, manifest or message that breaks the format: truncated, hostile, or of an unknown version."""


class UnknownFormat(FormatError):
    """A document in a format that this hubsync does not know: a newer one may read it."""


class Untrusted(FormatError):
    """A document that the key of the run has not signed."""


# --- chain ------------------------------------------------------------------------------------------


class ChainError(HubsyncError):
    """Base of errors about the order of versions."""


class RunMismatch(ChainError):
    """The run in the bucket belongs to another model: other tensors, other dtypes, or another base."""


class WrongParent(ChainError):
    """A delta whose parent (version and digest) is not what we hold."""


class NoPath(ChainError):
    """No chain of deltas and anchors in the bucket leads from what we hold to the version asked for."""


class HeadTooOld(ChainError):
    """The head was written longer ago than this reader accepts: the trainer stands still, or somebody holds it back."""


class Fenced(ChainError):
    """A newer writer epoch exists: this publisher has been replaced and must stop."""


# --- trainer ----------------------------------------------------------------------------------------


class RankError(HubsyncError):
    """Another rank of this training has ended, or failed with an error that only it can raise."""


# --- replica ----------------------------------------------------------------------------------------


class ReplicaError(HubsyncError):
    """Base of what can go wrong between us and an inference server."""


class ReplicaUnreachable(ReplicaError):
    """Connection refused, reset or timed out."""


class ReplicaUnsuitable(ReplicaError):
    """The server answers but cannot work with hubsync: not in dev mode, no worker extension, too old."""


class ReplicaRefused(ReplicaError):
    """A worker refused (wrong model, unsupported layout, wrong parent, not staged); its weights are untouched."""


class ReplicaBehind(ReplicaError):
    """A server that has not got to a version, for lack of time or because it is wanted elsewhere; the next one takes it
    along."""


class ReplicaPoisoned(ReplicaError):
    """A worker's weights are not known to be right; it refuses forward passes until re-anchored."""
