"""Steps on a GPU: listed on the device, exactly, and without an effect on training.

On a GPU if there is one, else in Triton's interpreter, where tensors in main memory count as tensors on a GPU. The
interpreter does not give torch's bits for fused updates, so there they are not fused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hubsync.errors import ConfigError
from hubsync.format.digest import digest_view
from hubsync.kernels.bits import bits_of
from hubsync.publish.config import SyncConfig
from hubsync.publish.detect.changes import Detected
from hubsync.publish.detect.choose import choose_detector
from hubsync.publish.detect.sliced import Sliced
from hubsync.publish.view.live import published_tensors, table_of
from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device
from tests.support.tiny import View

test_in_tritons_interpreter = in_the_interpreter(__file__)
pytestmark = on_device

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw fused amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True, amsgrad=True, maximize=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Net(torch.nn.Module):
    """Parameters of several shapes, one without a gradient, one frozen, a buffer."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(40, 130)
        self.second = torch.nn.Linear(130, 7)
        self.unused = torch.nn.Parameter(torch.randn(90) * 0.02)
        self.frozen = torch.nn.Parameter(torch.randn(50) * 0.02, requires_grad=False)
        self.register_buffer("scale", torch.randn(12))
        self.to(DEVICE, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) + self.frozen.sum()


def train(model: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 40, generator=generator).to(DEVICE, model.frozen.dtype)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.fixture(autouse=True)
def _tensors_count_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from hubsync import kernels
    from hubsync.kernels.gpu import numbering
    from hubsync.publish.detect import device_live, device_recorder

    monkeypatch.setattr(numbering, "TILE", 256)
    monkeypatch.setattr(device_recorder, "_LEAST", 2048)
    if INTERPRETED:
        monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(device_live, "_INTERPRETED", True)


def optimized(model: Net, make: Make) -> torch.optim.Optimizer:
    return make([parameter for parameter in model.parameters() if parameter.requires_grad])


def watched(model: Net, optimizer: torch.optim.Optimizer) -> Sliced:
    from hubsync.publish.detect.device_recorder import DeviceRecorder

    tensors = published_tensors(model)
    config = SyncConfig(bucket="local:unused", detector="sliced")
    detector = choose_detector(tensors, table_of(tensors, torch.bfloat16), optimizer, config)
    assert isinstance(detector, Sliced)
    recorder = detector._recorder
    assert isinstance(recorder, DeviceRecorder)
    recorder._fuses = not INTERPRETED
    return detector


def view_of(model: Net) -> View:
    return {name: t.detach().to("cpu", torch.bfloat16, copy=True) for name, t in published_tensors(model).items()}


def expect(detected: Detected, detector: Sliced, before: View, model: Net) -> None:
    """What was detected is what changed, by comparison."""
    now = view_of(model)
    for index, spec in enumerate(detector.table):
        old, new = bits_of(before[spec.name]), bits_of(now[spec.name])
        at = np.flatnonzero(old != new)
        delta = detected.patch.get(index)
        assert np.array_equal(getattr(delta, "indices", []), at), spec.name
    assert detected.start == digest_view(detector.table, before)
    assert detected.digest == digest_view(detector.table, now)
    assert not detected.values


@DTYPES
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_bit_identical_and_changes_are_exact(name: str, dtype: torch.dtype) -> None:
    model = Net(dtype)
    plain = copy.deepcopy(model)
    optimizer, other = optimized(model, OPTIMIZERS[name]), optimized(plain, OPTIMIZERS[name])
    detector, before = watched(model, optimizer), view_of(model)
    for step in range(3):
        train(model, optimizer, step)
        train(plain, other, step)
        if step == 1:
            continue  # two steps in one publish
        detected = detector.detect()
        assert detected.on_device is not None
        assert detected.changed > 0
        expect(detected, detector, before, model)
        detector.advance(detected)
        before = view_of(model)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True) if torch.is_tensor(a))


def test_changes_that_did_not_become_durable_are_found_again() -> None:
    model = Net(torch.float32)
    optimizer = optimized(model, OPTIMIZERS["adamw fused"])
    detector, before = watched(model, optimizer), view_of(model)
    for step in range(3):
        train(model, optimizer, step)
        expect(detector.detect(), detector, before, model)  # never advanced


@pytest.mark.parametrize("updates", [True, False], ids=["in the update", "before the update"])
def test_a_step_that_fails_in_its_second_part_loses_nothing(updates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(torch.float32)
    optimizer = optimized(model, OPTIMIZERS["adamw fused"])
    detector, before = watched(model, optimizer), view_of(model)
    recorder: Any = detector._recorder
    recorder._fuses = False
    update_by_buckets, calls = recorder._update_by_buckets, []

    def fails(operator: Callable[..., None], lists: Any, options: Any) -> None:
        def once(*args: Any, **kwargs: Any) -> None:
            calls.append(1)
            if len(calls) < 2 or updates:
                operator(*args, **kwargs)
            if len(calls) == 2:
                raise RuntimeError("no")

        update_by_buckets(once, lists, options)

    with monkeypatch.context() as patched:
        patched.setattr(recorder, "_update_by_buckets", fails)
        with pytest.raises(RuntimeError, match="no"):
            train(model, optimizer, 0)
    detected = detector.detect()
    assert detected.changed > 0
    expect(detected, detector, before, model)
    train(model, optimizer, 1)
    expect(detector.detect(), detector, before, model)


def test_what_torch_refuses_is_refused_before_anything_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that refuses as torch's operator does on a GPU; the one for CPUs takes anything."""
    model = Net(torch.float32)
    optimizer = optimized(model, OPTIMIZERS["adamw fused"])
    detector = watched(model, optimizer)
    train(model, optimizer, 0)
    detector.advance(detector.detect())
    recorder: Any = detector._recorder
    update_by_buckets = recorder._update_by_buckets

    def refuses(operator: Callable[..., None], lists: Any, options: Any) -> None:
        def strict(*lists: Any, **options: Any) -> None:
            if any(moment.shape != p.shape for p, moment in zip(lists[0], lists[2], strict=True)):
                raise RuntimeError("no")
            operator(*lists, **options)

        update_by_buckets(strict, lists, options)

    monkeypatch.setattr(recorder, "_update_by_buckets", refuses)
    optimizer.state[model.second.weight]["exp_avg"] = torch.zeros(model.second.weight.numel(), device=DEVICE)
    before = view_of(model)
    with pytest.raises(RuntimeError, match="no"):
        train(model, optimizer, 1)
    assert all(torch.equal(now, before[name]) for name, now in view_of(model).items())
    assert detector.detect().is_empty


def test_changes_survive_a_publish_that_fails_after_they_were_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(torch.float32)
    optimizer = optimized(model, OPTIMIZERS["adamw fused"])
    detector, before = watched(model, optimizer), view_of(model)
    recorder: Any = detector._recorder

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    for step in range(3):
        train(model, optimizer, step)
        with monkeypatch.context() as patched:
            patched.setattr(recorder._live.digests, "changes", no_memory)
            with pytest.raises(torch.OutOfMemoryError):
                detector.detect()
        if step == 1:
            expect(detector.detect(), detector, before, model)  # never advanced: inserted again
    expect(detector.detect(), detector, before, model)


def test_the_last_view_is_restored() -> None:
    model = Net(torch.float32)
    optimizer = optimized(model, OPTIMIZERS["adamw fused"])
    detector, before = watched(model, optimizer), view_of(model)
    train(model, optimizer, 0)
    detected = detector.detect()
    train(model, optimizer, 1)
    for view in (before, None):
        if view is None:
            detector.advance(detected)
            break
        restored = detector.tensors()
        assert all(torch.equal(restored[name].cpu(), view[name]) for name in view)


def test_a_step_without_changes_is_empty() -> None:
    model = Net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    detector = watched(model, optimizer)
    train(model, optimizer, 0)
    assert detector.detect().is_empty


@pytest.mark.parametrize("way", ["data", "replaced", "moved", "cast", "made anew"])
def test_writes_outside_of_steps_are_published_as_new_values(way: str) -> None:
    model = Net(torch.float32)
    optimizer = optimized(model, OPTIMIZERS["adamw fused"])
    detector = watched(model, optimizer)
    train(model, optimizer, 0)
    detector.advance(detector.detect())
    name = "first.weight"
    if way == "data":
        model.first.weight.data.mul_(1.5)
    elif way == "replaced":
        model.first.weight.data = model.first.weight.data * 1.5
    elif way == "moved":
        model.first.weight.data = (model.first.weight.data * 1.5).cpu()
    elif way == "cast":
        model.first.weight.data = (model.first.weight.data * 1.5).bfloat16()
    else:
        model.first.weight = torch.nn.Parameter(model.first.weight.data * 1.5)
        detector.follow(published_tensors(model))
    detected = detector.detect()
    assert [detector.table[index].name for index in detected.values] == [name]
    assert detected.digest == digest_view(detector.table, view_of(model))
    detector.advance(detected)
    if way in ("moved", "cast"):
        model.first.weight.data = model.first.weight.data.to(DEVICE, torch.float32)
    train(model, optimizer, 1)
    assert detector.detect().digest == digest_view(detector.table, view_of(model))


def test_after_the_second_time_a_copy_is_kept() -> None:
    model = Net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)  # most elements are not in the list
    detector = watched(model, optimizer)
    for step in range(3):
        train(model, optimizer, step)
        model.first.weight.data.mul_(1.25)
        detected = detector.detect()
        assert bool(detected.values) == (step < 2)
        assert detected.digest == digest_view(detector.table, view_of(model))
        detector.advance(detected)


def test_a_step_that_is_skipped_for_infinite_gradients_changes_nothing() -> None:
    model = Net(torch.float32)
    optimizer = optimized(model, OPTIMIZERS["adamw fused"])
    detector = watched(model, optimizer)
    train(model, optimizer, 0)
    detector.advance(detector.detect())
    optimizer.grad_scale = torch.ones((), device=DEVICE)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.ones((), device=DEVICE)  # type: ignore[attr-defined]
    train(model, optimizer, 1)
    assert detector.detect().is_empty


def publish(detector: Sliced, model: Net) -> Detected:
    """As the publisher does it."""
    detector.begin()
    detector.follow(published_tensors(model))
    detected = detector.detect()
    assert detected.digest == digest_view(detector.table, view_of(model))
    detector.advance(detected)
    return detected


def test_a_cast_copy_in_the_memory_of_the_tensor_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator gives new copies the memory of what was just freed: here, of the parameter that was replaced."""
    model = Net(torch.float32)
    detector = watched(model, optimized(model, OPTIMIZERS["adamw fused"]))
    before, convert = model.frozen.data, torch.Tensor.to
    model.frozen = torch.nn.Parameter((before * 1.5).bfloat16(), requires_grad=False)

    def to_that_memory(tensor: torch.Tensor, *args: object) -> torch.Tensor:
        is_copied = tensor.numel() == before.numel() and torch.float32 in args
        return before.copy_(tensor) if is_copied else convert(tensor, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to_that_memory)
        detector.begin()
        detector.follow(published_tensors(model))
        detected = detector.detect()
    assert detected.digest == digest_view(detector.table, view_of(model))
    assert [detector.table[index].name for index in detected.values] == ["frozen"]


def test_nothing_is_read_behind_the_end_of_a_tensor_that_was_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    from hubsync.kernels.gpu.digest import Digests

    model = Net(torch.float32)
    detector = watched(model, optimized(model, OPTIMIZERS["adamw fused"]))
    model.first.weight.data = model.first.weight.data[:3].clone()
    monkeypatch.setattr(Digests, "live", lambda digests: pytest.fail("read"))
    detector.begin()
    with pytest.raises(ConfigError, match="now has shape"):
        detector.follow(published_tensors(model))


def test_an_interrupt_while_addresses_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(torch.float32)
    detector = watched(model, optimized(model, OPTIMIZERS["adamw fused"]))
    publish(detector, model)
    own = model.first.weight.data
    model.first.weight.data = elsewhere = own.clone()
    copy_to = torch.Tensor.copy_

    def interrupted(*args: object, **options: object) -> None:
        copy_to(*args, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            detector.begin()
    model.first.weight.data = own.mul_(1.5)
    assert publish(detector, model).values
    assert not torch.equal(own, elsewhere)


def test_a_larger_parameter_at_the_address_of_one_that_is_followed() -> None:
    model = Net(torch.float32)
    plain = copy.deepcopy(model)
    optimizer, other = optimized(model, OPTIMIZERS["adamw fused"]), optimized(plain, OPTIMIZERS["adamw fused"])
    detector, trained = watched(model, optimizer), []
    for one, steps in ((model, optimizer), (plain, other)):
        weight = one.first.weight
        flat = torch.nn.Parameter(torch.cat([weight.data.view(-1), torch.ones(3000, device=DEVICE)]))
        weight.data = flat.data[: weight.numel()].view_as(weight)
        steps.zero_grad()
        steps.add_param_group({"params": [flat], "fused": True})
        flat.grad = torch.linspace(-1, 1, flat.numel(), device=DEVICE)
        steps.step()
        trained.append(flat)
    assert torch.equal(*trained)
    assert publish(detector, model).values


def test_two_parameters_that_were_given_the_same_memory() -> None:
    model = Net(torch.float32)
    model.twin = torch.nn.Parameter(torch.zeros(130, 40, device=DEVICE))
    optimizer = optimized(model, OPTIMIZERS["adamw fused"])
    detector = watched(model, optimizer)
    model.twin.data = model.first.weight.data
    train(model, optimizer, 0)
    names = {detector.table[index].name for index in publish(detector, model).values}
    assert names == {"first.weight", "twin"}  # each has its own update: neither is listed as the other
