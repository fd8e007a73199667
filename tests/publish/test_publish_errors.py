"""No change is lost when a publish fails or is interrupted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.chain.head import HeadWriter
from hubsync.errors import (
    BucketError,
    BucketUnavailable,
)
from tests.support.faults import FaultyBucket
from tests.support.tiny import Tiny, follow, same_bits, train, view_of


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("verb", "nth"), [("put", 1), ("list", 1), ("commit", 1), ("commit", 2)])
def test_the_version_after_a_failure_holds_every_change(
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    address: str,
    tmp_path: Path,
    faulty: list[FaultyBucket],
    verb: str,
    nth: int,
    when: str,
) -> None:
    base = view_of(model)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="tiny")) as engine:
        train(model, optimizer)
        engine.publish(1).result()
        faulty[0].fail(verb, nth, when=when)
        train(model, optimizer)
        ticket = engine.publish(2)
        if (verb, nth) != ("commit", 2):  # a head that cannot be written is a warning
            with pytest.raises(BucketUnavailable):
                ticket.result()
        train(model, optimizer)
        published = engine.publish(3).result()
        assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))
        train(model, optimizer)
        published = engine.publish(4).result()
    followed = follow(address, tmp_path, base=base)
    assert same_bits(followed.tensors, view_of(model))
    assert followed.position == published.position
    manifests = ChainReader(LocalBucket(address), tmp_path / "cache").manifests()
    assert {(manifest.kind, manifest.absolute) for manifest in manifests} == {("delta", 0)}


def test_a_background_error_is_raised_once(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, faulty: list[FaultyBucket]
) -> None:
    engine = DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address))
    train(model, optimizer)
    faulty[0].fail("put", error=BucketError("injected"))
    engine.publish(1)
    with pytest.raises(BucketError, match="injected"):
        engine.publish(2)
    assert engine.publish(3).result().version == 1
    train(model, optimizer)
    faulty[0].fail("put", error=BucketError("injected"))
    engine.publish(4)
    with pytest.raises(BucketError, match="injected"):
        engine.close()


@pytest.mark.parametrize("detector", ["sliced", "snapshot"])
def test_the_next_publish_waits_for_one_whose_ticket_an_interrupt_lost(
    detector: str, model: Tiny, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    base, put = view_of(model), LocalBucket.put
    config = SyncConfig(bucket=address, base_model="tiny", detector=detector)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        publisher = engine._publisher
        submit = publisher._thread.submit

        def interrupted(job: Any, *args: Any) -> Any:
            future = submit(job, *args)
            if job == publisher._publish_then_merge:
                raise KeyboardInterrupt
            return future

        monkeypatch.setattr(LocalBucket, "put", lambda *args: (time.sleep(0.2), put(*args)))  # the job takes its time
        monkeypatch.setattr(publisher._thread, "submit", interrupted)
        train(model, optimizer)
        with pytest.raises(KeyboardInterrupt):
            engine.publish(1)
        monkeypatch.setattr(publisher._thread, "submit", submit)
        train(model, optimizer)
        assert engine.publish(2).result().version == 2
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_a_version_whose_head_was_interrupted_is_the_parent_of_the_next(
    model: Tiny, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(writer: HeadWriter) -> None:
        raise KeyboardInterrupt

    base = view_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="tiny")) as engine:
        train(model, optimizer)
        monkeypatch.setattr(HeadWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.publish(1).result()
        monkeypatch.undo()
        train(model, optimizer)
        assert engine.publish(2).result().version == 2
    assert [manifest.kind for manifest in ChainReader(LocalBucket(address), tmp_path).manifests()] == ["delta"] * 2
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))
