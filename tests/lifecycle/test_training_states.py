"""Training states across ranks: complete or invisible, restorable, and visible with their version only."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import set_state_dict

from hubsync import DeltaWeightTransferEngine, SyncConfig, WeightSyncer
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.errors import BucketUnavailable, CheckpointFailed, ConfigError
from hubsync.lifecycle.checkpoint_coordinator import CheckpointCoordinator
from hubsync.lifecycle.training_states import state_of
from hubsync.replicas.deployment import Deployment
from tests.support.standin import StandIn
from tests.support.training import Net, run, spread, train, whole_view

pytestmark = pytest.mark.slow


def states(address: str) -> Path:
    return Path(f"{address}-states")


def session(how: str, address: str, **options: Any) -> tuple[Any, Any, WeightSyncer]:
    model = spread(how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = SyncConfig(bucket=address, base_model="net")
    return model, optimizer, WeightSyncer(model, optimizer, config, dcp_directory=states(address), **options)


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, directory: Path, **options: Any) -> None:
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=directory, **options)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def saves_and_restores(rank: int, address: str, how: str) -> list[dict[str, torch.Tensor]]:
    model, optimizer, syncer = session(how, address)
    with syncer:
        train(model, optimizer, 1)
        assert syncer.save_dcp("step-1")
        saved = whole_view(model)
        train(model, optimizer, 2)
        again = spread(how)
        its_optimizer = torch.optim.AdamW(again.parameters(), lr=7.0)
        restore(again, its_optimizer, states(address) / "step-1")
        train(again, its_optimizer, 2)
        return [saved, whole_view(model), whole_view(again)]


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_training_resumes_exactly_with_several_ranks_or_one(how: str, tmp_path: Path) -> None:
    (saved, trained, restored), _ = run(2, saves_and_restores, tmp_path / "run", how)
    assert all(torch.equal(restored[name], tensor) for name, tensor in trained.items())
    assert [path.name for path in states(str(tmp_path / "run")).iterdir()] == ["step-1"]
    alone = Net()
    restore(alone, torch.optim.AdamW(alone.parameters()), states(str(tmp_path / "run")) / "step-1", no_dist=True)
    assert all(torch.equal(saved[name], alone.state_dict()[name].bfloat16()) for name in saved)


def fails_to_save(rank: int, address: str, how: str) -> list[Any]:
    """What two calls of `save_dcp` return or raise, the reasons in the log, and the version that is served."""
    model, optimizer, syncer = session("fsdp2", address, dcp_timeout=2.0 if how == "hangs" else 60.0)
    log = Log()
    logging.getLogger("hubsync").addHandler(log)
    train(model, optimizer, 1)
    write, save = FileSystemWriter.write_data, dcp.save
    if rank == 1 and how == "disk":
        FileSystemWriter.write_data = lambda *_: _full_disk()  # type: ignore[method-assign]
    if rank == 1 and how == "hangs":
        dcp.save = lambda *args, **options: (time.sleep(6), save(*args, **options))
    if rank == 1 and how == "dies":
        FileSystemWriter.write_data = lambda *_: os._exit(3)  # type: ignore[method-assign]
    if how == "version" and rank == 1:
        LocalBucket.put = _full_bucket  # type: ignore[method-assign]
    saved = []
    for name in ("a", "b"):
        saved.append(syncer.save_dcp(name))
        FileSystemWriter.write_data, LocalBucket.put = write, put  # type: ignore[method-assign]
        if how == "dies":
            break
    return [saved, log.messages]


put = LocalBucket.put


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _full_disk() -> None:
    raise OSError("disk full")


def _full_bucket(*_: Any) -> None:
    raise BucketUnavailable("bucket full")


def shown(address: Path) -> list[str]:
    return [path.name for path in states(str(address)).iterdir() if not path.name.startswith(".")]


def test_a_state_that_one_rank_cannot_write_stays_hidden_and_the_next_one_appears(tmp_path: Path) -> None:
    for saved, messages in run(2, fails_to_save, tmp_path / "run", "disk"):
        assert saved == [False, True]
        assert "disk full" in messages[0]
    assert [path.name for path in states(str(tmp_path / "run")).iterdir()] == ["b"]


def test_a_state_stays_hidden_while_one_rank_cannot_publish_its_part_of_the_version(tmp_path: Path) -> None:
    for saved, messages in run(2, fails_to_save, tmp_path / "run", "version"):
        assert saved == [False, True]
        assert any("bucket full" in message for message in messages)
    assert [path.name for path in states(str(tmp_path / "run")).iterdir()] == ["b"]
    reader = ChainReader(LocalBucket(str(tmp_path / "run")), tmp_path / "cache")
    assert (reader.newest().version, reader.served().version) == (1, 0)


def test_a_hanging_rank_delays_the_others_at_most_by_the_timeout(tmp_path: Path) -> None:
    for saved, messages in run(2, fails_to_save, tmp_path / "run", "hangs"):
        assert saved == [False, False]
        assert "not written in 2 s" in messages[0]
        assert "the previous state is still being written, although its time is over" in messages[1]
    assert not shown(tmp_path / "run")


def test_a_rank_killed_between_version_and_state_leaves_the_step_invisible(tmp_path: Path) -> None:
    (saved, messages), exit_code = run(2, fails_to_save, tmp_path / "run", "dies")
    assert exit_code == 3
    assert saved == [False]
    assert messages
    assert not shown(tmp_path / "run")
    reader = ChainReader(LocalBucket(str(tmp_path / "run")), tmp_path / "cache")
    assert reader.served().version == 0


def hot_loads(rank: int, address: str, url: str) -> list[Any]:
    model = spread("fsdp2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config, deployment = SyncConfig(bucket=address, base_model="net"), Deployment([url]) if rank == 0 else None
    with WeightSyncer(model, optimizer, config, deployment, dcp_directory=states(address)) as syncer:
        said: list[Any] = [syncer.wait_for_hotload_ready(60)]
        for step in (1, 2):
            train(model, optimizer, step)
            said.append(syncer.save_and_hotload(f"step-{step}"))
        said += [syncer.hotload(said[1]), syncer.check_deployment_state(), syncer.hotload("nobody-saved-this")]
        try:
            syncer.save_only("../a")
        except ConfigError as error:
            said.append(str(error))
        return said


def test_all_ranks_share_a_session_and_one_rank_contacts_the_servers(tmp_path: Path) -> None:
    with StandIn() as server:
        first, second = run(2, hot_loads, tmp_path / "run", server.url)
        assert first == second
        ready, one, two, loaded, state, unknown, refused = first
        assert (ready, loaded, unknown) == (True, True, False)
        assert one != two
        assert state == one
        assert "is not a name" in refused
        assert server.position.version == 1
        assert server.attached == 1


# --- weights and state of a step


def together(rank: int, address: str, fails: bool) -> tuple[list[str], str | None]:
    """The example of docs/sampler.md. Rank 0 alone runs the commit, which writes the latest step into a file."""
    model = spread("fsdp2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    latest, said = Path(f"{address}-latest"), []

    def commit(step: int, is_state_dict: bool) -> None:
        latest.write_text(f"step-{step}")

    with (
        WeightSyncer(model, optimizer, SyncConfig(bucket=address), dcp_directory=states(address)) as syncer,
        CheckpointCoordinator(commit) as coordinator,
    ):
        for step in (1, 2):
            train(model, optimizer, step)
            if fails and step == 2 and rank == 1:
                FileSystemWriter.write_data = lambda *_: _full_disk()  # type: ignore[method-assign]
            ticket = syncer.engine.publish(step, serve=False)
            coordinator.save_async("weights", ticket.result, step, is_state_dict=True)
            try:
                coordinator.save_sync(lambda step=step: require(syncer.save_dcp(f"step-{step}")), step)  # type: ignore[misc]
            except CheckpointFailed:
                pass
            coordinator.register_and_monitor(step, state_dict_thread_count=1, checkpoint_thread_count=1)
            try:
                coordinator.wait_all()
            except CheckpointFailed:
                pass
            join_all = syncer.engine.ranks.gather(latest.read_text)
            said.append(join_all[0])
            if said[-1] == f"step-{step}":
                syncer.engine.serve(ticket.result().version)
    return said, None


def require(saved: bool) -> None:
    if not saved:
        raise CheckpointFailed("the state was not saved: see the log")


@pytest.mark.parametrize("fails", [False, True])
def test_weights_and_state_of_a_step_become_visible_together(fails: bool, tmp_path: Path) -> None:
    first, second = run(2, together, tmp_path / "run", fails)
    assert first == second == (["step-1", "step-1" if fails else "step-2"], None)
    reader = ChainReader(LocalBucket(str(tmp_path / "run")), tmp_path / "cache")
    assert (reader.newest().version, reader.served().version) == (2, 1 if fails else 2)
    assert states(str(tmp_path / "run")).joinpath("step-2").exists() is not fails


def test_one_process_has_an_engine_and_a_coordinator_too(tmp_path: Path) -> None:
    visible: list[int] = []
    model = Net()
    with (
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket=str(tmp_path / "run"))) as engine,
        CheckpointCoordinator(lambda step, _: visible.append(engine.serve(step).version)) as coordinator,
    ):
        with torch.no_grad():
            model.embed.weight.add_(1.0)
        ticket = engine.publish(1, serve=False)
        coordinator.save_async("weights", ticket.result, 1, is_state_dict=True)
        coordinator.register_and_monitor(1, is_state_dict=True, state_dict_thread_count=1)
    assert visible == [1]
