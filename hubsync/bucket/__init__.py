"""Where runs live: a Hugging Face bucket, or a directory. Open either with `open_bucket`."""

from __future__ import annotations

from .address import HUB_SCHEME, not_an_address
from .base import Bucket, Download, Stat, Upload
from .local import LocalBucket

__all__ = ["Bucket", "Download", "LocalBucket", "Stat", "Upload", "open_bucket"]


def open_bucket(address: str, *, create: bool = False, token: str | None = None, endpoint: str | None = None) -> Bucket:
    """Open the bucket at `address`: `hf://buckets/<namespace>/<name>/<run>`, or a directory.

    Args:
        address: what the user typed.
        create: make the bucket (private on the Hub) or the directory if it does not exist yet.
        token: Hugging Face token; default is the one of the environment or of `hf auth login`.
        endpoint: URL of the Hub; default is `HF_ENDPOINT`, or the public Hub.

    Raises:
        ConfigError: the address has neither form.
        BucketMissing: it does not exist and `create` is false.
        BucketDenied: no access with this token.
    """
    if address.startswith(HUB_SCHEME):
        from .hub import HubBucket

        return HubBucket(address, create=create, token=token, endpoint=endpoint)
    if not address.strip() or "://" in address or address.startswith("hf:"):
        raise not_an_address(address)
    return LocalBucket(address, create=create)
