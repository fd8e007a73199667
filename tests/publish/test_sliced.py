"""Detection without a copy of the model: training is what it was, and no change is missed or made up."""

from __future__ import annotations

import copy
import importlib
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.errors import BucketUnavailable, ChainError, ConfigError
from hubsync.format.digest import digest_view
from hubsync.kernels import rounding
from hubsync.kernels.bits import bits_of
from hubsync.publish import engine as engine_module
from hubsync.publish.detect import sliced as sliced_module
from hubsync.publish.detect.changes import Change, compose
from hubsync.publish.detect.choose import choose_detector
from hubsync.publish.detect.sliced import Sliced
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.detect.stepping import SlicedSteps, why_not
from hubsync.publish.view.live import published_tensors, table_of
from tests.support.faults import FaultyBucket
from tests.support.tiny import Tiny, follow, same_bits, train, view_of

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
    """As transformers' trainer has it for embeddings. bitsandbytes finds such parameters by their numbers."""
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


def sliced(model: torch.nn.Module, optimizer: torch.optim.Optimizer, view: torch.dtype = torch.bfloat16) -> Sliced:
    """A detector whose buckets are so small that every step needs several."""
    tensors = published_tensors(model)
    return Sliced(tensors, table_of(tensors, view), optimizer, bucket=40)


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


# --- training is what it was ------------------------------------------------------------------------


def run(make: Make, dtype: torch.dtype, hooked: bool) -> list[Any]:
    """Some training with a scheduler, clipping, a parameter without gradient, and a resume; all that it leaves."""
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
def test_a_group_that_torch_looks_at_as_one_is_stepped_as_one(make: Make) -> None:
    """With bfloat16 it shows: `_foreach_mul_` and `mul_` round otherwise."""

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
            Sliced(live, table_of(live, torch.bfloat16), optimizer, bucket=1)
        for later in gradients[1:]:
            optimizer.step()
            receive(later)
        optimizer.step()
        return flattened([live, optimizer.state_dict()["state"]])

    assert trained(hooked=True) == trained(hooked=False)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_skips_and_unscales_as_it_did(fused: bool) -> None:
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


def test_hooks_and_closures_run_once_a_step(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
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


def test_a_step_that_fails_leaves_the_optimizer_whole_and_its_changes_known(model: Tiny) -> None:
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
def test_schedulers_still_see_that_steps_happen_and_steps_are_given_back(
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
    assert not detector.detect().changed, "closed: it looks no longer"


# --- every change, and no other ---------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    view=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    rate=st.sampled_from([1e-5, 1e-3, 0.1, 30.0]),
    steps=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=4),
)
@settings(max_examples=30)
def test_recall_and_precision_are_one(
    seed: int, dtype: torch.dtype, view: torch.dtype, rate: float, steps: list[tuple[int, bool]]
) -> None:
    torch.manual_seed(seed)
    model = Tiny(dtype=dtype)
    model.layers[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5)  # elements come back, by and by
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


NO_NUMBERS = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7F800000, 0x3F800000], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    "values",
    [NO_NUMBERS, NO_NUMBERS[0], NO_NUMBERS[2], NO_NUMBERS.repeat(9).view(9, 5).t()],
    ids=["flat", "scalar", "negative scalar", "transposed"],
)
def test_weights_that_are_no_numbers_are_followed_bit_for_bit(values: torch.Tensor) -> None:
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
def test_a_default_device_is_for_the_users_own_tensors(model: Tiny, fused: bool, set_threads: Any) -> None:
    set_threads(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    detector = sliced(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # torch makes the optimizer's state, where it likes
    with torch.device("meta"):
        optimizer.step()
        detected = detector.detect()
    assert detected.changed
    assert detected.digest == digest_view(detector.table, view_of(model))


def test_changes_made_while_a_publish_is_under_way_are_kept_apart(
    model: Tiny, optimizer: torch.optim.Optimizer
) -> None:
    detector, start = sliced(model, optimizer), view_of(model)
    train(model, optimizer)
    first, published = detector.detect(), view_of(model)
    train(model, optimizer, 2)
    assert same_bits(detector.tensors(), start)
    assert first.digest == digest_view(detector.table, published)
    detector.advance(first)
    assert same_bits(detector.tensors(), published)
    second = detector.detect()
    assert second.before == first.digest
    assert second.digest == digest_view(detector.table, view_of(model))


def test_what_is_held_does_not_grow_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    tensors = published_tensors(model)
    detector = Sliced(tensors, table_of(tensors, torch.bfloat16), optimizer, bucket=1)
    remembered, most = detector._copied, []

    def watched(parameters: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        old = remembered(parameters)
        most.append(held())
        return old

    def held() -> int:
        return sum(value.untyped_storage().nbytes() for value in vars(detector).values() if torch.is_tensor(value))

    monkeypatch.setattr(detector, "_copied", watched)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    optimizer.step()
    assert max(most) == 2 * 64 * 64
    assert held() == 0
    assert len(detector._buffers.table) == 0


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


# --- rounding ---------------------------------------------------------------------------------------

SPECIAL = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000]
PATTERNS = st.one_of(
    st.sampled_from([pattern | sign for pattern in SPECIAL for sign in (0, 1 << 31)]), st.integers(0, 2**32 - 1)
)


def is_nan(pattern: int) -> bool:
    return pattern & 0x7FFFFFFF > 0x7F800000


@given(st.lists(PATTERNS.filter(lambda pattern: not is_nan(pattern)), max_size=70), st.integers(1, 200), st.data())
def test_rounding_is_torchs_bit_for_bit(patterns: list[int], repeats: int, data: st.DataObject) -> None:
    values = np.tile(np.array(patterns, np.uint32), repeats)
    expected = bits_of(torch.from_numpy(values.view(np.float32)).bfloat16())
    out = np.empty(len(values), np.uint16)
    assert rounding.round_into(out, values)
    assert np.array_equal(out, expected)
    old = expected.copy()
    at = sorted(data.draw(st.sets(st.integers(0, max(0, len(old) - 1)), max_size=9))) if len(old) else []
    old[at] ^= 1
    found = rounding.changes(values, old)
    assert found is not None
    assert found[0].tolist() == at
    assert found[1].tolist() == expected[at].tolist()


def test_where_everything_changes_everything_is_found() -> None:
    values = np.full(100_001, 0x3F800000, np.uint32)
    found = rounding.changes(values, np.zeros(len(values), np.uint16))
    assert found is not None
    assert np.array_equal(found[0], np.arange(len(values)))
    assert set(found[1].tolist()) == {0x3F80}


@given(st.integers(0, 9999), st.integers(0x7F800001, 0x7FFFFFFF), st.booleans())
def test_a_nan_is_left_to_torch(at: int, pattern: int, negative: bool) -> None:
    values = np.full(10_000, 0x7F800000, np.uint32)
    values[at] = pattern | negative << 31
    assert not rounding.round_into(np.empty(len(values), np.uint16), values)
    assert rounding.changes(values, np.zeros(len(values), np.uint16)) is None


# --- where it can be used ---------------------------------------------------------------------------


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
        (lambda p: watched_elsewhere(torch.optim.SGD(p)), "another engine already observes"),
        (lambda p: torch.optim.Adam(p, differentiable=True), "differentiable"),
        (lambda p: with_step(torch.optim.SGD(p)), "has been replaced"),
        (lambda p: Scaled(torch.optim.SGD(p)), "float16"),
    ],
)
def test_other_optimizers_get_a_snapshot_and_are_told_why(
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
    told = [re.search(says, record.message) is not None for record in caplog.records]
    assert told.count(True) == (optimizer is not None)


def with_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    setattr(optimizer, "step", lambda: None)  # noqa: B010
    return optimizer


def watched_elsewhere(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """By an engine whose steps an LR scheduler counts."""
    parameters = optimizer.param_groups[0]["params"]
    live = {f"w{number}": parameter for number, parameter in enumerate(parameters)}
    Sliced(live, table_of(live, torch.bfloat16), optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


class Scaled:
    """accelerate's wrapper as far as we look at it."""

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


def test_accelerates_wrapper_without_a_scaler_is_looked_through(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert why_not(wrapped) is None
    detector = sliced(model, optimizer)
    train(model, wrapped)
    assert detector.detect().digest == digest_view(detector.table, view_of(model))


# --- published equals trained -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reader_ends_bit_equal_whatever_fails_in_between(
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
                train(model, optimizer)  # beside the upload
        engine.publish(8).result()
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    assert {manifest.kind for manifest in reader.manifests()} == {"delta"}
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_an_anchor_holds_the_published_view_although_no_copy_of_it_exists(
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
def test_writes_outside_of_steps_are_answered_with_the_whole_model(
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
def test_most_writes_are_noticed_before_an_audit_is_due(
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


def test_an_interrupted_detection_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    live = {"weight": weight}
    optimizer = torch.optim.SGD([weight], lr=1.0)
    detector = Sliced(live, table_of(live, torch.bfloat16), optimizer)
    for gradient in (1.0, -1.0):  # there and back
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        if gradient > 0:
            assert detector.detect().changed == 3
    with monkeypatch.context() as patch:
        patch.setattr(sliced_module, "PendingChanges", interrupt)
        with pytest.raises(KeyboardInterrupt):
            detector.detect()
    assert detector.detect().changed == 0


def test_an_interrupted_new_start_is_made_again(
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


def test_the_first_publish_is_audited_and_the_others_as_often_as_asked_for(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str
) -> None:
    encodings = []
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, audit_every=3)) as engine:
        for step in range(7):
            past_torch(model, optimizer)
            train(model, optimizer)
            encodings.append(engine.publish(step).result().encoding)
    assert encodings == ["dense", "fast", "fast", "dense", "fast", "fast", "dense"]


def test_an_anchor_that_fails_after_an_outside_write_is_tried_again(
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


def test_an_anchor_of_a_view_that_is_gone_is_refused_not_made_up(model: Tiny, optimizer: torch.optim.Optimizer) -> None:
    detector = sliced(model, optimizer)
    past_torch(model, optimizer)
    with pytest.raises(ChainError, match="written outside"):
        detector.tensors()
    assert detector.detect().before == digest_view(detector.table, view_of(model))


# --- low precision ----------------------------------------------------------------------------------


def test_the_share_of_lost_updates_is_measured_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
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


def test_slices_end_with_the_optimizer(model: Tiny) -> None:
    optimizer = torch.optim.SGD(model.parameters())
    steps = SlicedSteps(optimizer, sliced(model, torch.optim.SGD(model.parameters())))
    del optimizer
    steps.undo()


# --- fused Adam and AdamW, on tensors of all sizes ---------------------------------------------------

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
    return Sliced(tensors, table_of(tensors, torch.bfloat16), optimizer, bucket=5000)


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
    assert detected.before == digest_view(detector.table, before)
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
def test_a_weight_that_becomes_nan_and_a_number_again_is_followed(at: int, value: float) -> None:
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
    detector.advance(detector.detect())  # a new start, because the weight was written to
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
