"""The publisher side: what is published equals what was trained, bit for bit, whatever fails in between."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader, ChainWriter, Compactor, Step, VersionInfo
from hubsync.chain.replay import View, replay
from hubsync.errors import (
    BucketError,
    BucketUnavailable,
    ChainError,
    ConfigError,
    Fenced,
    ReplicaUnreachable,
    RunMismatch,
    WrongParent,
)
from hubsync.format.digest import digest_view
from hubsync.kernels.bits import bits_of
from hubsync.publish import engine as engine_module
from hubsync.publish import publisher as publisher_module
from hubsync.publish.detect import base as base_module
from hubsync.publish.detect import compare as compare_module
from hubsync.publish.detect.base import Detected
from hubsync.publish.detect.compare import compare, compare_on_device
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view.live import published_tensors, table_of
from tests.replicas.test_replica import ModelServer
from tests.support.faults import FaultyBucket


class Tiny(torch.nn.Module):
    """An embedding tied to the output, a buffer, a scalar and odd sizes."""

    def __init__(self, width: int = 6, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = torch.nn.Embedding(11, width, dtype=dtype)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(width, width, dtype=dtype) for _ in range(2)])
        self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))
        self.register_buffer("bias", torch.linspace(-1, 1, 7, dtype=dtype))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.head = torch.nn.Linear(width, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden)) * self.scale
        return self.head(hidden)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        tokens = torch.randint(0, 11, (2, 5))
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def view_of(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(dtype, copy=True) for name, tensor in published_tensors(model).items()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(patterns(left[name]) == patterns(right[name]) for name in left)


def patterns(tensor: torch.Tensor) -> list[int]:
    return bits_of(tensor.contiguous()).tolist()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "bucket")


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def optimizer(model: Tiny) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> list[FaultyBucket]:
    """The buckets that engines of this test open, each able to fail on command."""
    opened: list[FaultyBucket] = []

    def open_faulty(address: str, **_: object) -> FaultyBucket:
        opened.append(FaultyBucket(LocalBucket(address, create=True)))
        return opened[-1]

    monkeypatch.setattr(engine_module, "open_bucket", open_faulty)
    return opened


def follow(address: str, tmp_path: Path, to: int | None = None, base: dict[str, torch.Tensor] | None = None) -> View:
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    return replay(reader, reader.plan(None, to, base_available=base is not None), base)


# --- what is published ------------------------------------------------------------------------------


def test_the_view_holds_each_weight_once_under_its_checkpoint_name(model: Tiny) -> None:
    names = ["embed.weight", "scale", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "bias"]
    assert sorted(published_tensors(model)) == sorted(names)


def test_wrappers_leave_no_trace_in_names(model: Tiny) -> None:
    compiled = torch.compile(model)
    wrapped = torch.nn.Module()
    wrapped.add_module("module", compiled)  # type: ignore[arg-type]
    assert published_tensors(wrapped).keys() == published_tensors(model).keys()


def test_a_model_without_weights_is_refused(model: Tiny, address: str) -> None:
    with pytest.raises(ConfigError, match="meta device"):
        DeltaWeightTransferEngine(model.to("meta"), None, SyncConfig(bucket=address))
    setattr(model, "peft_config", {})  # noqa: B010
    with pytest.raises(ConfigError, match="PEFT"):
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address))
    with pytest.raises(ConfigError, match="no parameters"):
        DeltaWeightTransferEngine(torch.nn.ReLU(), None, SyncConfig(bucket=address))
    with pytest.raises(ConfigError, match=r"weight is complex"):
        DeltaWeightTransferEngine(torch.nn.Linear(2, 2, dtype=torch.complex64), None, SyncConfig(bucket=address))


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
def test_the_device_path_finds_the_same_as_the_cpu_path(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "_CHUNK", 64)
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


def test_detection_leaves_training_as_it_was(model: Tiny, optimizer: torch.optim.Optimizer, address: str) -> None:
    train(model, optimizer)
    parameters = [(p, p.data_ptr(), p._version, p.requires_grad, p.grad) for p in model.parameters()]
    random = torch.get_rng_state()
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine:
        engine.publish(1).result()
    assert torch.equal(random, torch.get_rng_state())
    for parameter, pointer, version, requires_grad, grad in parameters:
        assert (parameter.data_ptr(), parameter._version, parameter.requires_grad) == (pointer, version, requires_grad)
        assert parameter.grad is grad


# --- published equals trained -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["bfloat16", "float32"])
@given(seed=st.integers(0, 2**32 - 1), rounds=st.lists(st.integers(0, 4), min_size=1, max_size=5))
@settings(max_examples=5, deadline=None)
def test_every_version_replays_to_the_trainers_view(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, view: str, seed: int, rounds: list[int]
) -> None:
    tmp_path = tmp_path_factory.mktemp("run")
    address = str(tmp_path / "bucket")
    torch.manual_seed(seed)
    model = Tiny(dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = SyncConfig(bucket=address, view_dtype=view, base_model="tiny", snapshot_device="cpu")
    view_dtype = getattr(torch, view)
    base = view_of(model, view_dtype)
    views = {0: base}
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for number, steps in enumerate(rounds):
            train(model, optimizer, steps)
            with torch.no_grad():  # what an optimizer does not do, but memory can hold
                flat = model.get_parameter("layers.0.weight").view(-1)
                flat[number] = [-0.0, 1e-40, 0.0, float("inf"), float("nan")][number]
            published = engine.publish(number).result()
            views[published.version] = view_of(model, view_dtype)
    for version, expected in views.items():
        followed = follow(address, tmp_path, version, base)
        assert same_bits(followed.tensors, expected)
        assert followed.position.version == version


def test_a_scalar_that_is_not_a_number_is_cast_as_torch_casts_it(model: Tiny) -> None:
    with torch.no_grad():
        model.scale.fill_(float("nan"))
    live = published_tensors(model)
    assert same_bits(Snapshot(live, table_of(live, torch.bfloat16)).tensors(), view_of(model))


def test_tensors_that_a_module_replaces_are_followed(model: Tiny, address: str, tmp_path: Path) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        model.layers[0].weight = torch.nn.Parameter(torch.randn(6, 6))
        model.layers[1].weight.data = torch.randn(6, 6, dtype=torch.bfloat16)
        model.double()  # makes other buffers
        model.get_buffer("bias").add_(1)
        engine.publish(1).result()
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (torch.nn.Linear(6, 5), r"layers.0.weight now has shape \[5, 6\]"),
        (torch.nn.ReLU(), "no longer has layers.0.bias"),
    ],
)
def test_a_model_that_becomes_another_is_not_published(
    model: Tiny, address: str, tmp_path: Path, layer: torch.nn.Module, says: str
) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        before, model.layers[0] = model.layers[0], layer
        with pytest.raises(ConfigError, match=says):
            engine.publish(1)
        model.layers[0] = before
        torch.nn.init.zeros_(before.weight)  # type: ignore[arg-type]
        assert engine.publish(2).result().version == 1
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_publishing_from_several_threads_makes_one_chain(
    model: Tiny, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect, detecting, overlaps = Snapshot.detect, threading.Lock(), []

    def slowly(snapshot: Snapshot) -> Detected:
        overlaps.extend([1] if detecting.locked() else [])
        with detecting:
            time.sleep(0.005)
            return detect(snapshot)

    def work() -> None:
        for step in range(5):
            with torch.no_grad():
                model.scale.add_(1)
            engine.publish(step)

    monkeypatch.setattr(Snapshot, "detect", slowly)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.publish().result()
    assert not overlaps
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_changes_of_an_older_view_are_refused(model: Tiny, address: str, tmp_path: Path) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        torch.nn.init.ones_(model.layers[0].weight)  # type: ignore[arg-type]
        stale = engine._publisher.detector.detect()
        engine.publish(1).result()
        with pytest.raises(ChainError, match="publish again"):
            engine._publisher._submit(stale, VersionInfo(1), 0.0).result()
        torch.nn.init.zeros_(model.layers[0].weight)  # type: ignore[arg-type]
        engine.publish(2).result()
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_a_forked_process_is_told_to_publish_elsewhere(model: Tiny, address: str) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        torch.nn.init.zeros_(model.layers[0].weight)  # type: ignore[arg-type]
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # rather than wait for a thread that it does not have
            try:
                engine.publish(1)
            except ConfigError:
                engine.close()
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_what_is_no_optimizer_is_refused_before_the_bucket_is_touched(model: Tiny, address: str) -> None:
    with pytest.raises(ConfigError, match="list is not a torch optimizer"):
        DeltaWeightTransferEngine(model, [model], SyncConfig(bucket=address))  # type: ignore[arg-type]
    assert not Path(address).exists()


def test_a_step_may_be_any_integer_but_nothing_else(model: Tiny, address: str) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        for step in (np.int64(3), torch.tensor(3)):
            torch.nn.init.normal_(model.layers[0].weight)  # type: ignore[arg-type]
            assert engine.publish(step).result().step == 3  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            engine.publish(1.5)  # type: ignore[arg-type]


def test_nothing_changed_makes_no_version(model: Tiny, address: str) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        published = engine.publish(3).result()
        assert (published.version, published.changed, published.payload_bytes) == (0, 0, 0)
        assert published.position == engine.position


def test_training_goes_on_while_an_upload_is_stuck_and_is_not_published_with_it(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, faulty: list[FaultyBucket]
) -> None:
    stuck = threading.Event()
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine:
        faulty[0].before_commit = lambda path: None if stuck.wait(60) else pytest.fail("nobody trained on")
        train(model, optimizer)
        published = view_of(model)
        ticket = engine.publish(1)
        train(model, optimizer, steps=2)
        assert not ticket.done()
        stuck.set()
        first = ticket.result()
        assert same_bits(follow(address, tmp_path, first.version).tensors, published)
        engine.publish(3)
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_the_training_thread_only_compares(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: dict[str, threading.Thread] = {}

    def watch(module: ModuleType, name: str) -> None:
        function = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            workers[name] = threading.current_thread()
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, detector="snapshot")) as engine:
        for module, name in [
            (compare_module, "find_changes"),
            (base_module, "difference"),
            (base_module, "digest_change"),
            (publisher_module, "write_delta"),
        ]:
            watch(module, name)
        train(model, optimizer)
        engine.publish(1).result()
    assert [name for name, thread in workers.items() if thread is threading.main_thread()] == ["find_changes"]
    assert len(workers) == 4


def test_a_delta_is_never_replayed_from_another_version(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine:
        for step in range(2):
            train(model, optimizer)
            engine.publish(step)
    view, reader = follow(address, tmp_path, to=0), ChainReader(LocalBucket(address), tmp_path / "cache")
    before = {name: tensor.clone() for name, tensor in view.tensors.items()}
    second = reader.manifest(2)
    with pytest.raises(WrongParent, match=r"applies to version 1 .* not to version 0"):
        view.apply(reader.patch(second), Step(second))
    assert same_bits(view.tensors, before)


def test_a_publish_tells_what_it_cost(model: Tiny, optimizer: torch.optim.Optimizer, address: str) -> None:
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, name="mine")) as engine:
        train(model, optimizer, steps=2)
        published = engine.publish().result()
        manifest = ChainReader(LocalBucket(address), address).manifest(published.version)
    assert (published.step, manifest.step, manifest.name) == (2, 2, "mine")
    assert published.total == sum(tensor.numel() for tensor in published_tensors(model).values())
    assert published.dense_bytes == 2 * published.total
    assert published.changed == manifest.changed > 0
    assert published.payload_bytes == manifest.nbytes
    assert published.digest == manifest.position.digest == engine.position.digest


def test_steps_are_counted_through_accelerates_wrapper_until_closed(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str
) -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.optimizer = optimizer

    engine = DeltaWeightTransferEngine(model, Wrapper(), SyncConfig(bucket=address))  # type: ignore[arg-type]
    train(model, optimizer, steps=3)
    engine.close()
    train(model, optimizer)
    assert engine.steps == 3
    engine.close()
    with pytest.raises(ConfigError, match="closed"):
        engine.publish()


def test_low_precision_training_is_warned_of_once_and_measured_once(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), DeltaWeightTransferEngine(Tiny(), None, SyncConfig(bucket=address)):
        assert not caplog.records
    coarse = Tiny(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(coarse.parameters(), lr=1e-3)
    with DeltaWeightTransferEngine(coarse, optimizer, SyncConfig(bucket=str(tmp_path / "other"))):
        train(coarse, optimizer, steps=3)
    told, measured = (record.message for record in caplog.records)
    assert "torch.bfloat16" in told
    assert re.search(r"has left \d+\.\d % of the parameters as they were", measured)


def test_what_is_trained_outside_of_the_model_is_warned_of(
    model: Tiny, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    value_head = torch.nn.Linear(6, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *value_head.parameters()])
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)):
        [warning] = [record.message for record in caplog.records]
    assert "trains 2 tensors (7 elements) that are not in the model" in warning


def test_masters_that_deepspeed_steps_are_nothing_to_be_warned_of(
    model: Tiny, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Stands in for DeepSpeed's optimizer: all that is asked is where its class is from, and what it steps with."""
    stands_in = type("ZeROOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    stands_in.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(9))])
    with DeltaWeightTransferEngine(model, stands_in, SyncConfig(bucket=address)) as engine:
        stands_in.optimizer.step()
        assert engine.steps == 1
    assert "not in the model" not in caplog.text


def test_a_model_of_buffers_only_is_published(address: str, tmp_path: Path) -> None:
    statistics = torch.nn.BatchNorm1d(4, affine=False)
    with DeltaWeightTransferEngine(statistics, None, SyncConfig(bucket=address)) as engine:
        statistics(torch.randn(3, 4))
        assert engine.publish(1).result().changed > 0
    assert same_bits(follow(address, tmp_path).tensors, view_of(statistics))


# --- failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("verb", "nth"), [("put", 1), ("list", 1), ("commit", 1), ("commit", 2)])
def test_after_a_failure_anywhere_the_next_version_holds_every_change(
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


def test_a_replaced_engine_is_fenced_and_its_successor_continues_with_deltas(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny")
    base = view_of(model)
    old = DeltaWeightTransferEngine(model, optimizer, config)
    train(model, optimizer)
    old.publish(1).result()
    with DeltaWeightTransferEngine(model, optimizer, config) as new:
        assert new.position == old.position
        train(model, optimizer)
        with pytest.raises(Fenced):
            old.publish(2).result()
        new.publish(2).result()
    old.close()
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    assert {manifest.kind for manifest in reader.manifests()} == {"delta"}
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_a_replaced_engine_is_fenced_although_nothing_has_changed(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str
) -> None:
    """Else `sync` would bring servers back to where its successor was long ago."""
    old = DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address))
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)):
        with pytest.raises(Fenced):
            old.publish(1)
        with pytest.raises(Fenced):
            old.sync(2)
    old.close()


def test_an_engine_whose_weights_moved_meanwhile_begins_anew_with_an_anchor(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny")
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        train(model, optimizer)
        first = engine.publish(1).result()
    train(model, optimizer)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        assert engine.position.version > first.version
        assert same_bits(follow(address, tmp_path).tensors, view_of(model))
        train(model, optimizer)
        engine.publish(3).result()
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


@pytest.mark.parametrize("encoding", ["fast", "compact"])
def test_an_engine_that_resumes_an_older_version_publishes_the_way_back_as_a_delta(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, encoding: str
) -> None:
    base = view_of(model)
    config = SyncConfig(bucket=address, base_model="tiny", encoding=encoding)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for step in (1, 2, 3):
            train(model, optimizer)
            engine.publish(step).result()
            if step == 1:
                checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                digest = engine.position.digest
        newest = engine.position
    model.load_state_dict(checkpoint)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        assert engine.position.digest == digest
        assert engine.position.version > newest.version
        train(model, optimizer)
        engine.publish(2).result()
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    assert {manifest.kind for manifest in reader.manifests()} == {"delta"}
    assert len(reader.plan(newest).deltas) == 2
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_where_the_way_back_is_damaged_the_model_is_uploaded_whole(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny")
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        train(model, optimizer)
        engine.publish(1).result()
    (part,) = Path(address).glob("epochs/*/deltas/*")
    part.write_bytes(b"x" * part.stat().st_size)
    model.load_state_dict(checkpoint)
    DeltaWeightTransferEngine(model, optimizer, config).close()
    assert "cannot be read" in caplog.text
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_a_version_may_be_saved_and_served_later(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    reader = ChainReader(LocalBucket(address, create=True), tmp_path / "cache")
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="tiny")) as engine:
        train(model, optimizer)
        first = engine.publish(1).result()
        train(model, optimizer)
        second = engine.publish(2, serve=False).result()
        assert (reader.newest(), reader.served()) == (second.position, first.position)
        assert engine.serve(second.version) == second.position
        assert reader.served() == second.position
        assert engine.serve(first.version) == first.position
        engine.publish(3).result()  # nothing has changed, and that is to be served
        assert reader.served() == second.position


def test_another_models_run_is_left_alone(model: Tiny, address: str) -> None:
    DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)).close()
    before = sorted(stat.path for stat in LocalBucket(address).list())
    with pytest.raises(RunMismatch, match=r"embed\.weight BF16\[11, 6\] where .* embed\.weight BF16\[11, 8\]"):
        DeltaWeightTransferEngine(Tiny(width=8), None, SyncConfig(bucket=address))
    with pytest.raises(RunMismatch, match="resume is False"):
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, resume=False))
    assert sorted(stat.path for stat in LocalBucket(address).list()) == before


# --- anchors ----------------------------------------------------------------------------------------


def test_a_model_that_exists_nowhere_else_is_uploaded_once(model: Tiny, address: str, tmp_path: Path) -> None:
    DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)).close()
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_a_run_whose_creator_died_before_the_first_upload_gets_it_from_the_next(
    model: Tiny, address: str, tmp_path: Path, faulty: list[FaultyBucket]
) -> None:
    commit = FaultyBucket.commit

    def die_at_the_anchor(self: FaultyBucket, path: str, data: bytes) -> None:
        if "anchors" in path:
            raise KeyboardInterrupt
        commit(self, path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaultyBucket, "commit", die_at_the_anchor)
        with pytest.raises(KeyboardInterrupt):
            DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address))
    DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)).close()
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_an_anchor_holds_what_was_published_not_what_is_being_trained(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="tiny")) as engine:
        train(model, optimizer)
        published = engine.publish(1).result()
        view = view_of(model)
        train(model, optimizer)
        manifest = engine.anchor()
        assert manifest.position == published.position
        assert engine.anchor() == manifest
    assert same_bits(follow(address, tmp_path).tensors, view)


def test_anchors_come_as_often_as_asked_for_and_at_the_end(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny", anchor_every=2, anchor_at_close=True)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for step in range(5):
            train(model, optimizer)
            engine.publish(step)
    manifests = ChainReader(LocalBucket(address), tmp_path / "cache").manifests()
    assert [manifest.version for manifest in manifests if manifest.kind == "anchor"] == [2, 4, 5]


def test_an_anchor_comes_once_deltas_cost_a_fraction_of_it(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny", anchor_fraction=10.0)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        dense, sizes = engine.run.table.nbytes, []
        while sum(sizes) <= 10 * dense:
            train(model, optimizer)
            sizes.append(engine.publish().result().payload_bytes)
            assert sum(sizes[:-1]) <= 10 * dense
        train(model, optimizer)
        engine.publish()
    manifests = ChainReader(LocalBucket(address), tmp_path / "cache").manifests()
    assert [manifest.version for manifest in manifests if manifest.kind == "anchor"] == [len(sizes)]


def test_merged_deltas_put_an_anchor_off(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    bucket, cache = LocalBucket(address, create=True), tmp_path / "cache"
    config = SyncConfig(bucket=address, base_model="tiny", anchor_fraction=10.0)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        spent = 0
        while spent <= 20 * engine.run.table.nbytes:
            train(model, optimizer)
            spent += engine.publish().result().payload_bytes
            engine.wait()
            list(Compactor(bucket, ChainReader(bucket, cache)).run())
    assert {manifest.kind for manifest in ChainReader(bucket, cache).manifests()} == {"delta"}


def test_an_anchor_that_fails_is_tried_again_and_stops_nobody(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, faulty: list[FaultyBucket]
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny", anchor_every=2)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for step in range(3):
            if step == 1:
                faulty[0].fail("commit", 3, when="before")  # manifest, head, then the anchor's manifest
            train(model, optimizer)
            engine.publish(step).result()
            engine.wait()
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    assert [m.version for m in reader.manifests() if m.kind == "anchor"] == [reader.newest().version]


def test_an_anchor_that_the_local_disk_refuses_stops_nobody(model: Tiny, address: str, tmp_path: Path) -> None:
    class FullDisk:
        def save_pretrained(self, directory: Path) -> None:
            raise OSError(28, "No space left on device")

    config = SyncConfig(bucket=address, base_model="tiny", anchor_every=1)
    base = view_of(model)
    with DeltaWeightTransferEngine(model, None, config, processing_class=FullDisk()) as engine:
        for step in range(3):
            torch.nn.init.normal_(model.layers[0].weight)  # type: ignore[arg-type]
            assert engine.publish(step).result().version == step + 1
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


@pytest.mark.parametrize("detector", ["sliced", "snapshot"])
def test_a_publish_that_an_interrupt_has_left_without_a_ticket_is_waited_for(
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


def test_a_version_whose_head_an_interrupt_has_left_unwritten_is_the_parent_of_the_next(
    model: Tiny, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(writer: ChainWriter) -> None:
        raise KeyboardInterrupt

    base = view_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="tiny")) as engine:
        train(model, optimizer)
        monkeypatch.setattr(ChainWriter, "_write_head", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.publish(1).result()
        monkeypatch.undo()
        train(model, optimizer)
        assert engine.publish(2).result().version == 2
    assert [manifest.kind for manifest in ChainReader(LocalBucket(address), tmp_path).manifests()] == ["delta"] * 2
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_no_room_for_an_anchor_says_where_room_is_needed(
    model: Tiny, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        with torch.no_grad():
            model.scale += 1
        engine.sync()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
        with pytest.raises(BucketError, match="TMPDIR"):
            engine.anchor()
        monkeypatch.undo()
        assert engine.anchor().position == engine.position


@pytest.mark.parametrize("compiled", [False, True])
def test_a_transformers_model_is_anchored_as_a_loadable_checkpoint(
    compiled: bool, address: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    trained = torch.compile(model) if compiled else model
    with DeltaWeightTransferEngine(trained, None, SyncConfig(bucket=address)) as engine:
        reader = ChainReader(LocalBucket(address), tmp_path / "cache")
        directory = reader.fetch(engine.anchor())[0].parent
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.architectures == ["Qwen3ForCausalLM"]
    assert same_bits(view_of(loaded), view_of(model))
    with DeltaWeightTransferEngine(loaded, None, SyncConfig(bucket=str(tmp_path / "next"))) as engine:
        assert engine.run.base.model == str(directory.resolve())
    with torch.no_grad():
        loaded.model.norm.weight[0] += 1
    with DeltaWeightTransferEngine(loaded, None, SyncConfig(bucket=str(tmp_path / "trained"))) as engine:
        assert engine.run.base.model is None  # that checkpoint is not what is trained: it is uploaded instead
    assert same_bits(follow(str(tmp_path / "trained"), tmp_path).tensors, view_of(loaded))


# --- servers ----------------------------------------------------------------------------------------


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModelServer]:
    """Two servers that behave as the worker protocol says; they hold the base of whatever is published first."""
    made = {url: ModelServer() for url in ("http://one", "http://two")}
    monkeypatch.setattr("hubsync.replicas.deployment.connect", lambda url, *_, **__: made[url])
    return made


@pytest.fixture
def served(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, servers: dict[str, ModelServer]
) -> Iterator[DeltaWeightTransferEngine]:
    config = SyncConfig(bucket=address, base_model="tiny", servers=list(servers))
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        yield engine


def test_sync_brings_every_server_to_the_new_version(
    served: DeltaWeightTransferEngine, model: Tiny, optimizer: torch.optim.Optimizer, servers: dict[str, ModelServer]
) -> None:
    for step in (1, 2):
        train(model, optimizer)
        report = served.sync(step)
        assert report.published.position == served.position
        assert [commit.position for commit in report.commits] == [served.position] * 2
        for server in servers.values():
            server.assert_whole()
            assert server.positions == [[served.position]]
    assert served.sync(3).published.changed == 0


def test_servers_stage_a_version_before_they_are_asked_to_commit_it(
    served: DeltaWeightTransferEngine, model: Tiny, optimizer: torch.optim.Optimizer, servers: dict[str, ModelServer]
) -> None:
    served.sync(0)
    staged = threading.Barrier(3)  # the two servers, and this test
    for server in servers.values():
        server.fault = lambda call, before: None if before or call != "hubsync_stage" else _meet(staged)
    old = served.position
    train(model, optimizer)
    published = served.publish(1).result()
    _meet(staged)
    assert [server.staged for server in servers.values()] == [published.position] * 2
    assert [server.positions for server in servers.values()] == [[[old]]] * 2


def _meet(barrier: threading.Barrier) -> None:
    barrier.wait(timeout=60)


def test_a_server_that_fails_keeps_no_other_from_the_version_and_catches_up(
    served: DeltaWeightTransferEngine, model: Tiny, optimizer: torch.optim.Optimizer, servers: dict[str, ModelServer]
) -> None:
    def unreachable(call: str, before: bool) -> None:
        if call == "hubsync_stage":
            raise ReplicaUnreachable("injected")

    train(model, optimizer)
    servers["http://one"].fault = unreachable
    with pytest.raises(ReplicaUnreachable):
        served.sync(1)
    assert served.position.version == 1
    assert servers["http://two"].positions == [[served.position]] != servers["http://one"].positions
    servers["http://one"].fault = lambda call, before: None
    assert served.sync(1).published.version == 1
    assert servers["http://one"].positions == [[served.position]]


def test_a_server_without_a_way_to_the_version_gets_an_anchor(
    served: DeltaWeightTransferEngine,
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    address: str,
    tmp_path: Path,
    servers: dict[str, ModelServer],
) -> None:
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")

    def plan(call: str, before: bool) -> None:
        if call == "hubsync_stage":
            reader.plan(None)  # this server has no base checkpoint

    servers["http://one"].fault = plan
    train(model, optimizer)
    assert served.sync(1).commits[0].position == served.position
    assert [manifest.kind for manifest in reader.manifests()] == ["delta", "anchor"]


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"bucket": ""}, "needs a bucket"),
        ({"view_dtype": "bf16"}, "view_dtype must be one of bfloat16"),
        ({"encoding": "zip"}, "encoding must be one of fast, compact"),
        ({"kv_cache": "drop"}, "kv_cache must be one of"),
        ({"snapshot_device": "cuda:0"}, "snapshot_device must be one of"),
        ({"anchor_every": -1}, "anchor_every"),
        ({"anchor_fraction": -0.5}, "anchor_fraction"),
        ({"anchor_fraction": float("nan")}, "anchor_fraction"),
        ({"stage_timeout": 0}, "positive"),
        ({"stage_timeout": float("nan")}, "positive"),
        ({"commit_timeout": float("inf")}, "positive"),
        ({"servers": "http://one"}, "servers must be a list"),
        ({"servers": [8000]}, "servers must be a list"),
        ({"servers": None}, "servers must be"),
        ({"servers": ["http://one", "http://one/"]}, "twice"),
        ({"bucket": None}, "bucket must be str"),
        ({"anchor_every": "3"}, "anchor_every must be int"),
        ({"anchor_every": True}, "anchor_every must be int"),
        ({"resume": "no"}, "resume must be bool"),
        ({"name": 20261123}, "name must be str"),
        ({"servers": ["http://one"], "quorum": 2}, "quorum must be 0"),
        ({"servers": ["localhost:8000"]}, "http://localhost:8000"),
        ({"name": "two\nlines"}, "printable"),
        ({"base_revision": "abc"}, "base_model"),
    ],
)
def test_settings_that_cannot_work_say_why(setting: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SyncConfig(**{"bucket": "somewhere", **setting})


def test_paths_are_paths_however_they_are_written() -> None:
    assert SyncConfig(bucket=Path("runs/1")) == SyncConfig(bucket="runs/1")  # type: ignore[arg-type]
    assert SyncConfig(bucket="x", base_model=Path("base")).base_model == "base"  # type: ignore[arg-type]


def test_settings_come_from_a_command_line() -> None:
    parser = pytest.importorskip("transformers").HfArgumentParser(SyncConfig)
    (config,) = parser.parse_args_into_dataclasses(
        ["--bucket", "runs/1", "--servers", "http://a:1", "http://b:2", "--anchor_every", "10", "--resume", "False"]
    )
    assert config == SyncConfig(bucket="runs/1", servers=["http://a:1", "http://b:2"], anchor_every=10, resume=False)


def test_an_address_that_is_none_says_so(model: Tiny) -> None:
    with pytest.raises(ConfigError, match="not a bucket address"):
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket="s3://somewhere"))
