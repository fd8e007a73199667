"""Sliced steps of torch's fused Adam and AdamW, on tensors of all sizes, dtypes and layouts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hubsync.format.digest import digest_view
from hubsync.kernels.bits import bits_of
from hubsync.publish.detect.recorder import HostRecorder
from hubsync.publish.detect.sliced import Sliced
from hubsync.publish.view.live import table_of

Live = dict[str, torch.nn.Parameter]


def weights() -> Live:
    """Sizes around those of vectors and blocks: torch rounds the elements that do not fill a vector otherwise."""
    torch.manual_seed(0)
    sizes = [1, 15, 16, 17, 4096, 4096 + 33, 140_003]
    return {f"w{size}": torch.nn.Parameter(torch.randn(size) * 0.02) for size in sizes}


def mixed() -> Live:
    live = weights()
    live["w140003"] = torch.nn.Parameter(torch.randn(200, 300).t())
    live["bfloat16"] = torch.nn.Parameter(torch.randn(5000).bfloat16())
    live["float64"] = torch.nn.Parameter(torch.randn(5000).double())
    return live


def with_gradients(live: Live, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in live.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def detector_of(live: Live, optimizer: torch.optim.Optimizer) -> Sliced:
    tensors: dict[str, torch.Tensor] = dict(live)
    table = table_of(tensors, torch.bfloat16)
    return Sliced(tensors, table, optimizer, HostRecorder(table, bucket=5000))


def bfloat16_of(live: Live) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().to(torch.bfloat16, copy=True).contiguous() for name, parameter in live.items()}


def require_exact(detector: Sliced, before: dict[str, torch.Tensor], live: Live) -> None:
    detected = detector.detect()
    for index, spec in enumerate(detector.table):
        old, new = bits_of(before[spec.name]), bits_of(bfloat16_of(live)[spec.name])
        expected = np.flatnonzero(old != new)
        change = detected.changes.get(index)
        assert np.array_equal(change.indices if change else [], expected)
        if change:
            assert np.array_equal(change.old, old[expected])
            assert np.array_equal(change.new, new[expected])
    assert detected.start == digest_view(detector.table, before)
    detector.advance(detected)


def trained(live: Live, make: Callable[[Live], torch.optim.Optimizer], hooked: bool) -> list[Any]:
    """Train with a decaying rate, a missing gradient and a resume. Returns the weights and states as bits."""
    optimizer = make(live)
    detector = detector_of(live, optimizer) if hooked else None
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(5):
        with_gradients(live, step)
        if step == 2:
            live["w4096"].grad = None
        before = bfloat16_of(live)
        optimizer.step()
        if not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
            scheduler.step()
        if detector is not None:
            require_exact(detector, before, live)
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tensors = [*live.values(), *(p.grad for p in live.values() if p.grad is not None)]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for value in tensors + states]


def large_and_small(live: Live) -> torch.optim.Optimizer:
    large = [p for p in live.values() if p.numel() > 4096]
    small = [p for p in live.values() if p.numel() <= 4096]
    groups = [{"params": large, "weight_decay": 0.1}, {"params": small, "lr": 1e-4, "betas": (0.8, 0.95)}]
    return torch.optim.AdamW(groups, lr=1e-3, fused=True)


FUSED: dict[str, Callable[[Live], torch.optim.Optimizer]] = {
    "adamw": lambda live: torch.optim.AdamW(live.values(), lr=1e-5, fused=True),
    "adamw, fast": lambda live: torch.optim.AdamW(live.values(), lr=0.3, betas=(0.6, 0.0), eps=1e-3, fused=True),
    "adamw without decay": lambda live: torch.optim.AdamW(live.values(), lr=1e-3, weight_decay=0, fused=True),
    "adam": lambda live: torch.optim.Adam(live.values(), lr=1e-3, fused=True),
    "adam with decay": lambda live: torch.optim.Adam(live.values(), lr=1e-3, weight_decay=0.1, fused=True),
    "two groups": large_and_small,
    "amsgrad": lambda live: torch.optim.AdamW(live.values(), lr=1e-3, amsgrad=True, fused=True),
    "maximize": lambda live: torch.optim.AdamW(live.values(), lr=1e-3, maximize=True, fused=True),
    "little memory": lambda live: torch.optim.AdamW(live.values(), lr=1e-3, betas=(0.3, 0.9), fused=True),
    "rate as a tensor": lambda live: torch.optim.AdamW(live.values(), lr=torch.tensor(1e-3), fused=True),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_in_slices_are_bit_identical_and_all_changes_are_found(
    name: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    assert trained(weights(), FUSED[name], hooked=True) == trained(weights(), FUSED[name], hooked=False)


def test_fused_steps_of_mixed_dtypes_and_layouts_are_bit_identical() -> None:
    make = FUSED["adamw, fast"]
    assert trained(mixed(), make, hooked=True) == trained(mixed(), make, hooked=False)


@pytest.mark.parametrize("at", [0, 5000, 140_002])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_a_weight_that_becomes_nan_and_a_number_again_is_detected(at: int, value: float) -> None:
    live = weights()
    optimizer = torch.optim.AdamW(live.values(), lr=1e-3, fused=True)
    detector, weight = detector_of(live, optimizer), live["w140003"]
    for step in range(4):
        with_gradients(live, step)
        assert weight.grad is not None
        if step == 1:
            weight.grad[at] = value
        before = bfloat16_of(live)
        optimizer.step()
        require_exact(detector, before, live)
    assert weight[at].isnan()
    with torch.no_grad():
        optimizer.state[weight]["exp_avg"][at] = optimizer.state[weight]["exp_avg_sq"][at] = weight[at] = 0
    detector.advance(detector.detect())  # a restart, because the weight was written to
    before = bfloat16_of(live)
    with_gradients(live, 5)
    optimizer.step()
    require_exact(detector, before, live)


def test_changes_of_a_compiled_step_are_found() -> None:
    live = weights()
    optimizer = torch.optim.AdamW(live.values(), lr=1e-3, fused=True)
    detector = detector_of(live, optimizer)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(3):
        with_gradients(live, step)
        before = bfloat16_of(live)
        compiled()
        require_exact(detector, before, live)


def test_a_copy_of_the_optimizer_steps_its_own_weights_alone() -> None:
    live = weights()
    optimizer = torch.optim.AdamW(live.values(), lr=1e-3, fused=True)
    detector = detector_of(live, optimizer)
    with_gradients(live, 0)
    optimizer.step()
    other, others = copy.deepcopy((optimizer, live))
    for parameter, original in zip(others.values(), live.values(), strict=True):
        parameter.grad = copy.deepcopy(original.grad)
    before = bfloat16_of(live)
    detector.advance(detector.detect())
    other.step()
    require_exact(detector, before, live)
    optimizer.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(live.values(), others.values(), strict=True))
