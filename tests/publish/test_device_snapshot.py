"""Comparison with a copy on a GPU, in one launch. On a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hubsync.errors import ConfigError
from hubsync.format.digest import Digest, digest_view
from hubsync.kernels.bits import bits_of
from hubsync.publish.config import SyncConfig
from hubsync.publish.detect.changes import Detected
from hubsync.publish.detect.choose import choose_detector
from hubsync.publish.view import division, live
from hubsync.publish.view.boxes import Box
from hubsync.publish.view.division import Replicas
from hubsync.publish.view.live import published_tensors, table_of
from hubsync.publish.view.shards import Shard, held_boxes
from hubsync.publish.view.strided import Place, StridedView
from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device

test_in_tritons_interpreter = in_the_interpreter(__file__)
pytestmark = on_device


@pytest.fixture(autouse=True)
def _tensors_count_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from hubsync import kernels
    from hubsync.kernels.gpu import numbering
    from hubsync.publish.detect import device_live, device_snapshot

    monkeypatch.setattr(numbering, "TILE", 256)
    monkeypatch.setattr(device_snapshot, "_TOGETHER", 1024)
    if INTERPRETED:
        monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(device_live, "_INTERPRETED", True)


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(40, 130)
        self.second = torch.nn.Linear(130, 7)
        self.register_buffer("scale", torch.randn(12))
        self.register_buffer("wide", torch.randn(12).double())
        self.to(DEVICE)
        self.first.to(dtype)

    def move(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.state_dict().values():
            hit = torch.rand(tensor.shape, generator=generator).to(tensor.device) < 0.1
            tensor.mul_(torch.where(hit, 1.25, 1.0).to(tensor.dtype))


def detector_of(model: Net, shards: list[Shard] | None = None):
    from hubsync.publish.detect.device_snapshot import DeviceSnapshot

    tensors = published_tensors(model)
    config = SyncConfig(bucket="local:unused", detector="snapshot")
    detector = choose_detector(tensors, table_of(tensors, torch.bfloat16), None, config, shards=shards)
    assert isinstance(detector, DeviceSnapshot)
    return detector


def view_of(model: Net) -> dict[str, torch.Tensor]:
    return {name: t.detach().to("cpu", torch.bfloat16, copy=True) for name, t in published_tensors(model).items()}


def expect(detected: Detected, table, before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> None:
    for index, spec in enumerate(table):
        at = np.flatnonzero(bits_of(before[spec.name]) != bits_of(now[spec.name]))
        assert np.array_equal(getattr(detected.patch.get(index), "indices", []), at), spec.name
    assert detected.start == digest_view(table, before)
    assert detected.digest == digest_view(table, now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_changes_are_those_of_a_comparison(dtype: torch.dtype) -> None:
    model = Net(dtype)
    detector, before = detector_of(model), view_of(model)
    for seed in range(3):
        model.move(seed)
        if seed == 1:  # this one does not become durable
            assert detector.detect().changed > 0
            continue
        detected, now = detector.detect(), view_of(model)
        expect(detected, detector.table, before, now)
        detector.advance(detected)
        held = detector.tensors()
        assert all(torch.equal(held[name].cpu(), now[name]) for name in now)
        before = now
    assert detector.detect().is_empty


def test_a_damaged_copy_is_published_as_new_values() -> None:
    model = Net()
    detector = detector_of(model)
    model.move(0)
    detector.tensors()["first.weight"].view(-1)[5] += 1
    detected = detector.detect()
    assert [detector.table[index].name for index in detected.values] == ["first.weight"]
    assert detected.digest == digest_view(detector.table, view_of(model))
    detector.advance(detected)
    model.move(1)
    detected = detector.detect()
    assert not detected.values
    assert detected.digest == digest_view(detector.table, view_of(model))


def test_a_rank_finds_the_changes_of_the_elements_that_it_owns() -> None:
    model = Net()
    tensors = published_tensors(model)
    table = table_of(tensors, torch.bfloat16)
    halves = []
    for part in range(2):
        owned = []
        for spec in table:
            half = spec.numel // 2
            owned.append(Shard(spec.shape, (Box.whole(spec.shape),), part * half, spec.numel if part else half))
        halves.append(detector_of(model, owned))
    before = view_of(model)
    model.move(3)
    now = view_of(model)
    first, second = (detector.detect() for detector in halves)
    assert first.digest + second.digest == digest_view(table, now)
    for index, spec in enumerate(table):
        at = np.flatnonzero(bits_of(before[spec.name]) != bits_of(now[spec.name]))
        found = [getattr(half.patch.get(index), "indices", np.zeros(0, np.int64)) for half in (first, second)]
        assert np.array_equal(np.concatenate(found), at)


def test_more_changes_than_there_is_room_for_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from hubsync.kernels.gpu import listing

    monkeypatch.setattr(listing, "_LEAST", 16)
    model = Net()
    detector, before = detector_of(model), view_of(model)
    model.first.weight.data[0, :3] *= 2
    detector.advance(detector.detect())
    before = view_of(model)
    model.first.weight.data *= 2
    detected = detector.detect()
    expect(detected, detector.table, before, view_of(model))
    assert not detected.values


@pytest.mark.parametrize("kind", ["sliced", "snapshot"])
def test_experts_of_another_shape_are_refused_by_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of a parameter keeps its own shape, so that their shapes tell nothing."""
    model = torch.nn.Module()
    model.experts = torch.nn.Parameter(torch.randn(4, 30, 20, device=DEVICE))
    places = {f"{number}.weight": Place((30, 20), (20, 1), 600 * number) for number in range(4)}
    monkeypatch.setattr(live, "_saving_model", lambda model: ("", model))
    monkeypatch.setattr(live, "places_in", lambda *_: {"experts": places})
    view = live.LiveView(model)
    optimizer, config = torch.optim.AdamW([model.experts]), SyncConfig(bucket="local:unused", detector=kind)
    detector = choose_detector(view.tensors(), table_of(view.tensors(), torch.bfloat16), optimizer, config)
    assert detector.holds_old == (kind == "snapshot")
    model.experts.data = model.experts.data.mT.contiguous()
    with pytest.raises(ConfigError, match=r"^experts now has shape \[4, 20, 30\] instead of \[4, 30, 20\]; "):
        detector.follow(view.tensors())
    detector.close()


def test_replicas_are_compared_in_one_launch_with_the_digests_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    experts = torch.nn.Parameter(torch.randn(3, 30, 20, device=DEVICE))
    parts = {
        f"{number}.weight": StridedView("part", experts, Place((30, 20), (20, 1), 600 * number)) for number in (0, 2)
    }
    parts["turned"] = StridedView("turned", experts, Place((20, 30), (1, 20), 600))  # scattered
    tensors = {**published_tensors(model), **parts, "half": torch.randn(70, 3, device=DEVICE).half()}
    table = table_of(tensors, torch.bfloat16, {"half": "F16", "second.bias": "F32"})
    boxes = [held_boxes(name, tensor) for name, tensor in tensors.items()]
    replicas = Replicas(list(tensors), [boxes, boxes], 0)
    alone: list[str] = []
    digest_of_held = division._digest_of_held

    def counted(name: str, *args: Any) -> Digest:
        alone.append(name)
        return digest_of_held(name, *args)

    monkeypatch.setattr(division, "_digest_of_held", counted)
    found = replicas._by_name(tensors, table)
    assert set(alone) == {"second.bias", "wide", "turned"}, "float32 as it is, float64, and scattered elements"
    assert found == {name: digest_of_held(name, tensor, table) for name, tensor in tensors.items()}
    assert replicas.digests(tensors, table) == {(0, 1): sum(found.values(), Digest())}
