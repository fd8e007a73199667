"""The session of a worker that serves adapters: real files of a real chain, and a loader that reads them. No vLLM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hubsync.apply.engine import AdapterHost, RunSource
from hubsync.apply.served_adapter import ServedAdapter, _point
from hubsync.apply.session import Session
from hubsync.bucket import open_bucket
from hubsync.chain import ChainWriter
from hubsync.errors import ReplicaPoisoned, ReplicaRefused
from hubsync.format.manifest import Adapter, Base, Position, Run
from hubsync.format.parts import Transition, write_adapter, write_delta
from hubsync.format.table import TensorSpec, TensorTable
from tests.support.sharded import Meeting
from tests.support.toy import Tensors, nudged, patch_between, position_of

TABLE = TensorTable([TensorSpec(f"m.q_proj.lora_{side}.weight", (4, 8), "BF16") for side in "AB"])
VIEWS: list[Tensors] = [{spec.name: torch.full(spec.shape, 0.5, dtype=torch.bfloat16) for spec in TABLE}]
for seed in range(1, 4):
    VIEWS.append(nudged(VIEWS[-1], seed))
POSITIONS = [position_of(version, view, TABLE) for version, view in enumerate(VIEWS)]
RUN = Run("1" * 32, TABLE, POSITIONS[0].digest, created=time.time(), adapter=Adapter({"r": 4}, Base("me/base")))


class FileLoader:
    """Reads directories, as vLLM would: `loaded` holds the tensors that requests would compute with."""

    def __init__(self) -> None:
        self.loaded: Tensors = {}
        self.fails = False
        self.largest = 8
        self.meanwhile: Callable[[], object] = lambda: None
        self.model = torch.nn.Linear(8, 4, dtype=torch.bfloat16)

    def base(self) -> list[torch.nn.Module]:
        return [self.model]

    def copies(self, number: int) -> Tensors:
        return self.loaded

    def check(self, run: Run) -> None:
        if run.adapter is not None and run.adapter.config["r"] > self.largest:
            raise ReplicaRefused("start the server with --max-lora-rank")

    def load(self, name: str, number: int, path: Path) -> None:
        if self.fails:
            self.fails = False
            raise OSError("no space")
        self.meanwhile()
        assert (path / "adapter_config.json").exists()
        self.loaded = load_file(path / "adapter_model.safetensors")


class Worker:
    def __init__(self, address: str, directory: Path, ranks: Meeting | None = None, rank: int = 0):
        self.loader = FileLoader()
        source = RunSource(address, directory / "cache")
        self.host = AdapterHost(source, self.loader, directory / "adapters", "policy")
        self.served = ServedAdapter(lambda: self.host, ranks.ranks()[rank] if ranks else None)
        self.session = Session(self.served, verify_share=0)  # tests of it say so

    def settled(self) -> dict:
        deadline = time.monotonic() + 60
        while (status := self.session.status())["state"] in ("attaching", "staging"):
            assert time.monotonic() < deadline, status
            time.sleep(0.005)
        return status

    def register(self) -> bool:
        """Load the link's directory, as vLLM does for a client."""

        def load() -> bool:
            self.loader.load("policy", 1, self.host.path)
            return True

        return self.registered(load)

    def registered(self, load: Callable[[], bool]) -> bool:
        """The engine's integration reports it to the session."""
        return self.session.attempt("load the adapter", lambda: self.served.registered(1, load))

    def attached(self) -> Worker:
        self.session.attach()
        assert self.settled()["state"] == "mapped"
        assert self.register()
        return self

    def follow(self, version: int) -> None:
        self.session.stage(POSITIONS[version])
        assert self.settled()["state"] == "staged"
        self.session.commit(POSITIONS[version])

    def assert_serves(self, version: int) -> None:
        status = self.session.status()
        assert (status["version"], status["digest"]) == (version, POSITIONS[version].digest)
        assert all(torch.equal(self.loader.loaded[name], tensor) for name, tensor in VIEWS[version].items())


@pytest.fixture
def address(tmp_path: Path) -> str:
    """A run of three versions after its anchor. The first of them is to be served."""
    place = str(tmp_path / "bucket")
    writer = ChainWriter.create(open_bucket(place, create=True), RUN)
    anchor = tmp_path / "anchor"
    anchor.mkdir()
    write_adapter(anchor, RUN, VIEWS[0])
    writer.commit_anchor(anchor, at=POSITIONS[0])
    for version in range(1, 4):
        patch = patch_between(VIEWS[version - 1], VIEWS[version], TABLE)
        data = write_delta(TABLE, patch, Transition(RUN.run_id, POSITIONS[version - 1], POSITIONS[version]))
        writer.commit_delta([data], digest=POSITIONS[version].digest, changed=sum(map(len, patch.values())))
    writer.serve(1)
    return place


@pytest.fixture
def worker(address: str, tmp_path: Path) -> Worker:
    return Worker(address, tmp_path).attached()


def test_no_version_is_served_before_vllm_has_loaded_one(address: str, tmp_path: Path) -> None:
    worker = Worker(address, tmp_path)
    worker.session.attach()
    status = worker.settled()
    assert (status["state"], status["version"]) == ("mapped", None)
    assert status["adapter"] == {"name": "policy", "path": str(worker.host.path)}
    worker.register()
    worker.assert_serves(1)


def test_status_names_the_adapter_before_the_run_exists(tmp_path: Path) -> None:
    worker = Worker(str(tmp_path / "nowhere"), tmp_path)
    assert worker.session.status()["adapter"]["name"] == "policy"
    worker.session.attach()
    assert worker.settled()["state"] == "refused"


def test_a_run_that_vllm_cannot_load_is_refused_before_any_download(address: str, tmp_path: Path) -> None:
    worker = Worker(address, tmp_path)
    worker.loader.largest = 2
    worker.session.attach()
    status = worker.settled()
    assert (status["state"], status["error"]["type"]) == ("refused", "ReplicaRefused")
    assert "--max-lora-rank" in status["error"]["message"]
    assert not worker.host.directory.exists()


def test_a_run_with_an_old_head_is_refused_if_the_host_limits_its_age(address: str, tmp_path: Path) -> None:
    worker = Worker(address, tmp_path)
    worker.host = replace(worker.host, source=replace(worker.host.source, max_head_age=1e-6))
    worker.session.attach()
    status = worker.settled()
    assert (status["state"], status["error"]["type"]) == ("refused", "HeadTooOld")


def test_every_version_is_loaded_forwards_and_backwards(worker: Worker) -> None:
    for version in (3, 0, 2, 1):
        worker.follow(version)
        worker.assert_serves(version)


def test_undo_loads_the_version_before_the_last_commit(worker: Worker) -> None:
    worker.follow(3)
    worker.session.undo()
    worker.assert_serves(1)


def test_directories_of_old_versions_are_deleted(worker: Worker) -> None:
    for version in (2, 3, 0):
        worker.follow(version)
    left = {path.name[:8] for path in worker.host.directory.iterdir() if path.name != "current"}
    assert left == {"00000000", "00000003"}, "the served version and the one before"


def test_a_version_staged_during_a_commit_can_be_committed_next(worker: Worker) -> None:
    worker.session.stage(POSITIONS[2])
    worker.settled()

    def stage_the_next() -> None:
        worker.loader.meanwhile = lambda: None
        worker.session.stage(POSITIONS[3])
        worker.settled()

    worker.loader.meanwhile = stage_the_next
    worker.session.commit(POSITIONS[2])
    worker.session.commit(POSITIONS[3])
    worker.assert_serves(3)


def test_a_commit_keeps_the_directory_of_a_version_that_is_queued_for_staging(
    worker: Worker, address: str, tmp_path: Path
) -> None:
    other, may_go_on = Worker(address, tmp_path).attached(), threading.Event()
    worker.session.stage(POSITIONS[2])
    worker.settled()
    worker.session._background.submit(may_go_on.wait)
    worker.session.stage(POSITIONS[3])
    other.session.stage(POSITIONS[3])
    other.settled()
    worker.session.commit(POSITIONS[2])
    other.session.commit(POSITIONS[3])
    other.assert_serves(3)
    may_go_on.set()


def test_a_version_that_is_not_staged_is_not_loaded(worker: Worker) -> None:
    with pytest.raises(ReplicaRefused, match="not staged"):
        worker.session.commit(POSITIONS[2])
    with pytest.raises(ReplicaRefused, match="not staged"):
        worker.session.commit(Position(2, "0" * 32))
    worker.assert_serves(1)


def test_a_failed_load_keeps_the_served_version(worker: Worker) -> None:
    worker.session.stage(POSITIONS[2])
    worker.settled()
    worker.loader.fails = True
    with pytest.raises(ReplicaRefused, match=r"^could not load the adapter of version 2 .*: OSError: no space$"):
        worker.session.commit(POSITIONS[2])
    worker.session.before_forward()
    worker.assert_serves(1)


def test_staging_again_rewrites_a_version_that_failed_to_load(worker: Worker) -> None:
    worker.session.stage(POSITIONS[2])
    worker.settled()
    (staged,) = worker.host.directory.glob("00000002-*")
    (staged / "adapter_model.safetensors").write_bytes(b"the disk was full")
    with pytest.raises(ReplicaRefused):
        worker.session.commit(POSITIONS[2])
    worker.follow(2)
    worker.assert_serves(2)


def drop(worker: Worker) -> None:
    """The engine loses the adapter, as when it sleeps at level 2."""
    with worker.session.weights_changing("the server slept at level 2"):
        worker.loader.loaded = {}
    poisoned(worker)


def poisoned(worker: Worker) -> str:
    """Why, once it is."""
    deadline = time.monotonic() + 30
    while worker.session.state != "poisoned":
        assert time.monotonic() < deadline, worker.session.status()
        time.sleep(0.005)
    return worker.session.status()["error"]["message"]


def test_a_dropped_adapter_is_loaded_before_the_next_forward_pass_or_that_pass_fails(
    worker: Worker,
) -> None:
    drop(worker)
    worker.loader.fails = True
    with pytest.raises(ReplicaPoisoned, match="has dropped"):
        worker.session.before_forward()
    worker.session.before_forward()
    worker.assert_serves(1)


def test_a_failed_registration_is_reported_in_the_status_and_can_be_retried(address: str, tmp_path: Path) -> None:
    worker = Worker(address, tmp_path)
    worker.session.attach()
    worker.settled()
    worker.loader.fails = True
    assert not worker.register()
    assert worker.session.status()["state"] == "refused"
    worker.attached().assert_serves(1)


def test_an_adapter_that_vllm_rejects_is_not_served(address: str, tmp_path: Path) -> None:
    worker = Worker(address, tmp_path)
    worker.session.attach()
    worker.settled()
    assert not worker.registered(lambda: False)
    assert "did not take it" in worker.session.status()["error"]["message"]


def test_position_is_kept_when_reloading_the_served_version_fails(worker: Worker) -> None:
    drop(worker)
    worker.loader.fails = True
    with pytest.raises(ReplicaRefused, match="no space"):
        worker.session.commit(POSITIONS[1])
    drop(worker)
    worker.session.before_forward()
    worker.assert_serves(1)


def test_another_engine_of_the_server_may_move_the_link_during_a_commit(worker: Worker) -> None:
    served = worker.host.path.resolve()
    worker.loader.meanwhile = lambda: _point(worker.host.path, served)
    worker.follow(2)
    worker.assert_serves(2)


def test_after_a_failed_registration_nothing_is_loaded_and_forward_passes_go_on(worker: Worker) -> None:
    """vLLM has dropped the old adapter, so a commit or waking up has nothing to replace."""
    worker.follow(3)
    worker.session.stage(POSITIONS[2])
    worker.settled()
    drop(worker)
    worker.loader.fails = True
    assert not worker.register()
    worker.session.before_forward()
    with pytest.raises(ReplicaRefused, match="not staged"):
        worker.session.commit(POSITIONS[2])
    assert not worker.register(), "the link may point elsewhere: attach first"
    worker.attached().assert_serves(1)
    with pytest.raises(ReplicaRefused, match="nothing to undo"):
        worker.session.undo()
    worker.follow(2)
    worker.assert_serves(2)


def test_all_ranks_load_a_version_or_none_does(address: str, tmp_path: Path) -> None:
    meeting = Meeting(2)
    workers = [Worker(address, tmp_path, meeting, rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(Worker.attached, workers))
        for worker in workers:
            worker.session.stage(POSITIONS[3])
            worker.settled()
        workers[1].loader.fails = True
        refused = [threads.submit(worker.session.commit, POSITIONS[3]) for worker in workers]
        assert all(isinstance(outcome.exception(), ReplicaRefused) for outcome in refused)
        for worker in workers:
            worker.assert_serves(1)
            worker.session.stage(POSITIONS[3])
            worker.settled()
        list(threads.map(lambda worker: worker.session.commit(POSITIONS[3]), workers))
    for worker in workers:
        worker.assert_serves(3)


def test_a_registration_that_fails_on_one_rank_fails_on_all(address: str, tmp_path: Path) -> None:
    """Otherwise they could not attach again: one would serve and stay, the other would go to another version."""
    meeting = Meeting(2)
    workers = [Worker(address, tmp_path, meeting, rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        for worker in workers:
            worker.session.attach()
            worker.settled()
        workers[1].loader.fails = True
        assert list(threads.map(Worker.register, workers)) == [False, False]
        assert [worker.session.status()["error"]["message"] for worker in workers] == ["OSError: no space"] * 2
        ChainWriter.resume(open_bucket(address), TABLE).serve(3)
        list(threads.map(Worker.attached, workers))
    for worker in workers:
        worker.assert_serves(3)


# --- verified again: the engine's copies, and the base model


@pytest.fixture
def watched(address: str, tmp_path: Path) -> Worker:
    """It looks again nearly all the time, so that tests are short."""
    worker = Worker(address, tmp_path)
    worker.session = Session(worker.served, verify_share=0.9)
    return worker.attached()


def test_a_copy_that_something_has_changed_is_found_named_and_loaded_again(watched: Worker) -> None:
    watched.follow(2)
    name = TABLE[1].name
    watched.loader.loaded[name].view(torch.int16)[0, 0] ^= 1
    assert name in poisoned(watched)
    watched.session.before_forward()
    watched.assert_serves(2)
    assert name in watched.session.status()["verification"]["healed"]


def test_the_frozen_base_is_verified_and_no_forward_pass_runs_on_another(watched: Worker) -> None:
    with torch.no_grad():
        watched.loader.model.weight.view(torch.int16)[3, 7] ^= 1
    assert "has changed in memory: weight differs" in poisoned(watched)
    with pytest.raises(ReplicaPoisoned, match=r"the base model .* \(weight differs\), .* Restart this server"):
        watched.session.before_forward()


def test_right_adapters_are_not_loaded_again_after_the_server_slept(worker: Worker) -> None:
    worker.loader.fails = True  # so it would be noticed
    with worker.session.weights_changing("the server slept at level 1"):
        pass
    worker.session.before_forward()
    worker.assert_serves(1)
    status = worker.session.status()
    assert (status["state"], status["metrics"].get("heals")) == ("ready", None)


def test_a_copy_that_is_being_made_is_looked_at_again(worker: Worker) -> None:
    right, looks = worker.loader.loaded, iter([RuntimeError, KeyError, None])

    def copies(number: int) -> Tensors:
        if error := next(looks):
            raise error("dictionary changed size during iteration")
        return right

    worker.loader.copies = copies  # type: ignore[method-assign]
    worker.session.verify()
    deadline = time.monotonic() + 30
    while worker.session.verification.answered < 1:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert worker.session.state == "ready"


def test_an_adapter_that_is_just_being_loaded_is_no_deviation(worker: Worker) -> None:
    looks: list[bool] = []

    def look() -> None:
        worker.loader.meanwhile = lambda: None
        worker.loader.loaded = {}  # as an engine may have it for a moment
        looks.append(worker.served.verify())

    worker.session.stage(POSITIONS[2])
    worker.settled()
    worker.loader.meanwhile = look
    worker.session.commit(POSITIONS[2])
    assert looks == [False]
    worker.assert_serves(2)


def test_workers_may_move_the_link_at_the_same_time(tmp_path: Path) -> None:
    (tmp_path / "version").mkdir()

    def move(_: int) -> None:
        for _ in range(2000):
            _point(tmp_path / "current", tmp_path / "version")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(move, range(2)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "version"]


@pytest.mark.server  # no server, but half of vLLM is imported
def test_vllm_reads_written_adapters_and_rejects_a_higher_rank(tmp_path: Path) -> None:
    """Tests vLLM's reader of adapter files. Serving them needs a server."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    view = {f"base_model.model.{name}": tensor for name, tensor in VIEWS[1].items()}
    table = TensorTable([TensorSpec(f"base_model.model.{spec.name}", spec.shape, spec.dtype) for spec in TABLE])
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    write_adapter(tmp_path, Run("1" * 32, table, "0" * 32, adapter=Adapter(config, Base())), view)
    helper = PEFTHelper.from_local_dir(str(tmp_path), None)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    loaded = LoRAModel.from_local_checkpoint(
        str(tmp_path), {"q_proj"}, helper, lora_model_id=1, device="cpu", dtype=torch.bfloat16
    )
    layer = loaded.get_lora("m.q_proj")
    assert layer is not None
    assert torch.equal(layer.lora_a, view["base_model.model.m.q_proj.lora_A.weight"])
    with pytest.raises(ValueError, match="max_lora_rank"):
        PEFTHelper.from_dict({**config, "r": 16}).validate_legal(LoRAConfig(max_lora_rank=8))


@pytest.mark.server  # no server, but half of vLLM is imported
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}])
def test_vllm_scales_an_adapter_as_peft_does(settings: dict[str, Any], tmp_path: Path) -> None:
    """The scale is in no tensor: it follows from the published settings."""
    from vllm.lora.peft_helper import PEFTHelper

    from hubsync.publish.view.adapters import adapter_config
    from tests.support.adapted import adapted, save_base

    model = adapted(save_base(tmp_path), **settings)
    helper = PEFTHelper.from_dict(adapter_config(model))
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert layers
    for name, layer in layers.items():
        served = helper.get_rank_and_scaling(name.removeprefix("base_model.model."))
        assert served == (layer.r["default"], pytest.approx(layer.scaling["default"]))
