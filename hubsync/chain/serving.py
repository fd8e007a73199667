"""Choose the served version without being the publisher (`hubsync serve`)."""

from __future__ import annotations

import time

from hubsync.bucket.base import Bucket
from hubsync.errors import ChainError
from hubsync.format.manifest import Head, Position

from .index import ChainIndex
from .layout import Layout
from .reader import ChainReader

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
        bucket.commit(Layout.HEAD, Head(newest, position.version, time.time()).dumps())
        index.survey()
        if index.newest() == newest:  # else the head belongs to an older version, and is ignored
            return position
    raise ChainError(
        f"the publisher of {bucket.address} committed a version during each of {_TRIES} attempts to write the head: "
        "stop it, or let it save versions without serving them"
    )
