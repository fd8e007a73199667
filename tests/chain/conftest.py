"""A run of random changes, and a reader of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubsync.bucket import Bucket, LocalBucket
from hubsync.chain import ChainReader
from tests.support.history import History


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return LocalBucket(tmp_path / "bucket", create=True)


@pytest.fixture
def history(bucket: Bucket) -> History:
    return History(bucket)


@pytest.fixture
def reader(history: History, tmp_path: Path) -> ChainReader:
    return history.reader(tmp_path / "cache")
