"""Fixtures for tests that need a bucket. The environment is set before anything imports huggingface_hub."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# No test may reach the public Hub, send telemetry, or share a cache with it: hf_xet remembers uploads by endpoint. It
# reads its settings once per process, so its retries are fast in all tests. Processes that a test spawns inherit this.
# Each process of pytest-xdist has its own directory and its own Hub.
if multiprocessing.parent_process() is None:
    _HOME = tempfile.TemporaryDirectory(prefix="hubsync-tests-")
    os.environ.update(
        HF_ENDPOINT="http://127.0.0.1:9",  # the discard port: a call without `endpoint=` fails at once
        HF_HOME=os.path.join(_HOME.name, "hf"),
        HF_XET_CACHE=os.path.join(_HOME.name, "xet"),
        HF_XET_TELEMETRY_ENABLED="false",
        HF_XET_CLIENT_RETRY_BASE_DELAY="20ms",
        HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="2",
        HF_HUB_DISABLE_TELEMETRY="1",
    )

from hubsync.bucket import Bucket, LocalBucket, hub, hub_api
from hubsync.bucket.hub import HubBucket
from hubsync.localhub import LocalHub

# A minute passes quickly here: names of the local Hub are visible at once unless a test delays them.
hub.LAG_SECONDS, hub._RESEND_SECONDS, hub._MISSING_SECONDS = 1.0, 0.3, 0.2
hub_api.PATIENCE_SECONDS = 6.0

TOKEN, READ_ONLY_TOKEN = "hf_writer", "hf_reader"


@pytest.fixture(scope="session")
def hub_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """One Hub for all tests: a second one on the same port would lack what hf_xet believes to have uploaded."""
    root = tmp_path_factory.mktemp("hub")
    with LocalHub(root, tokens={TOKEN}, read_only_tokens={READ_ONLY_TOKEN}) as hub:
        yield hub


@pytest.fixture
def local_hub(hub_process: LocalHub) -> Iterator[LocalHub]:
    """A Hub on loopback that accepts `TOKEN` and `READ_ONLY_TOKEN`, without faults and with counters at zero."""
    hub_process.reset()
    yield hub_process
    hub_process.reset()


@pytest.fixture
def hub_address() -> str:
    """The address of a bucket that does not exist yet."""
    return f"hf://buckets/me/{secrets.token_hex(8)}/run"


@pytest.fixture
def hub_bucket(local_hub: LocalHub, hub_address: str) -> HubBucket:
    """An empty bucket on `local_hub`; counters at zero."""
    bucket = HubBucket(hub_address, create=True, token=TOKEN, endpoint=local_hub.url)
    local_hub.reset()
    return bucket


@pytest.fixture(params=["local", "hub"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    """An empty bucket of every kind."""
    if request.param == "hub":
        return request.getfixturevalue("hub_bucket")
    return LocalBucket(tmp_path / "bucket", create=True)
