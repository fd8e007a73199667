"""The head of a run: its newest manifest, and the version that replicas serve.

The head is a hint that saves a listing. The manifests decide which version is the newest.
"""

from __future__ import annotations

import logging
import time

from hubsync.bucket.base import Bucket
from hubsync.errors import BucketError, FormatError
from hubsync.format.documents import MAX_BYTES
from hubsync.format.manifest import Head, Manifest

from .layout import Layout

logger = logging.getLogger(__name__)


REJECTED = b""


def read_head(bucket: Bucket) -> bytes | None:
    """The stored bytes of the head; None if it does not exist, `REJECTED` if it is too large or not signed by the key.

    The manifest it names is checked, and a forged head must not block the way to the others.
    """
    try:
        return bucket.read([Layout.HEAD], max_bytes=MAX_BYTES).get(Layout.HEAD)
    except FormatError as error:
        logger.warning("ignoring the head of %s: %s", bucket.address, error)
        return REJECTED


class HeadWriter:
    """Keeps the stored head of a run in step with its newest manifest and its served version.

    Attributes:
        newest: the newest manifest; None while the run has none, and then there is no head.
        served: the version that replicas serve.
        behind: whether the stored head is older than these two.
    """

    def __init__(self, bucket: Bucket):
        self.newest: Manifest | None = None
        self.served = 0
        self.behind = False
        self._bucket = bucket
        self._drafted: tuple[Manifest, bytes] | None = None

    def advance(self, manifest: Manifest) -> None:
        """Make a committed manifest the newest, and serve the version that it names. Writes nothing."""
        self.newest, self.served, self.behind = manifest, manifest.served, True

    def drafted(self, manifest: Manifest) -> bytes:
        """The head after `manifest` is committed, as `advance` and `write` write it."""
        self._drafted = manifest, Head(manifest, manifest.served, time.time()).dumps()
        return self._drafted[1]

    def write(self) -> None:
        """Write the head. If that fails, log it, and leave it to the next commit: versions do not depend on it."""
        if self.newest is None:
            return
        try:
            self._commit(self.newest)
        except BucketError as error:
            self.behind = True
            logger.warning(
                "%s is committed, but the head could not be written (%s): replicas that poll see it one version later",
                self.newest.position,
                error,
            )

    def serve(self, version: int) -> None:
        """Write another served version. After a BucketError the next commit writes the head again."""
        assert self.newest is not None  # without a version there is no head
        self.served, self.behind = version, True
        self._commit(self.newest)

    def repair(self, newest: Manifest | None) -> None:
        """Continue at `newest`, and rewrite a head that is not its own.

        A writer that died between manifest and head left the head one version behind. A valid head decides which
        version is served; otherwise the newest manifest does.
        """
        self.newest = newest
        if newest is None:
            self.served = 0
            return
        stored = self._stored(newest)
        self.served = newest.served if stored is None else stored
        if stored is None:
            self.write()

    def reread(self) -> None:
        """Take over the served version of the stored head: `hubsync serve` may have changed it."""
        if self.newest is None or self.behind:
            return
        try:
            stored = self._stored(self.newest)
        except BucketError:  # keep the known version
            return
        if stored is not None:
            self.served = stored

    def _commit(self, newest: Manifest) -> None:
        drafted, self._drafted = self._drafted, None
        if drafted is not None and drafted[0] == newest and self.served == newest.served:
            self._bucket.commit(Layout.HEAD, drafted[1])
        else:
            self._bucket.commit(Layout.HEAD, Head(newest, self.served, time.time()).dumps())
        self.behind = False

    def _stored(self, newest: Manifest) -> int | None:
        """The served version by the stored head; None if the head is not valid for `newest`."""
        data = read_head(self._bucket)
        try:
            head = None if data is None else Head.loads(data)
        except FormatError:  # only a hint
            return None
        return head.serve if head is not None and head.manifest.position == newest.position else None
