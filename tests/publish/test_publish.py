"""Published versions equal the trained weights bit for bit."""

from __future__ import annotations

import os
import signal
import threading
import time
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
from hubsync.chain import ChainReader, Step, VersionInfo
from hubsync.errors import (
    ChainError,
    ConfigError,
    WrongParent,
)
from hubsync.publish import publisher as publisher_module
from hubsync.publish.detect import changes as changes_module
from hubsync.publish.detect.changes import Detected
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view.live import published_tensors
from tests.support.faults import FaultyBucket
from tests.support.tiny import Tiny, follow, same_bits, train, view_of


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


def test_publishing_in_a_forked_process_is_refused(model: Tiny, address: str) -> None:
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


def test_an_invalid_optimizer_is_refused_before_the_bucket_is_created(model: Tiny, address: str) -> None:
    with pytest.raises(ConfigError, match="list is not a torch optimizer"):
        DeltaWeightTransferEngine(model, [model], SyncConfig(bucket=address))  # type: ignore[arg-type]
    assert not Path(address).exists()


def test_a_step_is_any_kind_of_integer(model: Tiny, address: str) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        for step in (np.int64(3), torch.tensor(3)):
            torch.nn.init.normal_(model.layers[0].weight)  # type: ignore[arg-type]
            assert engine.publish(step).result().step == 3  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            engine.publish(1.5)  # type: ignore[arg-type]


def test_a_publish_without_changes_makes_no_version(model: Tiny, address: str) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        published = engine.publish(3).result()
        assert (published.version, published.changed, published.payload_bytes) == (0, 0, 0)
        assert published.position == engine.position


def test_steps_during_an_upload_belong_to_the_next_version(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, faulty: list[FaultyBucket]
) -> None:
    stuck = threading.Event()
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine:
        faulty[0].before_commit = lambda path: None if stuck.wait(60) else pytest.fail("training did not continue")
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
            (changes_module, "find_changes"),
            (changes_module, "difference"),
            (changes_module, "digest_change"),
            (publisher_module, "write_delta"),
        ]:
            watch(module, name)
        train(model, optimizer)
        engine.publish(1).result()
    assert [name for name, thread in workers.items() if thread is threading.main_thread()] == [
        "find_changes",
        "digest_change",
    ]
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


def test_a_publish_reports_its_cost(model: Tiny, optimizer: torch.optim.Optimizer, address: str) -> None:
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
