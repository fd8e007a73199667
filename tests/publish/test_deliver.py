"""Committing versions on the servers of the config."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.errors import (
    ReplicaUnreachable,
)
from tests.replicas.test_replica import ModelServer
from tests.support.tiny import Tiny, train


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModelServer]:
    """Two servers that behave as the worker protocol says; they hold the base of whatever is published first."""
    made = {url: ModelServer() for url in ("http://one", "http://two")}
    monkeypatch.setattr("hubsync.replicas.deployment.connect", lambda url, *_, **__: made[url])
    return made


@pytest.fixture
def served(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, servers: dict[str, ModelServer]
) -> Iterator[DeltaWeightTransferEngine]:
    config = SyncConfig(bucket=address, base_model="tiny", servers=list(servers))
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        yield engine


def test_sync_commits_the_version_on_every_server(
    served: DeltaWeightTransferEngine, model: Tiny, optimizer: torch.optim.Optimizer, servers: dict[str, ModelServer]
) -> None:
    for step in (1, 2):
        train(model, optimizer)
        report = served.sync(step)
        assert report.published.position == served.position
        assert [commit.position for commit in report.commits] == [served.position] * 2
        for server in servers.values():
            server.assert_whole()
            assert server.positions == [[served.position]]
    assert served.sync(3).published.changed == 0


def test_servers_stage_a_durable_version_before_its_commit(
    served: DeltaWeightTransferEngine, model: Tiny, optimizer: torch.optim.Optimizer, servers: dict[str, ModelServer]
) -> None:
    served.sync(0)
    staged = threading.Barrier(3)  # the two servers, and this test
    for server in servers.values():
        server.fault = lambda call, before: None if before or call != "hubsync_stage" else _meet(staged)
    old = served.position
    train(model, optimizer)
    published = served.publish(1).result()
    _meet(staged)
    assert [server.staged for server in servers.values()] == [published.position] * 2
    assert [server.positions for server in servers.values()] == [[[old]]] * 2


def _meet(barrier: threading.Barrier) -> None:
    barrier.wait(timeout=60)


def test_a_failed_server_does_not_keep_others_from_the_version_and_catches_up(
    served: DeltaWeightTransferEngine, model: Tiny, optimizer: torch.optim.Optimizer, servers: dict[str, ModelServer]
) -> None:
    def unreachable(call: str, before: bool) -> None:
        if call == "hubsync_stage":
            raise ReplicaUnreachable("injected")

    train(model, optimizer)
    servers["http://one"].fault = unreachable
    with pytest.raises(ReplicaUnreachable):
        served.sync(1)
    assert served.position.version == 1
    assert servers["http://two"].positions == [[served.position]] != servers["http://one"].positions
    servers["http://one"].fault = lambda call, before: None
    assert served.sync(1).published.version == 1
    assert servers["http://one"].positions == [[served.position]]


def test_an_anchor_is_uploaded_for_a_server_without_a_path(
    served: DeltaWeightTransferEngine,
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    address: str,
    tmp_path: Path,
    servers: dict[str, ModelServer],
) -> None:
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")

    def plan(call: str, before: bool) -> None:
        if call == "hubsync_stage":
            reader.plan(None)  # this server has no base checkpoint

    servers["http://one"].fault = plan
    train(model, optimizer)
    assert served.sync(1).commits[0].position == served.position
    assert [manifest.kind for manifest in reader.manifests()] == ["delta", "anchor"]
