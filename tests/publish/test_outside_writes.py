"""Every publish is proved: writes outside of the optimizer's steps are found, named and published at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.errors import BucketUnavailable, ChainError
from hubsync.publish import engine as engine_module
from hubsync.publish.detect import recorder as recorder_module
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
    config = SyncConfig(bucket=address, base_model="tiny", detector="sliced")
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
    assert {(manifest.kind, manifest.absolute) for manifest in reader.manifests()} == {("delta", 0)}
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


def by_numpy(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    model.layers[0].bias.detach().numpy()[1] += 1


def by_a_vector(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector * 1.5, model.parameters())


def by_another_optimizer(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))


def swapped_twice(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    """The allocator may return the old address."""
    for _ in range(2):
        model.layers[1].weight.data = torch.randn_like(model.layers[1].weight)


WRITES = [
    seen_by_torch,
    past_torch,
    another_checkpoint,
    past_our_step,
    replaced,
    by_numpy,
    by_a_vector,
    by_another_optimizer,
    swapped_twice,
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("detector", ["sliced", "snapshot"])
@pytest.mark.parametrize("order", ["write-step", "step-write-step", "write"])
def test_a_write_outside_of_steps_is_published_at_once(
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    address: str,
    tmp_path: Path,
    write: Callable[[Tiny, torch.optim.Optimizer], None],
    detector: str,
    order: str,
) -> None:
    base = view_of(model)
    config = SyncConfig(bucket=address, base_model="tiny", detector=detector)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        train(model, optimizer)
        engine.publish(1).result()
        for action in order.split("-"):
            train(model, optimizer) if action == "step" else write(model, optimizer)
        published = engine.publish(2).result()
        assert (published.version, published.encoding) == (2, "fast")
        assert bool(published.rewritten) == (detector == "sliced")
        assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))
        train(model, optimizer)
        assert engine.publish(3).result().rewritten == ()
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_only_the_written_tensor_is_published_whole_and_named(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="tiny")) as engine:
        past_torch(model, optimizer)
        train(model, optimizer)
        published = engine.publish(1).result()
    assert published.rewritten == ("layers.1.weight",)
    assert 36 < published.changed < published.total
    (warning,) = [record.message for record in caplog.records if "written outside" in record.message]
    assert "layers.1.weight" in warning


def test_a_tensor_that_is_written_again_is_compared_with_a_copy(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    """So that versions can be undone again, and cost O(changes)."""
    base, rewritten = view_of(model), []
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="tiny")) as engine:
        for step in range(5):
            train(model, optimizer)
            past_torch(model, optimizer)
            rewritten.append(engine.publish(step).result().rewritten)
            assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))
    assert rewritten == [("layers.1.weight",)] * 2 + [()] * 3


def test_an_optimizer_that_is_made_again_is_followed(model: Tiny, address: str, tmp_path: Path) -> None:
    base = view_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="tiny")) as engine:
        for step in range(6):
            if step == 2:
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
            train(model, optimizer)
            engine.publish(step).result()
            assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))
        assert engine.publish(6).result().changed == 0


@pytest.mark.parametrize("write", WRITES)
def test_an_anchor_after_a_write_outside_of_steps_holds_it(
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    address: str,
    tmp_path: Path,
    write: Callable[[Tiny, torch.optim.Optimizer], None],
) -> None:
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine:
        train(model, optimizer)
        engine.publish(1).result()
        write(model, optimizer)
        assert engine.anchor().version == 2
        assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_a_failed_publish_of_new_values_is_repeated(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = FaultyBucket(LocalBucket(address, create=True))
    monkeypatch.setattr(engine_module, "open_bucket", lambda *_, **__: faulty)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine:
        for when in ("before", "after", "before"):
            past_torch(model, optimizer)
            faulty.fail("commit", 1, when=when)
            with pytest.raises(BucketUnavailable):
                engine.publish(1).result()
            train(model, optimizer)
            engine.publish(2).result()
            assert same_bits(follow(address, tmp_path).tensors, view_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("detector", ["sliced", "snapshot"])
def test_versions_replay_while_another_thread_writes(
    dtype: torch.dtype, detector: str, address: str, tmp_path: Path
) -> None:
    """A version published meanwhile holds some values of each element; the last one holds the model's."""
    model = Tiny(dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter))

    base, thread = view_of(model), threading.Thread(target=write)
    config = SyncConfig(bucket=address, base_model="tiny", detector=detector)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        thread.start()
        try:
            for step in range(30):
                engine.publish(step).result()
        finally:
            ended.set()
            thread.join()
        engine.publish(30).result()
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


@pytest.mark.parametrize("detector", ["sliced", "snapshot"])
def test_a_buffer_that_is_replaced_at_each_step_costs_its_changes(
    detector: str, model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    model.register_buffer("average", torch.zeros(64))
    base, encodings = view_of(model), []
    config = SyncConfig(bucket=address, base_model="tiny", detector=detector)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for step in range(4):
            train(model, optimizer)
            model.average = model.average + torch.nn.functional.one_hot(torch.tensor(step), 64)
            published = engine.publish(step).result()
            encodings.append((str(published.encoding), published.rewritten))
            assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))
    assert encodings == [("fast", ())] * 4


@pytest.mark.parametrize("detector", ["sliced", "snapshot"])
def test_a_cast_in_mid_run_costs_what_it_changes(
    detector: str, model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    base = view_of(model)
    config = SyncConfig(bucket=address, base_model="tiny", detector=detector)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        train(model, optimizer)
        engine.publish(1).result()
        model.bfloat16()
        assert engine.publish(2).result().changed == 0, "the served bits are the same"
        model.half()
        assert engine.publish(3).result().encoding in ("fast", None)
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_a_damaged_copy_is_healed(model: Tiny, address: str, tmp_path: Path) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        engine._publisher.detector.tensors()["scale"].fill_(3)
        published = engine.publish(1).result()
        assert published.rewritten == ("scale",)
        assert engine.publish(2).result().changed == 0
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_no_anchor_of_a_damaged_copy_is_uploaded(model: Tiny, address: str, tmp_path: Path) -> None:
    """Damaged after the last detection, as anchors take long to write. The next publish heals it."""
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, base_model="tiny")) as engine:
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        engine.publish(1).result()
        engine._publisher.detector.tensors()["scale"].fill_(3)
        with pytest.raises(ChainError, match=r"the copy of version 1 .* in memory was written to.*publish again"):
            engine._publisher.anchors.commit(engine.ranks)
        assert engine.publish(2).result().rewritten == ("scale",)
        assert engine.anchor().version == 2
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


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
        patch.setattr(recorder_module, "PendingChanges", interrupt)
        with pytest.raises(KeyboardInterrupt):
            detector.detect()
    assert detector.detect().changed == 0


def test_a_view_that_cannot_be_restored_is_refused(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    detector = sliced(model, optimizer)
    past_torch(model, optimizer)
    with pytest.raises(ChainError, match=r"layers\.1\.weight was written outside"):
        detector.tensors()
    assert detector.detect().start == detector.digest
