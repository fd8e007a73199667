"""Fixtures of everything that needs a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubsync.bucket import Bucket, LocalBucket


@pytest.fixture(params=["local"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    """An empty bucket of every kind."""
    return LocalBucket(tmp_path / "bucket", create=True)
