"""The sliced detector publishes exact versions, and detects writes outside of the optimizer's steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.errors import BucketUnavailable, ChainError
from hubsync.format.digest import digest_view
from hubsync.publish import engine as engine_module
from hubsync.publish.detect import sliced as sliced_module
from hubsync.publish.detect.sliced import Sliced
from hubsync.publish.view.live import table_of
from tests.support.faults import FaultyBucket
from tests.support.tiny import Tiny, follow, same_bits, sliced, train, view_of


@pytest.fixture
def optimizer(model: Tiny) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reader_ends_bit_equal_after_failed_publishes(
    dtype: torch.dtype, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty: list[FaultyBucket] = []

    def open_faulty(address: str, **_: object) -> FaultyBucket:
        faulty.append(FaultyBucket(LocalBucket(address, create=True)))
        return faulty[-1]

    monkeypatch.setattr(engine_module, "open_bucket", open_faulty)
    torch.manual_seed(0)
    model = Tiny(dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    base = view_of(model)
    config = SyncConfig(bucket=address, base_model="tiny", detector="sliced", audit_every=2)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for step in range(8):
            train(model, optimizer, 1 + step % 3)
            if step in (2, 5):
                engine.wait()
                faulty[0].fail("commit", 1, when="before" if step == 2 else "after")
                with pytest.raises(BucketUnavailable):
                    engine.publish(step).result()
            else:
                engine.publish(step)
                train(model, optimizer)  # during the upload
        engine.publish(8).result()
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    assert {manifest.kind for manifest in reader.manifests()} == {"delta"}
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_an_anchor_restores_the_published_view_without_a_copy(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny", detector="sliced", anchor_every=2)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for step in range(3):
            train(model, optimizer)
            engine.publish(step)
        engine.wait()
        published = view_of(model)
        train(model, optimizer, 2)
        assert engine.anchor().position == engine.position
    kinds = [manifest.kind for manifest in ChainReader(LocalBucket(address), tmp_path / "cache").manifests()]
    assert kinds.count("anchor") == 2
    assert same_bits(follow(address, tmp_path).tensors, published)


def seen_by_torch(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        model.scale.add_(1)


def past_torch(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    model.layers[1].weight.data[0, 0] += 1


def another_checkpoint(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict(Tiny().state_dict())


def past_our_step(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(5)).square().mean().backward()
    type(optimizer).step(optimizer)


def replaced(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    model.layers[0].weight.data = torch.randn(6, 6)


WRITES = [seen_by_torch, past_torch, another_checkpoint, past_our_step, replaced]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("then", ["publish", "close", "anchor"])
def test_a_write_outside_of_steps_uploads_the_whole_model(
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    address: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    write: Callable[[Tiny, torch.optim.Optimizer], None],
    then: str,
) -> None:
    base = view_of(model)
    config = SyncConfig(bucket=address, base_model="tiny", detector="sliced", audit_every=1)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        train(model, optimizer)
        engine.publish(1).result()
        write(model, optimizer)
        train(model, optimizer)
        if then == "publish":
            published = engine.publish(2).result()
            assert (published.version, published.encoding) == (2, "dense")
        elif then == "anchor":
            assert engine.anchor().version == 2
        if then != "close":
            train(model, optimizer)
            assert engine.publish(3).result().encoding == "fast"
    assert [record for record in caplog.records if "written outside" in record.message]
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


@pytest.mark.parametrize("write", [seen_by_torch, another_checkpoint, past_our_step, replaced])
def test_most_writes_are_detected_without_an_audit(
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    address: str,
    write: Callable[[Tiny, torch.optim.Optimizer], None],
) -> None:
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, audit_every=0)) as engine:
        train(model, optimizer)
        engine.publish(1).result()
        write(model, optimizer)
        assert engine.publish(2).result().encoding == "dense"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_detection_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    live = {"weight": weight}
    optimizer = torch.optim.SGD([weight], lr=1.0)
    detector = Sliced(live, table_of(live, torch.bfloat16), optimizer)
    for gradient in (1.0, -1.0):  # to other bits and back
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        if gradient > 0:
            assert detector.detect().changed == 3
    with monkeypatch.context() as patch:
        patch.setattr(sliced_module, "PendingChanges", interrupt)
        with pytest.raises(KeyboardInterrupt):
            detector.detect()
    assert detector.detect().changed == 0


def test_an_interrupted_restart_is_repeated(
    model: Tiny, optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = sliced(model, optimizer)
    past_torch(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(detector, "_index_live", interrupt)
        with pytest.raises(KeyboardInterrupt):
            detector.detect()
    train(model, optimizer)
    assert detector.detect().before == digest_view(detector.table, view_of(model))


def test_the_first_and_every_nth_publish_is_audited(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str
) -> None:
    encodings = []
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, audit_every=3)) as engine:
        for step in range(7):
            past_torch(model, optimizer)
            train(model, optimizer)
            encodings.append(engine.publish(step).result().encoding)
    assert encodings == ["dense", "fast", "fast", "dense", "fast", "fast", "dense"]


def test_a_failed_anchor_after_an_outside_write_is_retried(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = FaultyBucket(LocalBucket(address, create=True))
    monkeypatch.setattr(engine_module, "open_bucket", lambda *_, **__: faulty)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine:
        for when in ("before", "after"):
            seen_by_torch(model, optimizer)
            faulty.fail("commit", 1, when=when)
            with pytest.raises(BucketUnavailable):
                engine.publish(1)
            train(model, optimizer)
            engine.publish(2).result()
            assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_a_view_that_cannot_be_restored_is_refused(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    detector = sliced(model, optimizer)
    past_torch(model, optimizer)
    with pytest.raises(ChainError, match="written outside"):
        detector.tensors()
    assert detector.detect().before == digest_view(detector.table, view_of(model))
