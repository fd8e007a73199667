"""Merging deltas in the background does not affect the training."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import replay
from hubsync.errors import BucketUnavailable, ConfigError
from hubsync.format.manifest import Manifest
from hubsync.publish import engine as engine_module
from tests.support.faults import FaultyBucket

PATIENCE = 60.0  # seconds, for a busy machine; no test here measures time


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyBucket:
    bucket = FaultyBucket(LocalBucket(tmp_path / "bucket", create=True))
    monkeypatch.setattr(engine_module, "open_bucket", lambda *args, **options: bucket)
    return bucket


@pytest.fixture
def train(bucket: FaultyBucket) -> Iterator[Callable[..., DeltaWeightTransferEngine]]:
    """Publishes versions of a model with an engine that merges deltas. The engine is closed at the end."""
    model = torch.nn.Linear(64, 64)
    engines: list[DeltaWeightTransferEngine] = []

    def publish(versions: int, encoding: str = "fast") -> DeltaWeightTransferEngine:
        if not engines:
            config = SyncConfig(bucket="bucket", compaction=True, encoding=encoding, detector="snapshot")
            engines.append(DeltaWeightTransferEngine(model, None, config))
        for _ in range(versions):
            with torch.no_grad():
                model.weight[torch.randint(64, (4,))] += 0.01
            engines[0].publish().result()
        return engines[0]

    yield publish
    for engine in engines:
        engine.close()


def merged(bucket: FaultyBucket, tmp_path: Path) -> list[Manifest]:
    reader = ChainReader(bucket, tmp_path / "reader")
    return reader.spans(reader.manifests())


def wait_for(spans: set[tuple[int, int]], bucket: FaultyBucket, tmp_path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not spans <= {(m.parent.version, m.version) for m in merged(bucket, tmp_path)}:
        assert time.monotonic() < deadline, "the spans were not merged"
        time.sleep(0.05)


@pytest.mark.parametrize("encoding", ["fast", "compact"])
def test_a_trainer_merges_its_deltas(
    bucket: FaultyBucket, tmp_path: Path, train: Callable[..., DeltaWeightTransferEngine], encoding: str
) -> None:
    for version in range(1, 5):
        train(1, encoding)
        if version % 2 == 0:  # publishing faster than merging skips spans of compact deltas
            wait_for({(version - 2, version)}, bucket, tmp_path)
    wait_for({(0, 2), (2, 4), (0, 4)}, bucket, tmp_path)
    assert {m.encoding for m in merged(bucket, tmp_path)} == {"fast"}
    reader = ChainReader(bucket, tmp_path / "cache")
    replay(reader, reader.plan(None)).verify()


def test_a_failed_merge_is_logged_once_and_retried(
    bucket: FaultyBucket,
    tmp_path: Path,
    train: Callable[..., DeltaWeightTransferEngine],
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = threading.Semaphore(0)

    def fail(path: str) -> None:
        if "/merged/" in path:
            failed.release()
            raise BucketUnavailable("the network is down")

    bucket.before_commit = fail
    train(4)
    for _ in range(2):
        assert failed.acquire(timeout=PATIENCE)
        train(1)
    assert caplog.text.count("could not merge deltas") == 1
    bucket.before_commit = lambda path: None
    train(1)
    wait_for({(0, 4)}, bucket, tmp_path)


def test_training_continues_without_a_directory_to_merge_in(
    tmp_path: Path,
    train: Callable[..., DeltaWeightTransferEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compactor = train(0)._publisher._compactor
    assert compactor is not None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    train(1)
    compactor._thread.join(PATIENCE)
    assert not compactor._thread.is_alive()
    assert train(2).position.version == 3
    assert "cannot merge deltas here" in caplog.text


def test_no_merge_starts_during_a_publish(
    bucket: FaultyBucket, tmp_path: Path, train: Callable[..., DeltaWeightTransferEngine]
) -> None:
    """While a publish hangs before its manifest, no merged delta is started."""
    train(3)
    wait_for({(0, 2)}, bucket, tmp_path)
    publishing, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def hang(path: str) -> None:
        if "/versions/00000004" in path:
            publishing.set()
            assert go_on.wait(PATIENCE)
        order.append(path)

    bucket.before_commit = hang
    thread = threading.Thread(target=train, args=(1,))
    thread.start()
    assert publishing.wait(PATIENCE)
    engine = train(0)
    engine._publisher._compactor.add(engine.position, None)  # as after a version: there is work
    go_on.set()
    thread.join()
    wait_for({(0, 4)}, bucket, tmp_path)
    assert "/versions/" in order[0]


def test_without_the_setting_nothing_is_merged(bucket: FaultyBucket, tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket="bucket")) as engine:
        for _ in range(2):
            with torch.no_grad():
                model.weight += 1
            engine.publish().result()
    assert "hubsync-compactor" not in {thread.name for thread in threading.enumerate()}
    assert merged(bucket, tmp_path) == []
    with pytest.raises(ConfigError, match="compaction must be bool"):
        SyncConfig(bucket="bucket", compaction="yes")
