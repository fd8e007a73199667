"""Is there a run already? A storage that shows writes late cannot tell by itself.

So a trainer that finds none writes a *claim* first. Once its claim is visible, everything that was written before it is
visible too: a run that another process (this trainer before its restart) had just created, and the claims of others
that create one now. With another claim in place it waits for the run that this one announces; of several the lowest
name waits the shortest, so that one of them creates it even if all others have died.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hubsync.bucket.base import Bucket
from hubsync.errors import BucketError
from hubsync.format.documents import FORMAT
from hubsync.retry import attempts

from .layout import Layout
from .visible import once_visible

logger = logging.getLogger(__name__)


@contextmanager
def claimed(bucket: Bucket) -> Iterator[bool]:
    """Whether the bucket holds a run. If not, create it within the context: others that ask wait for it meanwhile.

    Raises:
        BucketUnavailable: what was written does not become visible.
    """
    if bucket.read([Layout.RUN]):
        yield True
        return
    if not bucket.lag:
        yield False
        return
    claim = Layout.claim(secrets.token_hex(4))
    bucket.commit(claim, json.dumps({"format": FORMAT, "created": time.time()}).encode())
    try:
        once_visible(bucket, lambda: bucket.stat([claim]) or None, claim)
        yield _appears(bucket, claim)
    finally:
        _withdraw(bucket, claim)


def _appears(bucket: Bucket, claim: str) -> bool:
    """Whether there is a run, or another process creates one before it is our turn."""
    claims = sorted({stat.path for stat in bucket.list(Layout.CLAIMS)} | {claim})
    patience = bucket.lag * (1 + claims.index(claim)) if len(claims) > 1 else 0.0
    what = f"another trainer that creates a run in {bucket.address} now, or has died while it did"
    return any(bucket.read([Layout.RUN]) for _ in attempts(patience, waiting_for=what))


def _withdraw(bucket: Bucket, claim: str) -> None:
    try:
        bucket.delete([claim])
    except BucketError as error:  # it makes the next creator wait, of which there will be none
        logger.warning("%s stays in %s: %s", claim, bucket.address, error)
