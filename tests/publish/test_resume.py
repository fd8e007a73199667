"""Joining a run: takeover, fencing, and models that are not at the newest version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.errors import (
    Fenced,
    RunMismatch,
)
from tests.support.tiny import Tiny, follow, same_bits, train, view_of


def test_a_replaced_engine_is_fenced_and_its_successor_continues_with_deltas(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny")
    base = view_of(model)
    old = DeltaWeightTransferEngine(model, optimizer, config)
    train(model, optimizer)
    old.publish(1).result()
    with DeltaWeightTransferEngine(model, optimizer, config) as new:
        assert new.position == old.position
        train(model, optimizer)
        with pytest.raises(Fenced):
            old.publish(2).result()
        new.publish(2).result()
    old.close()
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    assert {manifest.kind for manifest in reader.manifests()} == {"delta"}
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_a_replaced_engine_is_fenced_although_nothing_has_changed(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str
) -> None:
    """Else `sync` would bring servers back to where its successor was long ago."""
    old = DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address))
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)):
        with pytest.raises(Fenced):
            old.publish(1)
        with pytest.raises(Fenced):
            old.sync(2)
    old.close()


def test_an_engine_with_changed_weights_resumes_with_an_anchor(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny")
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        train(model, optimizer)
        first = engine.publish(1).result()
    train(model, optimizer)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        assert engine.position.version > first.version
        assert same_bits(follow(address, tmp_path).tensors, view_of(model))
        train(model, optimizer)
        engine.publish(3).result()
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


@pytest.mark.parametrize("encoding", ["fast", "compact"])
def test_an_engine_at_an_older_version_resumes_with_a_delta_back_to_it(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, encoding: str
) -> None:
    base = view_of(model)
    config = SyncConfig(bucket=address, base_model="tiny", encoding=encoding)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for step in (1, 2, 3):
            train(model, optimizer)
            engine.publish(step).result()
            if step == 1:
                checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                digest = engine.position.digest
        newest = engine.position
    model.load_state_dict(checkpoint)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        assert engine.position.digest == digest
        assert engine.position.version > newest.version
        train(model, optimizer)
        engine.publish(2).result()
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    assert {manifest.kind for manifest in reader.manifests()} == {"delta"}
    assert len(reader.plan(newest).deltas) == 2
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_an_engine_at_an_older_version_resumes_with_an_anchor_if_deltas_are_damaged(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny")
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        train(model, optimizer)
        engine.publish(1).result()
    (part,) = Path(address).glob("epochs/*/deltas/*")
    part.write_bytes(b"x" * part.stat().st_size)
    model.load_state_dict(checkpoint)
    DeltaWeightTransferEngine(model, optimizer, config).close()
    assert "cannot be read" in caplog.text
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_the_run_of_another_model_is_refused_and_not_modified(model: Tiny, address: str) -> None:
    DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)).close()
    before = sorted(stat.path for stat in LocalBucket(address).list())
    with pytest.raises(RunMismatch, match=r"embed\.weight BF16\[11, 6\] where .* embed\.weight BF16\[11, 8\]"):
        DeltaWeightTransferEngine(Tiny(width=8), None, SyncConfig(bucket=address))
    with pytest.raises(RunMismatch, match="resume is False"):
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, resume=False))
    assert sorted(stat.path for stat in LocalBucket(address).list()) == before
