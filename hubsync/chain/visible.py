"""Wait until the storage shows what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hubsync.bucket.base import Bucket
from hubsync.errors import BucketUnavailable
from hubsync.retry import attempts

T = TypeVar("T")


def once_visible(bucket: Bucket, look: Callable[[], T | None], what: str) -> T:
    """Return `look()` once it is not None. BucketUnavailable if `what` stays invisible for longer than the lag."""
    for _ in attempts(bucket.lag, waiting_for=f"{bucket.address} to show {what}"):
        found = look()
        if found is not None:
            return found
    raise BucketUnavailable(
        f"{bucket.address} has accepted {what}, and does not show it after {bucket.lag:.0f} s. Try again later"
    )
