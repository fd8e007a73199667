"""Fused Adam and AdamW, updated and compared in one pass: torch's bits, and exactly the changes there are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync.format.digest import digest_view
from hubsync.kernels import adamw
from hubsync.kernels.adamw import LANES, Room, Scalars
from hubsync.kernels.bits import bits_of
from hubsync.publish.detect import fused
from hubsync.publish.detect.sliced import Sliced
from hubsync.publish.view.live import table_of

SIZES = [1, LANES - 1, LANES, LANES + 1, 4096, 4096 + 33, 140_003]
Live = dict[str, torch.nn.Parameter]

pytestmark = pytest.mark.skipif(
    not adamw.is_torchs(torch._fused_adamw_), reason="torch rounds otherwise on this processor: the kernel is not used"
)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest, set_threads: Callable[[int], None]) -> int:
    set_threads(request.param)
    return request.param


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the stretches that the kernel has updated."""
    stretches: list[int] = []
    real = adamw.step

    def step(*args: Any) -> adamw.Found:
        stretches.append(args[6] - args[5])
        return real(*args)

    monkeypatch.setattr(adamw, "step", step)
    return stretches


def weights() -> Live:
    torch.manual_seed(0)
    return {f"w{size}": torch.nn.Parameter(torch.randn(size) * 0.02) for size in SIZES}


def with_gradients(live: Live, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in live.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def detector_of(live: Live, optimizer: torch.optim.Optimizer) -> Sliced:
    tensors: dict[str, torch.Tensor] = dict(live)
    return Sliced(tensors, table_of(tensors, torch.bfloat16), optimizer)


def view_of(live: Live) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().to(torch.bfloat16, copy=True).contiguous() for name, parameter in live.items()}


def bits(nest: Any) -> Any:
    """A nest of containers with the bytes of its tensors."""
    if isinstance(nest, torch.Tensor):
        return nest.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(nest, dict):
        return {key: bits(value) for key, value in nest.items()}
    return [bits(value) for value in nest] if isinstance(nest, list | tuple) else nest


def require_exact(detector: Sliced, before: dict[str, torch.Tensor], live: Live) -> None:
    detected = detector.detect()
    for index, spec in enumerate(detector.table):
        old, new = bits_of(before[spec.name]), bits_of(view_of(live)[spec.name])
        expected = np.flatnonzero(old != new)
        change = detected.changes.get(index)
        assert np.array_equal(change.indices if change else [], expected)
        if change:
            assert np.array_equal(change.old, old[expected])
            assert np.array_equal(change.new, new[expected])
    assert detected.before == digest_view(detector.table, before)
    detector.advance(detected)


def trained(live: Live, make: Callable[[Live], torch.optim.Optimizer], hooked: bool) -> Any:
    """Some steps, with a decaying rate, a missing gradient and a resume; all that they leave. Looks for changes."""
    optimizer = make(live)
    detector = detector_of(live, optimizer) if hooked else None
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(5):
        with_gradients(live, step)
        if step == 2:
            live["w4096"].grad = None
        before = view_of(live)
        optimizer.step()
        if not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
            scheduler.step()
        if detector is not None:
            require_exact(detector, before, live)
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return bits([list(live.values()), [p.grad for p in live.values()], optimizer.state_dict()["state"]])


def two_groups(live: Live) -> torch.optim.Optimizer:
    large = [p for p in live.values() if p.numel() > 4096]
    small = [p for p in live.values() if p.numel() <= 4096]
    groups = [{"params": large, "weight_decay": 0.1}, {"params": small, "lr": 1e-4, "betas": (0.8, 0.95)}]
    return torch.optim.AdamW(groups, lr=1e-3, fused=True)


ONE_PASS: dict[str, Callable[[Live], torch.optim.Optimizer]] = {
    "adamw": lambda live: torch.optim.AdamW(live.values(), lr=1e-5, fused=True),
    "adamw, fast": lambda live: torch.optim.AdamW(live.values(), lr=0.3, betas=(0.6, 0.0), eps=1e-3, fused=True),
    "adamw without decay": lambda live: torch.optim.AdamW(live.values(), lr=1e-3, weight_decay=0, fused=True),
    "adam": lambda live: torch.optim.Adam(live.values(), lr=1e-3, fused=True),
    "two groups": two_groups,
}

OTHERWISE: dict[str, Callable[[Live], torch.optim.Optimizer]] = {
    "adam with decay": lambda live: torch.optim.Adam(live.values(), lr=1e-3, weight_decay=0.1, fused=True),
    "amsgrad": lambda live: torch.optim.AdamW(live.values(), lr=1e-3, amsgrad=True, fused=True),
    "maximize": lambda live: torch.optim.AdamW(live.values(), lr=1e-3, maximize=True, fused=True),
    "little memory": lambda live: torch.optim.AdamW(live.values(), lr=1e-3, betas=(0.3, 0.9), fused=True),
    "rate as a tensor": lambda live: torch.optim.AdamW(live.values(), lr=torch.tensor(1e-3), fused=True),
}


# --- training is what it was, and no change is missed or made up ------------------------------------


@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_gives_torchs_bits_and_all_changes(name: str, threads: int, taken: list[int]) -> None:
    assert trained(weights(), ONE_PASS[name], hooked=True) == trained(weights(), ONE_PASS[name], hooked=False)
    assert max(taken) * threads >= 140_000, "the kernel did it, each thread its part"


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_the_kernel_does_not_know_is_done_by_the_operator(name: str, threads: int, taken: list[int]) -> None:
    assert trained(weights(), OTHERWISE[name], hooked=True) == trained(weights(), OTHERWISE[name], hooked=False)
    assert not taken


def test_tensors_of_other_kinds_are_updated_by_the_operator(taken: list[int]) -> None:
    def mixed() -> Live:
        live = weights()
        live["w140003"] = torch.nn.Parameter(torch.randn(200, 300).t())
        live["bfloat16"] = torch.nn.Parameter(torch.randn(5000).bfloat16())
        live["float64"] = torch.nn.Parameter(torch.randn(5000).double())
        return live

    make = ONE_PASS["adamw, fast"]
    assert trained(mixed(), make, hooked=True) == trained(mixed(), make, hooked=False)
    assert max(taken) < 5000


def test_where_the_kernel_is_not_torchs_it_is_not_used(monkeypatch: pytest.MonkeyPatch, taken: list[int]) -> None:
    monkeypatch.setattr(adamw, "is_torchs", lambda _: False)
    make = ONE_PASS["adamw"]
    assert trained(weights(), make, hooked=True) == trained(weights(), make, hooked=False)
    assert not taken


def test_threads_that_flush_denormals_each_for_itself_are_left_to_torch(threads: int, taken: list[int]) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("not on this processor")
    try:
        make = ONE_PASS["adamw"]
        assert trained(weights(), make, hooked=True) == trained(weights(), make, hooked=False)
    finally:
        torch.set_flush_denormal(False)
    assert bool(taken) == (threads == 1)


@pytest.mark.parametrize("at", [0, 5000, 140_002])
@pytest.mark.parametrize("what", [float("nan"), -float("nan"), float("inf")])
def test_a_weight_that_becomes_or_stops_being_a_number_is_cast_by_torch(at: int, what: float, threads: int) -> None:
    live = weights()
    optimizer = torch.optim.AdamW(live.values(), lr=1e-3, fused=True)
    detector, weight = detector_of(live, optimizer), live["w140003"]
    for step in range(4):
        with_gradients(live, step)
        assert weight.grad is not None
        if step == 1:
            weight.grad[at] = what
        before = view_of(live)
        optimizer.step()
        require_exact(detector, before, live)
    assert weight[at].isnan()
    with torch.no_grad():
        optimizer.state[weight]["exp_avg"][at] = optimizer.state[weight]["exp_avg_sq"][at] = weight[at] = 0
    detector.advance(detector.detect())  # a new start: it was written to
    before = view_of(live)
    with_gradients(live, 5)
    optimizer.step()
    require_exact(detector, before, live)


# --- what may go wrong ------------------------------------------------------------------------------


def test_an_interrupted_step_is_followed_by_a_new_start(monkeypatch: pytest.MonkeyPatch) -> None:
    live = weights()
    optimizer = torch.optim.AdamW(live.values(), lr=1e-3, fused=True)
    detector = detector_of(live, optimizer)
    detector.detect()
    real, calls = adamw.step, []

    def interrupted(*args: Any) -> adamw.Found:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with_gradients(live, 0)
    with monkeypatch.context() as patch:
        patch.setattr(adamw, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()
    detected = detector.detect()
    assert not detected.changes
    assert detected.before == digest_view(detector.table, view_of(live))
    before = view_of(live)
    optimizer.step()
    require_exact(detector, before, live)


def test_an_update_that_no_known_operator_does_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    live = weights()
    optimizer = torch.optim.AdamW(live.values(), lr=1e-3, fused=True)
    detector = detector_of(live, optimizer)
    detector.detect()
    monkeypatch.setattr(fused, "_OPERATORS", ())  # as in a torch that calls another one
    with_gradients(live, 0)
    optimizer.step()
    assert detector.detect().before == digest_view(detector.table, view_of(live))


def test_a_compiled_step_is_seen() -> None:
    live = weights()
    optimizer = torch.optim.AdamW(live.values(), lr=1e-3, fused=True)
    detector = detector_of(live, optimizer)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(3):
        with_gradients(live, step)
        before = view_of(live)
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
    before = view_of(live)
    detector.advance(detector.detect())
    other.step()
    require_exact(detector, before, live)
    optimizer.step()
    assert bits(list(live.values())) == bits(list(others.values()))


# --- the kernel -------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 1.0, -3.4e38, math.inf, -math.inf, math.nan]
FLOATS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))


@given(
    st.lists(st.tuples(FLOATS, FLOATS, FLOATS, FLOATS), min_size=1, max_size=LANES),
    st.integers(1, 10**6),
    st.sampled_from([1e-7, 1e-3, 0.5]),
    st.sampled_from([0.0, 1e-2]),
)
@settings(max_examples=60)
def test_any_numbers_become_what_they_become_in_torch(
    numbers: list[tuple[float, float, float, float]], step: int, lr: float, weight_decay: float
) -> None:
    columns = np.resize(np.array(numbers, np.float32), (LANES, 4)).T
    param, grad, mean, square = (np.ascontiguousarray(column) for column in columns)
    theirs = [torch.from_numpy(array.copy()) for array in (param, grad, mean, square)]
    options = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "weight_decay": weight_decay, "eps": 1e-8}
    torch._fused_adamw_(
        *[[tensor] for tensor in theirs], [], [torch.tensor(float(step))], amsgrad=False, maximize=False, **options
    )
    scalars = Scalars.of(float(step), **options)
    assert scalars is not None
    adamw.step(param, grad, mean, square, scalars, 0, LANES, Room())
    for mine, other in zip((param, grad, mean, square), theirs, strict=True):
        nan = np.isnan(mine)
        assert np.array_equal(nan, other.isnan().numpy())
        assert np.array_equal(mine.view(np.uint32)[~nan], bits_of(other)[~nan])


@pytest.mark.parametrize("wrong", ["param", "mean", "square"])
def test_an_operator_that_rounds_otherwise_is_found_out(wrong: str) -> None:
    def operator(*lists: Any, **options: Any) -> None:
        torch._fused_adamw_(*lists, **options)
        tensor = lists[{"param": 0, "mean": 2, "square": 3}[wrong]][0]
        tensor[77] = torch.nextafter(tensor[77], torch.tensor(9.0))

    assert not adamw.is_torchs(operator)


def test_where_everything_changes_everything_is_listed() -> None:
    size = 12 * 4096 + LANES
    param, grad = np.ones(size, np.float32), np.ones(size, np.float32)
    mean, square = np.zeros(size, np.float32), np.zeros(size, np.float32)
    scalars = Scalars.of(1.0, lr=0.5, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8)
    assert scalars is not None
    found = adamw.step(param, grad, mean, square, scalars, LANES, size, Room())
    assert np.array_equal(found.indices, np.arange(LANES, size))
    assert set(found.old.tolist()) == {0x3F80}
    assert set(found.new.tolist()) == {0x3F00}
    assert set(param[:LANES].tolist()) == {1.0}
