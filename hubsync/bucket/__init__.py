"""Where runs live: a Hugging Face bucket, or a directory. Open either with `open_bucket`."""

from __future__ import annotations

from hubsync.format.keys import PublicKey, SigningKey

from .address import HUB_SCHEME, not_an_address
from .base import Bucket, Download, Stat, Upload
from .local import LocalBucket
from .signed import SignedBucket

__all__ = ["Bucket", "Download", "LocalBucket", "SignedBucket", "Stat", "Upload", "open_bucket"]


def open_bucket(
    address: str,
    *,
    create: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    key: PublicKey | SigningKey | None = None,
) -> Bucket:
    """Open the bucket at `address`: `hf://buckets/<namespace>/<name>/<run>`, or a directory.

    Args:
        address: what the user typed.
        create: make the bucket (private on the Hub) or the directory if it does not exist yet.
        token: Hugging Face token; default is the one of the environment or of `hf auth login`.
        endpoint: URL of the Hub; default is `HF_ENDPOINT`, or the public Hub.
        key: refuse documents that it has not signed; a signing key also signs what is written.

    Raises:
        ConfigError: the address has neither form.
        BucketMissing: it does not exist and `create` is false.
        BucketDenied: no access with this token.
    """
    bucket: Bucket
    if address.startswith(HUB_SCHEME):
        from .hub import HubBucket

        bucket = HubBucket(address, create=create, token=token, endpoint=endpoint)
    elif not address.strip() or "://" in address or address.startswith("hf:"):
        raise not_an_address(address)
    else:
        bucket = LocalBucket(address, create=create)
    return bucket if key is None else SignedBucket(bucket, key)
