"""The sliced detector does not affect training, and finds exactly the changed elements."""

from __future__ import annotations

import copy
import importlib
import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.errors import ConfigError
from hubsync.format.digest import digest_view
from hubsync.kernels.bits import bits_of
from hubsync.publish.detect.changes import Change, compose
from hubsync.publish.detect.choose import choose_detector
from hubsync.publish.detect.recorder import HostRecorder
from hubsync.publish.detect.sliced import Sliced
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.detect.stepping import SlicedSteps, why_not
from hubsync.publish.view.live import published_tensors, table_of
from tests.support.tiny import Tiny, same_bits, sliced, train, view_of

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, maximize=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, fused=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "transformers adafactor": lambda p: _transformers_adafactor(p),
}


EXTRAS: dict[str, Make] = {
    "bitsandbytes adamw": lambda p: _bitsandbytes().AdamW8bit(p, lr=1e-2, min_8bit_size=16),
    "bitsandbytes adamw with some in 32 bits": lambda p: _in_32_bits(p[0], _bitsandbytes().AdamW8bit(p, lr=1e-2)),
    "bitsandbytes lion": lambda p: _bitsandbytes().PagedLion8bit(p, lr=1e-2, min_8bit_size=16),
    "lion": lambda p: importlib.import_module("lion_pytorch").Lion(p, lr=1e-2, weight_decay=0.1),
}


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes").optim


def _in_32_bits(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """As transformers' trainer does for embeddings. bitsandbytes identifies such parameters by position."""
    manager = _bitsandbytes().GlobalOptimManager.get_instance()
    manager.register_parameters([parameter])
    manager.override_config(parameter, "optim_bits", 32)
    optimizer.args.min_8bit_size = 16  # type: ignore[attr-defined]
    return optimizer


def _transformers_adafactor(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    transformers = pytest.importorskip("transformers")
    return transformers.Adafactor(parameters, lr=None, scale_parameter=True, relative_step=True)


def two_groups(model: torch.nn.Module, make: Make) -> torch.optim.Optimizer:
    """An optimizer with weight decay on matrices alone, as trainers make them."""
    optimizer = make(list(model.parameters()))
    (group,) = optimizer.param_groups
    vectors = [parameter for parameter in group["params"] if parameter.ndim < 2]
    group["params"] = [parameter for parameter in group["params"] if parameter.ndim == 2]
    if vectors:
        options = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
        optimizer.add_param_group({**options, "params": vectors, "weight_decay": 0.0})
    return optimizer


def flattened(value: Any) -> list[Any]:
    """A nest of containers as one list, tensors as their bits."""
    if isinstance(value, torch.Tensor):
        return [value.dtype, *value.detach().contiguous().view(-1).view(torch.uint8).tolist()]
    if isinstance(value, dict):
        return [entry for key in value for entry in (key, *flattened(value[key]))]
    if isinstance(value, list | tuple):
        return [entry for item in value for entry in flattened(item)]
    return [value]


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    return flattened([dict(model.named_parameters()), [p.grad for p in model.parameters()], optimizer.state_dict()])


@pytest.fixture
def optimizer(model: Tiny) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


# --- training is not affected ------------------------------------------------------------------------


def run(make: Make, dtype: torch.dtype, hooked: bool) -> list[Any]:
    """Train with a scheduler, clipping, a parameter without gradient, and a resume. Returns the final state."""
    torch.manual_seed(0)
    model = Tiny(dtype=dtype)
    optimizer = two_groups(model, make)
    detector = sliced(model, optimizer) if hooked else None
    has_lr = isinstance(optimizer.param_groups[0]["lr"], float)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) if has_lr else None
    for step in range(5):
        tokens = torch.randint(0, 11, (2, 5))
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if step == 1:
            model.scale.grad = None
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if detector is not None:
        assert detector.detect().changed > 0
        detector.close()
        assert "step" not in vars(optimizer) or scheduler is not None
    return everything(model, optimizer) + flattened(scheduler.state_dict() if scheduler is not None else None)[:3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*OPTIMIZERS, *(pytest.param(name, marks=pytest.mark.extras) for name in EXTRAS)])
def test_training_in_slices_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    make = (OPTIMIZERS | EXTRAS)[name]
    in_slices = run(make, dtype, hooked=True)  # all changes are found, too
    if (name, dtype) != ("sgd fused", torch.bfloat16):  # there torch's own result differs from run to run
        assert in_slices == run(make, dtype, hooked=False)


def momentum_of_a_part(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    parameters[0].grad = None  # in the first step
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, foreach=True)


def sparse_in_a_part(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    assert parameters[0].grad is not None
    parameters[0].grad = parameters[0].grad.to_sparse(1)
    return torch.optim.Adagrad(parameters, lr=1e-2, foreach=True)


@pytest.mark.parametrize("make", [momentum_of_a_part, sparse_in_a_part])
def test_a_group_that_torch_updates_as_one_is_not_sliced(make: Make) -> None:
    """In bfloat16 the difference is visible: `_foreach_mul_` and `mul_` round differently."""

    def trained(hooked: bool) -> list[Any]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(9, 7, dtype=torch.bfloat16)) for _ in range(3)]
        gradients = torch.randn(3, 3, 9, 7, dtype=torch.bfloat16)

        def receive(gradients: torch.Tensor) -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()

        receive(gradients[0])
        optimizer = make(parameters)
        live: dict[str, torch.Tensor] = {f"w{number}": parameter for number, parameter in enumerate(parameters)}
        if hooked:
            table = table_of(live, torch.bfloat16)
            Sliced(live, table, optimizer, HostRecorder(table, bucket=1))
        for later in gradients[1:]:
            optimizer.step()
            receive(later)
        optimizer.step()
        return flattened([live, optimizer.state_dict()["state"]])

    assert trained(hooked=True) == trained(hooked=False)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_skips_and_unscales_as_before(fused: bool) -> None:
    def trained(hooked: bool) -> tuple[list[Any], list[int]]:
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        detector = sliced(model, optimizer) if hooked else None
        scaler, changed = torch.amp.GradScaler("cpu", init_scale=4.0), []
        for step in range(4):
            tokens = torch.randint(0, 11, (2, 5))
            loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            scaler.scale(loss).backward()
            if step == 2:
                model.scale.grad = torch.tensor(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if detector is not None:
                detected = detector.detect()
                changed.append(detected.changed)
                detector.advance(detected)
        return everything(model, optimizer) + flattened(scaler.state_dict()), changed

    after, changed = trained(hooked=True)
    assert after == trained(hooked=False)[0]
    assert [count > 0 for count in changed] == [True, True, False, True]


def test_hooks_and_closures_run_once_per_step(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    sliced(model, optimizer)

    def closure() -> torch.Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = model(torch.arange(5)).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert isinstance(loss, torch.Tensor)
    assert calls == ["before", "closure", "after"]


def test_a_failed_step_leaves_the_optimizer_intact_and_its_changes_detected(model: Tiny) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups, parameters = optimizer.param_groups, optimizer.param_groups[0]["params"]
    detector, before = sliced(model, optimizer), view_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.state[model.layers[1].weight] = {"step": "broken"}
    with pytest.raises(Exception, match=r".*"):
        optimizer.step()
    assert optimizer.param_groups is groups
    assert groups[0]["params"] is parameters
    assert not same_bits(before, view_of(model))
    assert detector.detect().digest == digest_view(detector.table, view_of(model))


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_schedulers_count_sliced_steps_and_close_restores_the_step(
    model: Tiny, optimizer: torch.optim.Optimizer, scheduler_first: bool
) -> None:
    def schedule() -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = schedule() if scheduler_first else None
        before = vars(optimizer).get("step")
        detector = sliced(model, optimizer)
        scheduler = scheduler or schedule()
        train(model, optimizer)
        scheduler.step()
    assert detector.detect().changed
    detector.advance(detector.detect())
    detector.close()
    if scheduler_first:
        assert vars(optimizer)["step"] is before
    train(model, optimizer)
    assert detector.detect().values, "closed: it no longer observes steps"


# --- exactly the changed elements ---------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    view=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    rate=st.sampled_from([1e-5, 1e-3, 0.1, 30.0]),
    steps=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=4),
)
@settings(max_examples=30)
def test_detected_changes_equal_a_dense_comparison(
    seed: int, dtype: torch.dtype, view: torch.dtype, rate: float, steps: list[tuple[int, bool]]
) -> None:
    torch.manual_seed(seed)
    model = Tiny(dtype=dtype)
    model.layers[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5)  # some elements return to old values
    detector, published = sliced(model, optimizer, view), view_of(model, view)
    for number, (trained, fails) in enumerate(steps):
        train(model, optimizer, trained)
        model.get_buffer("bias").add_(number % 2)
        detected = detector.detect()
        for index, spec in enumerate(detector.table):
            old, new = bits_of(published[spec.name]), bits_of(view_of(model, view)[spec.name])
            expected = np.flatnonzero(old != new)
            change = detected.changes.get(index, Change(expected[:0], old[:0], new[:0]))
            assert change.indices.tolist() == expected.tolist()
            assert change.old.tolist() == old[expected].tolist()
            assert change.new.tolist() == new[expected].tolist()
        assert detected.digest == digest_view(detector.table, view_of(model, view))
        if not fails:
            detector.advance(detected)
            published = view_of(model, view)


NOT_NUMBERS = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7F800000, 0x3F800000], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    "values",
    [NOT_NUMBERS, NOT_NUMBERS[0], NOT_NUMBERS[2], NOT_NUMBERS.repeat(9).view(9, 5).t()],
    ids=["flat", "scalar", "negative scalar", "transposed"],
)
def test_nan_and_infinite_weights_are_detected_bit_for_bit(values: torch.Tensor) -> None:
    weight = torch.nn.Parameter(values.clone())
    live = {"weight": weight}
    optimizer = torch.optim.SGD([weight], lr=1.0)
    detector = Sliced(live, table_of(live, torch.bfloat16), optimizer)
    for gradient in (float("nan"), 0.0, 1.0, float("inf")):
        before = weight.detach().bfloat16().contiguous()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        detected = detector.detect()
        found = detected.changes[0].indices.tolist() if detected.changes else []
        assert found == np.flatnonzero(bits_of(before) != bits_of(weight.detach().bfloat16().contiguous())).tolist()
        assert detected.digest == digest_view(detector.table, {"weight": weight.detach().bfloat16().contiguous()})
        detector.advance(detected)


@pytest.mark.parametrize("fused", [True, False])
def test_a_default_device_does_not_affect_detection(model: Tiny, fused: bool, set_threads: Any) -> None:
    set_threads(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    detector = sliced(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # torch creates the optimizer's state on a device of its choice
    with torch.device("meta"):
        optimizer.step()
        detected = detector.detect()
    assert detected.changed
    assert detected.digest == digest_view(detector.table, view_of(model))


def test_changes_during_a_publish_belong_to_the_next_version(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    detector, start = sliced(model, optimizer), view_of(model)
    train(model, optimizer)
    first, published = detector.detect(), view_of(model)
    train(model, optimizer, 2)
    assert same_bits(detector.tensors(), start)
    assert first.digest == digest_view(detector.table, published)
    detector.advance(first)
    assert same_bits(detector.tensors(), published)
    second = detector.detect()
    assert second.start == first.digest
    assert second.digest == digest_view(detector.table, view_of(model))


def test_memory_does_not_grow_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    tensors = published_tensors(model)
    table = table_of(tensors, torch.bfloat16)
    recorder = HostRecorder(table, bucket=1)
    detector = Sliced(tensors, table, optimizer, recorder)
    copied, most = recorder._copy_views, []

    def watched(parameters: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        old = copied(parameters)
        most.append(held())
        return old

    def held() -> int:
        return sum(value.untyped_storage().nbytes() for value in vars(recorder).values() if torch.is_tensor(value))

    monkeypatch.setattr(recorder, "_copy_views", watched)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    optimizer.step()
    assert max(most) == 2 * 64 * 64
    assert held() == 0
    assert not detector._copied.indices


@pytest.mark.parametrize("in_flight", [False, True])
def test_lists_that_outgrow_a_copy_are_replaced_by_one(in_flight: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(3)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tensors = published_tensors(model)
    table = table_of(tensors, torch.bfloat16)
    recorder = HostRecorder(table)
    detector = Sliced(tensors, table, optimizer, recorder)
    before, first, most = view_of(model), None, 0.0
    for step in range(40):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        parts = [change for own in recorder._pending._parts.values() for change in own]
        most = max(most, sum(part.indices.nbytes + part.old.nbytes + part.new.nbytes for part in parts) / table.numel)
        if in_flight and step == 0:
            first = detector.detect()  # durable only after more steps
            before = view_of(model)
    assert most < 6
    assert detector._copied.indices == set(range(len(table)))
    if first is not None:
        detector.advance(first)
    detected = detector.detect()
    assert not detected.values
    assert detected.start == digest_view(table, before)
    assert detected.digest == digest_view(table, view_of(model))
    for index, spec in enumerate(table):
        old, new = bits_of(before[spec.name]), bits_of(view_of(model)[spec.name])
        assert np.array_equal(detected.changes[index].indices, np.flatnonzero(old != new))


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=6), min_size=1, max_size=4))
def test_changes_compose_to_what_a_dense_comparison_finds(writes: list[list[tuple[int, int]]]) -> None:
    start = np.zeros(10, np.uint16)
    now, whole = start, Change(np.empty(0, np.int64), start[:0], start[:0])
    for step in writes:
        after = now.copy()
        for at, value in step:
            after[at] = value
        at = np.flatnonzero(after != now)
        whole, now = compose(whole, Change(at, now[at], after[at])), after
    at = np.flatnonzero(now != start)
    assert [part.tolist() for part in (whole.indices, whole.old, whole.new)] == [
        part.tolist() for part in (at, start[at], now[at])
    ]


# --- supported optimizers ---------------------------------------------------------------------------


class OwnAdamW(torch.optim.AdamW):
    """May do anything."""


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "no optimizer"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS is not known"),
        (lambda p: OwnAdamW(p), "OwnAdamW is not known"),
        (lambda p: torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]), "none of the model's parameters"),
        (lambda p: torch.optim.SGD(p[1:]), "does not hold .*, which is trained"),
        (lambda p: observed_elsewhere(torch.optim.SGD(p)), "another engine already observes"),
        (lambda p: torch.optim.Adam(p, differentiable=True), "differentiable"),
        (lambda p: with_step(torch.optim.SGD(p)), "has been replaced"),
        (lambda p: Scaled(torch.optim.SGD(p)), "float16"),
    ],
)
def test_unsupported_optimizers_get_a_snapshot_with_a_logged_reason(
    make: Callable[[Any], Any], says: str, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Tiny()
    optimizer = make(list(model.parameters()))
    with pytest.raises(ConfigError, match=f"cannot be exact here: .*{says}"):
        DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, detector="sliced"))
    with (
        caplog.at_level(logging.INFO),
        DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine,
    ):
        assert isinstance(engine._publisher.detector, Snapshot)
    logged = [re.search(says, record.message) is not None for record in caplog.records]
    assert logged.count(True) == (optimizer is not None)


def with_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    setattr(optimizer, "step", lambda: None)  # noqa: B010
    return optimizer


def observed_elsewhere(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Observed by an engine whose steps an LR scheduler counts."""
    parameters = optimizer.param_groups[0]["params"]
    live = {f"w{number}": parameter for number, parameter in enumerate(parameters)}
    Sliced(live, table_of(live, torch.bfloat16), optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


class Scaled:
    """The parts of accelerate's wrapper that hubsync uses."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.scaler = optimizer, object()


def test_tensors_that_share_memory_are_not_sliced(model: Tiny, optimizer: torch.optim.Optimizer, address: str) -> None:
    model.layers[1].weight.data = model.layers[0].weight.data
    with pytest.raises(ConfigError, match=r"layers\.\d\.weight and layers\.\d\.weight share memory"):
        DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, detector="sliced"))


def test_compact_deltas_need_a_copy(model: Tiny, optimizer: torch.optim.Optimizer, address: str) -> None:
    with pytest.raises(ConfigError, match="keeps no copy"):
        SyncConfig(bucket=address, detector="sliced", encoding="compact")
    config = SyncConfig(bucket=address, encoding="compact")
    tensors = published_tensors(model)
    assert isinstance(choose_detector(tensors, table_of(tensors, torch.bfloat16), optimizer, config), Snapshot)


def test_accelerates_wrapper_without_a_scaler_is_unwrapped(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert why_not(wrapped) is None
    detector = sliced(model, optimizer)
    train(model, wrapped)
    assert detector.detect().digest == digest_view(detector.table, view_of(model))


# --- low precision ----------------------------------------------------------------------------------


def test_the_share_of_lost_updates_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    with torch.no_grad():
        weight[:250] = 1e-6
    live = {"weight": weight}
    optimizer = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0)
    Sliced(live, table_of(live, torch.bfloat16), optimizer)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert [record.message for record in caplog.records if "75.0 %" in record.message]
    assert len(caplog.records) == 1


def test_undo_after_the_optimizer_was_deleted_does_nothing(model: Tiny) -> None:
    optimizer = torch.optim.SGD(model.parameters())
    steps = SlicedSteps(optimizer, sliced(model, torch.optim.SGD(model.parameters())))
    del optimizer
    steps.undo()
