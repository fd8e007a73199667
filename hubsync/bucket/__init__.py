"""Storage of runs: a Hugging Face bucket, a directory, or a registered backend. `open_bucket` opens each by address."""

from __future__ import annotations

from hubsync.errors import ConfigError
from hubsync.format.keys import PublicKey, SigningKey

from .base import Bucket, Copied, Download, Stat, Upload
from .local import LocalBucket
from .registry import opener_for
from .signed import SignedBucket

__all__ = ["Bucket", "Copied", "Download", "LocalBucket", "SignedBucket", "Stat", "Upload", "open_bucket"]


def open_bucket(
    address: str,
    *,
    create: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    key: PublicKey | SigningKey | None = None,
) -> Bucket:
    """Open the bucket at `address`.

    Args:
        address: `hf://buckets/<namespace>/<name>/<run>`, a directory, or an address with a scheme that an installed
            package has registered (see `hubsync.bucket.registry`).
        create: make the bucket (private on the Hub) or the directory if it does not exist.
        token: Hugging Face token. Defaults to the one of the environment or of `hf auth login`.
        endpoint: URL of the Hub. Defaults to `HF_ENDPOINT`, else the public Hub.
        key: reject documents that this key has not signed. A signing key also signs what is written.

    Raises:
        ConfigError: the address is malformed, no backend is installed for its scheme, or the token is no text that an
            HTTP header can carry.
        BucketMissing: the bucket does not exist and `create` is false.
        BucketDenied: the token has no access.
        BucketUnavailable: the storage cannot be reached.
    """
    bucket = opener_for(address)(address, create=create, token=_checked(token), endpoint=endpoint)
    return bucket if key is None else SignedBucket(bucket, key)


def _checked(token: str | None) -> str | None:
    """The token without spaces around it. HTTP libraries show a token in their error if no header can carry it."""
    token = None if token is None else token.strip()
    if token and not (token.isascii() and token.isprintable()):
        raise ConfigError("the Hugging Face token has characters other than printable ASCII: copy it again")
    return token
