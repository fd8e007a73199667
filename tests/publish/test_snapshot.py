"""The snapshot detector finds exactly the bits that changed, and does not affect training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.format.digest import digest_view
from hubsync.publish.detect import changes as changes_module
from hubsync.publish.detect.changes import compare, compare_on_device
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view.live import published_tensors, table_of
from tests.support.tiny import Tiny, same_bits, train, view_of


@given(st.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("device", ["model", "cpu"])
def test_detection_finds_exactly_the_bits_that_changed(device: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 40))
    patterns = st.lists(st.integers(-(2**15), 2**15 - 1), min_size=size, max_size=size)
    live = {"w": torch.tensor(data.draw(patterns), dtype=torch.int16).view(torch.bfloat16)}
    snapshot = Snapshot(live, table_of(live, torch.bfloat16), device)
    for _ in range(3):
        at = data.draw(st.lists(st.integers(0, size - 1), max_size=5)) if size else []
        before = live["w"].view(torch.int16).clone()
        for index in at:
            live["w"].view(torch.int16)[index] = data.draw(st.integers(-(2**15), 2**15 - 1))
        detected = snapshot.detect()
        expected = (before != live["w"].view(torch.int16)).nonzero().view(-1).tolist()
        assert (detected.patch[0].indices.tolist() if detected.changes else []) == expected
        assert detected.digest == digest_view(snapshot.table, live)
        snapshot.advance(detected)
        assert same_bits(snapshot.tensors(), live)
        assert not snapshot.detect().changes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_device_comparison_equals_cpu_comparison(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes_module, "_CHUNK", 64)
    old, new = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    new[::3] = old[::3]
    old[:4] = torch.tensor([0.0, -0.0, float("nan"), float("nan")])  # the last one, unlike -0, does not change
    new[:4] = torch.tensor([-0.0, 0.0, 1.0, float("nan")])
    on_cpu, on_device = compare(old, new), compare_on_device(old, new)
    assert len(on_cpu.indices) > 100
    for field in ("indices", "old", "new"):
        left, right = getattr(on_cpu, field), getattr(on_device, field)
        assert left.dtype == right.dtype
        assert left.tolist() == right.tolist()


def test_detection_does_not_affect_training(model: Tiny, optimizer: torch.optim.Optimizer, address: str) -> None:
    train(model, optimizer)
    parameters = [(p, p.data_ptr(), p._version, p.requires_grad, p.grad) for p in model.parameters()]
    random = torch.get_rng_state()
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine:
        engine.publish(1).result()
    assert torch.equal(random, torch.get_rng_state())
    for parameter, pointer, version, requires_grad, grad in parameters:
        assert (parameter.data_ptr(), parameter._version, parameter.requires_grad) == (pointer, version, requires_grad)
        assert parameter.grad is grad


def test_a_nan_scalar_is_cast_as_torch_casts_it(model: Tiny) -> None:
    with torch.no_grad():
        model.scale.fill_(float("nan"))
    live = published_tensors(model)
    assert same_bits(Snapshot(live, table_of(live, torch.bfloat16)).tensors(), view_of(model))
