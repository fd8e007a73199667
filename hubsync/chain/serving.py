"""Choose the served version without being the publisher (`hubsync serve`)."""

from __future__ import annotations

import time
from functools import partial

from hubsync.bucket.base import Bucket
from hubsync.errors import ChainError, FormatError
from hubsync.format.manifest import Head, Position

from .head import read_head
from .index import ChainIndex
from .layout import Layout
from .reader import ChainReader
from .visible import once_visible

_TRIES = 5  # the publisher may commit its next version at the same moment


def serve(bucket: Bucket, reader: ChainReader, version: int | None) -> Position:
    """Let replicas serve a committed version (None: the newest) without taking the run over from its publisher.

    Writes only the served version in the head, and opens no epoch, so a publisher goes on. It repeats the served
    version with versions that it only saves, and replaces it with the next version that it publishes to be served.

    Raises:
        NoPath: the version does not exist.
        ChainError: the run has no version yet, or its publisher commits versions faster than the head can be written.
        BucketError: the head may or may not have been written.
    """
    index = ChainIndex(bucket, reader.run())
    index.survey()
    for _ in range(_TRIES):
        newest = index.newest()
        if newest is None:
            raise ChainError(f"{bucket.address} has no version to serve yet: publish one first")
        if version is None:
            position = newest.position
        else:
            position = reader.run().origin if version == 0 else reader.manifest(version).position
        head = Head(newest, position.version, time.time())
        bucket.commit(Layout.HEAD, head.dumps())
        if bucket.lag:  # the survey is evidence only after this write is visible
            once_visible(bucket, partial(_successor, bucket, head), Layout.HEAD)
        index.survey()
        if index.newest() == newest:  # else the head belongs to an older version, and is ignored
            return position
    raise ChainError(
        f"the publisher of {bucket.address} committed a version during each of {_TRIES} attempts to write the head: "
        "stop it, or let it save versions without serving them"
    )


def _successor(bucket: Bucket, head: Head) -> Head | None:
    """The stored head if it is this one or of a newer version; None if storage still shows an older one."""
    data = read_head(bucket)
    try:
        stored = None if data is None else Head.loads(data)
    except FormatError:
        return None
    if stored is None or (stored.written < head.written and stored.manifest.version <= head.manifest.version):
        return None
    return stored
