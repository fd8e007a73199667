"""Saying which version is to be served, by who is not the publisher."""

from __future__ import annotations

import time

from hubsync.bucket.base import Bucket
from hubsync.errors import ChainError
from hubsync.format.manifest import Head, Position

from .index import ChainIndex
from .layout import Layout
from .reader import ChainReader

_TRIES = 5  # a publisher may commit its next version just then


def serve(bucket: Bucket, reader: ChainReader, version: int | None) -> Position:
    """Let replicas serve a committed version (None: the newest), without taking the run from its publisher.

    Moves nothing but that word of the head, and opens no epoch: a publisher goes on, keeps the word in what it only
    saves, and gives another one with the next version that it has served.

    Raises:
        NoPath: the version does not exist.
        ChainError: the run has no versions yet, or a publisher commits versions faster than this can be said.
        BucketError: the word may or may not be given.
    """
    index = ChainIndex(bucket, reader.run())
    index.survey()
    for _ in range(_TRIES):
        newest = index.newest()
        if newest is None:
            raise ChainError(f"{bucket.address} has no version yet: there is nothing to choose from")
        if version is None:
            position = newest.position
        else:
            position = reader.run().origin if version == 0 else reader.manifest(version).position
        bucket.commit(Layout.HEAD, Head(newest, position.version, time.time()).dumps())
        index.survey()
        if index.newest() == newest:  # else the head is one of an older version, and says nothing
            return position
    raise ChainError(
        f"the publisher of {bucket.address} commits one version after the other: stop it, or have it save its versions "
        "without serving them"
    )
