"""Named snapshots: saving, hot-loading, lookup. The servers are stand-ins; the runs are real."""

from __future__ import annotations

import copy
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from hubsync import SyncConfig, WeightSyncer
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.cli.main import main
from hubsync.errors import BucketUnavailable, ConfigError, ReplicaRefused, ReplicaUnreachable, RunMismatch
from hubsync.format.manifest import Manifest, Position
from hubsync.lifecycle.training_states import state_of
from hubsync.replicas.deployment import Deployment
from tests.support.standin import StandIn
from tests.support.tiny import Tiny, train


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def optimizer(model: Tiny) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.fixture
def servers() -> Iterator[list[StandIn]]:
    with ExitStack() as stack:
        yield [stack.enter_context(StandIn()) for _ in range(2)]


Syncers = Callable[..., WeightSyncer]


@pytest.fixture
def new_syncer(
    model: Tiny, optimizer: torch.optim.Optimizer, servers: list[StandIn], tmp_path: Path
) -> Iterator[Syncers]:
    """`new_syncer(**options)`: a session of the same run, on the two servers."""
    with ExitStack() as stack:

        def make(**options: Any) -> WeightSyncer:
            config = SyncConfig(bucket=str(tmp_path / "bucket"), base_model="tiny")
            deployment = Deployment([server.url for server in servers])
            options = {"dcp_directory": tmp_path / "dcp", "warmup_max_retries": 0, **options}
            return stack.enter_context(WeightSyncer(model, optimizer, config, deployment, **options))

        yield make


@pytest.fixture
def syncer(new_syncer: Syncers, servers: list[StandIn]) -> WeightSyncer:
    """A session whose servers were started with version 0."""
    made = new_syncer()
    for server in servers:
        server.base = made.engine.position
        server.positions = [[server.base]]
    return made


def manifests(tmp_path: Path) -> list[Manifest]:
    return ChainReader(LocalBucket(tmp_path / "bucket"), tmp_path / "cache").manifests()


def positions(servers: list[StandIn]) -> list[Position]:
    return [server.position for server in servers]


# --- saving and hot-loading


def test_the_first_snapshot_of_a_session_is_full_and_the_next_are_deltas(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, servers: list[StandIn], tmp_path: Path
) -> None:
    names = []
    for step in range(3):
        train(model, optimizer)
        names.append(syncer.save_and_hotload(f"step-{step}"))
        assert positions(servers) == [syncer.engine.position] * 2
    kinds = [(manifest.kind, manifest.name) for manifest in manifests(tmp_path)]
    assert kinds == [("delta", names[0]), ("anchor", names[0]), ("delta", names[1]), ("delta", names[2])]
    assert names == [f"step-{step}-{syncer.session}" for step in range(3)]


def test_the_type_of_a_snapshot_can_be_chosen(
    new_syncer: Syncers, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    syncer = new_syncer(first_checkpoint_type="delta")
    for name, kind in (("a", None), ("b", "base"), ("c", None)):
        train(model, optimizer)
        syncer.save_only(name, kind)
    assert [manifest.kind for manifest in manifests(tmp_path)] == ["delta", "delta", "anchor", "delta"]


def test_the_compression_format_sets_the_delta_encoding(
    new_syncer: Syncers, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    syncer = new_syncer(first_checkpoint_type="delta", compression_format="compact")
    train(model, optimizer)
    syncer.save_only("a")
    assert [manifest.encoding for manifest in manifests(tmp_path)] == ["compact"]


def test_save_only_does_not_push_and_can_be_hot_loaded_later(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, servers: list[StandIn]
) -> None:
    before, names, saved = positions(servers), [], []
    for name in ("a", "b"):
        train(model, optimizer)
        names.append(syncer.save_only(name))
        saved.append(syncer.engine.position)
    assert positions(servers) == before
    for index in (1, 0, 1):  # forward, back, forward
        assert syncer.hotload(str(names[index]))
        assert positions(servers) == [saved[index]] * 2


def test_followers_stay_until_the_saved_snapshot_is_hot_loaded(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    reader = ChainReader(LocalBucket(tmp_path / "bucket"), tmp_path / "cache")
    train(model, optimizer)
    syncer.save_and_hotload("served")
    served = syncer.engine.position
    train(model, optimizer)
    name = syncer.save_only("saved")
    assert reader.served() == served != reader.newest()
    assert syncer.hotload(str(name))
    assert reader.served() == reader.newest()
    assert syncer.hotload(f"served-{syncer.session}")
    assert reader.served() == served


def test_a_snapshot_of_another_session_is_found_by_its_full_name(
    syncer: WeightSyncer, new_syncer: Syncers, model: Tiny, optimizer: torch.optim.Optimizer, servers: list[StandIn]
) -> None:
    train(model, optimizer)
    name, saved = syncer.save_only("a"), syncer.engine.position
    assert name is not None
    train(model, optimizer)
    other = new_syncer()
    assert other.session != syncer.session
    assert other.hotload(name)
    assert positions(servers) == [saved] * 2


def test_a_name_is_unique_within_a_session_only(
    syncer: WeightSyncer, new_syncer: Syncers, model: Tiny, optimizer: torch.optim.Optimizer
) -> None:
    syncer.save_only("a")
    with pytest.raises(ConfigError, match="saved a already"):
        syncer.save_only("a")
    assert new_syncer().save_only("a") is not None
    for name in ("", "..", "../a", "a/b", "a b", "a\n", "été", "\u202ea", "x" * 10_000, None, 7):
        with pytest.raises(ConfigError, match="is not a name"):
            syncer.save_only(name)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="is not a name"):
            syncer.save_dcp(name)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="checkpoint_type"):
        syncer.save_only("c", "whole")


def test_unknown_and_expired_names_are_not_hot_loaded(syncer: WeightSyncer, caplog: pytest.LogCaptureFixture) -> None:
    assert not syncer.hotload("nobody-saved-this")
    assert "no snapshot nobody-saved-this" in caplog.text
    name = syncer.save_only("a", ttl=0.0)
    assert not syncer.hotload(str(name))
    assert f"{name} has expired" in caplog.text
    assert syncer.hotload(str(syncer.save_only("b", ttl=1000.0)))


def test_an_expired_snapshot_is_deleted_unless_others_need_it(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    def gc() -> list[int]:
        assert main(["gc", str(tmp_path / "bucket"), "--keep-last", "9", "--grace", "0s"]) == 0
        return [manifest.version for manifest in manifests(tmp_path) if manifest.kind == "delta"]

    for name, kind, ttl in [("a", "base", None), ("b", "delta", 0.0), ("c", "delta", None), ("d", "base", None)]:
        train(model, optimizer)
        syncer.save_only(name, kind, ttl)
        assert gc() == [manifest.version for manifest in manifests(tmp_path) if manifest.kind == "delta"], "needed"
    train(model, optimizer)
    name = syncer.save_only("e", "delta", ttl=0.0)
    train(model, optimizer)
    syncer.save_and_hotload("f", "base")
    assert gc() == [1, 2, 3, 4, 6], "3 is reached through 2, 6 has an anchor"
    assert not syncer.hotload(str(name))


def test_every_session_knows_for_how_long_a_name_can_be_hot_loaded(
    syncer: WeightSyncer, new_syncer: Syncers, model: Tiny, optimizer: torch.optim.Optimizer
) -> None:
    train(model, optimizer)
    over = syncer.save_only("over", "base", ttl=0.0)
    train(model, optimizer)
    good = syncer.save_only("good", "base", ttl=1000.0)
    other = new_syncer()
    assert not other.hotload(str(over))
    assert other.hotload(str(good))


def test_a_second_name_of_an_expiring_version_gives_a_warning(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, caplog: pytest.LogCaptureFixture
) -> None:
    train(model, optimizer)
    first, second = syncer.save_only("a", ttl=10.0), syncer.save_only("b")
    assert f"{second} is the same version as {first}, and expires with it" in caplog.text


@pytest.mark.parametrize("ttl", [-1.0, float("nan"), float("inf"), "1h", True])
def test_an_invalid_time_to_live_is_refused(syncer: WeightSyncer, ttl: Any) -> None:
    with pytest.raises(ConfigError, match="ttl"):
        syncer.save_only("a", ttl=ttl)


# --- failures


def test_a_failed_save_returns_none_and_the_next_one_holds_its_changes(
    syncer: WeightSyncer,
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    monkeypatch: pytest.MonkeyPatch,
    servers: list[StandIn],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BucketUnavailable("injected")

    train(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(syncer.engine, "publish", fail)
        assert syncer.save_only("a") is None
        with pytest.raises(BucketUnavailable):
            syncer.save_and_hotload("a")
    syncer.save_and_hotload("a")
    assert syncer.engine.publish().result().changed == 0
    assert positions(servers) == [syncer.engine.position] * 2


def test_a_failed_hotload_can_be_retried_with_the_same_snapshot(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, servers: list[StandIn]
) -> None:
    train(model, optimizer)
    servers[0].stop()
    with pytest.raises(ReplicaUnreachable):
        syncer.save_and_hotload("a")
    name = f"a-{syncer.session}"
    assert not syncer.hotload(name)
    servers[0].start()
    assert syncer.hotload(name)
    assert positions(servers) == [syncer.engine.position] * 2


def test_a_server_without_a_path_to_the_delta_gets_the_full_model(
    new_syncer: Syncers, model: Tiny, optimizer: torch.optim.Optimizer, servers: list[StandIn], tmp_path: Path
) -> None:
    def no_base(call: str, before: bool) -> None:
        if call == "hubsync_stage":
            ChainReader(LocalBucket(tmp_path / "bucket"), tmp_path / "cache").plan(None)

    servers[0].fault = no_base
    train(model, optimizer)
    syncer = new_syncer(first_checkpoint_type="delta")
    train(model, optimizer)
    name = syncer.save_and_hotload("a")
    assert [(manifest.kind, manifest.name) for manifest in manifests(tmp_path)] == [("delta", name), ("anchor", name)]


def test_a_snapshot_missing_from_the_run_is_refused_before_any_server_request(
    syncer: WeightSyncer,
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    servers: list[StandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(model, optimizer)
    saved = syncer.engine.publish().result().position
    monkeypatch.setattr(syncer, "_publish", lambda name, serve, ttl: Position(saved.version, "0" * 32))
    with pytest.raises(RunMismatch, match="another trainer"):
        syncer.save_and_hotload("a", "delta")
    assert servers[0].calls == []


def test_a_hotload_ends_with_a_retried_warm_up(
    new_syncer: Syncers, servers: list[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    syncer = new_syncer(warmup_max_retries=1)
    servers[0].cold = 1
    syncer.save_and_hotload("a")
    assert [server.generated for server in servers] == [1, 1]
    servers[0].cold = 2
    with pytest.raises(ReplicaRefused, match="not yet"):
        syncer.save_and_hotload("b")
    new_syncer(warmup_after_hotload=False).save_and_hotload("a")
    assert servers[1].generated == 2


@pytest.mark.parametrize("name", [None, []])
def test_an_unsaved_snapshot_is_not_hot_loaded(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, servers: list[StandIn], name: Any
) -> None:
    """None is the result of a failed `save_only`, and the name of an unnamed version."""
    before = positions(servers)
    train(model, optimizer)
    syncer.engine.publish(serve=False).result()
    assert not syncer.hotload(name)
    assert positions(servers) == before


def test_a_full_disk_in_save_only_does_not_end_the_training(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
        assert syncer.save_only("a") is None
    assert syncer.hotload(str(syncer.save_only("a")))
    assert [manifest.kind for manifest in manifests(tmp_path)] == ["delta", "anchor"]


def test_the_first_error_is_the_one_raised(syncer: WeightSyncer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BucketUnavailable("injected")

    monkeypatch.setattr(syncer.engine._publisher, "wait", fail)
    with pytest.raises(KeyError, match="the user's own"), syncer:
        raise KeyError("the user's own")
    with pytest.raises(ConfigError, match="closed"):
        syncer.save_only("a")


def test_a_session_that_cannot_begin_leaves_the_optimizer_unchanged(
    new_syncer: Syncers, optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no temporary directory")

    monkeypatch.setattr("hubsync.lifecycle.weight_syncer.tempfile.TemporaryDirectory", fail)
    with pytest.raises(OSError, match="no temporary directory"):
        new_syncer()
    assert "step" not in vars(optimizer)


# --- the deployment


def test_deployment_state_is_the_snapshot_served_by_all_servers(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, servers: list[StandIn], new_syncer: Syncers
) -> None:
    assert syncer.wait_for_hotload_ready()
    assert syncer.check_deployment_state() is None  # version 0 is not a saved snapshot
    train(model, optimizer)
    name = syncer.save_and_hotload("a")
    assert syncer.check_deployment_state() == name
    assert new_syncer().check_deployment_state() == name
    servers[0].stop()
    assert syncer.check_deployment_state() is None


def test_waiting_for_the_deployment_returns_whether_it_is_ready(syncer: WeightSyncer, servers: list[StandIn]) -> None:
    servers[0].stop()
    assert not syncer.wait_for_hotload_ready(timeout_s=0.1, poll_interval_s=0.05)
    servers[0].start()
    assert syncer.wait_for_hotload_ready(timeout_s=60, poll_interval_s=0.05)
    servers[0].mismatch = "its weights are of no version of this run"
    servers[0].state = "detached"
    assert not syncer.wait_for_hotload_ready(timeout_s=0.1, poll_interval_s=0.05)


def test_waits_for_servers_state_what_they_wait_for(
    syncer: WeightSyncer,
    servers: list[StandIn],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("hubsync.retry.REPORT_SECONDS", 0.01)
    servers[0].stop()
    assert not syncer.wait_for_hotload_ready(timeout_s=0.2, poll_interval_s=0.05)
    assert f"{servers[0].url} is left behind: cannot connect" in caplog.text
    assert "still waiting for the servers to be ready for a hot-load, 0 s left" in caplog.text
    servers[0].start()
    servers[0].stuck.clear()
    waiting = threading.Thread(target=syncer.save_and_hotload, args=("a",))
    waiting.start()
    while "still waiting for 2 servers to stage" not in caplog.text:
        time.sleep(0.01)
    servers[0].stuck.set()
    waiting.join()


def test_a_session_without_a_deployment_saves_for_followers(
    model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    with WeightSyncer(model, optimizer, SyncConfig(bucket=str(tmp_path / "bucket"))) as syncer:
        assert syncer.wait_for_hotload_ready()
        train(model, optimizer)
        assert syncer.save_and_hotload("a") == f"a-{syncer.session}"
    with pytest.raises(ConfigError, match=r"Deployment\(\[url, ...\]\) or None"):
        WeightSyncer(model, optimizer, SyncConfig(bucket=str(tmp_path / "other")), ["http://one"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leave SyncConfig"):
        WeightSyncer(model, optimizer, SyncConfig(bucket=str(tmp_path / "other"), servers=["http://one"]))


@pytest.mark.parametrize("leave_serving", [True, False])
def test_the_end_of_a_session_leaves_the_servers_serving_by_default(
    syncer: WeightSyncer, servers: list[StandIn], leave_serving: bool
) -> None:
    syncer.hotload(str(syncer.save_only("a")))
    syncer.close(leave_serving=leave_serving)
    syncer.close()
    assert [server.paused for server in servers] == [not leave_serving] * 2
    for call in (
        lambda: syncer.save_and_hotload("b"),
        lambda: syncer.save_only("b"),
        lambda: syncer.hotload(f"a-{syncer.session}"),
        lambda: syncer.save_dcp("b"),
        syncer.check_deployment_state,
        syncer.wait_for_hotload_ready,
    ):
        with pytest.raises(ConfigError, match="closed"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"hotload_timeout": 0},
        {"hotload_timeout": float("nan")},
        {"dcp_timeout": float("inf")},
        {"dcp_timeout": "1h"},
        {"warmup_max_retries": -1},
        {"warmup_max_retries": 1.5},
        {"first_checkpoint_type": "whole"},
        {"compression_format": "zip"},
    ],
)
def test_invalid_settings_are_refused(new_syncer: Syncers, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"timeout|warmup_max_retries|checkpoint_type|encoding"):
        new_syncer(**options)
    assert not (tmp_path / "bucket").exists()


def test_a_printed_config_hides_the_token() -> None:
    assert "hf_secret" not in repr(SyncConfig(bucket="/runs/a", token="hf_secret"))


# --- training state


def test_saving_a_state_before_the_first_step_does_not_change_the_training(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    untouched = copy.deepcopy(model)
    assert syncer.save_dcp("start")
    assert syncer.engine.steps == 0
    restored = Tiny()
    restored_optimizer = torch.optim.AdamW(restored.parameters(), lr=1e-3)
    state = state_of(restored, restored_optimizer)
    dcp.load(state, checkpoint_id=tmp_path / "dcp" / "start", no_dist=True)
    set_state_dict(restored, restored_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    fresh = torch.optim.AdamW(untouched.parameters(), lr=1e-3)
    for trained, its_optimizer in ((model, optimizer), (restored, restored_optimizer), (untouched, fresh)):
        torch.manual_seed(1)
        train(trained, its_optimizer)
    for name, tensor in untouched.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
        assert torch.equal(tensor, restored.state_dict()[name]), name


def test_a_state_is_replaced_by_a_newer_one_of_its_name(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    for _ in range(2):
        train(model, optimizer)
        assert syncer.save_dcp("latest")
    state = state_of(Tiny(), None)
    dcp.load(state, checkpoint_id=tmp_path / "dcp" / "latest", no_dist=True)
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert [path.name for path in (tmp_path / "dcp").iterdir()] == ["latest"]


def test_training_resumes_exactly_from_a_saved_state(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    train(model, optimizer, steps=2)
    assert syncer.save_dcp("step-2")
    restored = Tiny()
    restored_optimizer = torch.optim.AdamW(restored.parameters(), lr=1.0)
    weights, moments = get_state_dict(restored, restored_optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=tmp_path / "dcp" / "step-2", no_dist=True)
    set_state_dict(restored, restored_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for trained, its_optimizer in ((model, optimizer), (restored, restored_optimizer)):
        torch.manual_seed(1)
        train(trained, its_optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name


def test_a_state_that_takes_too_long_or_fails_never_looks_complete(
    new_syncer: Syncers, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, optimizer)
    syncer, save = new_syncer(dcp_timeout=0.05), dcp.save
    monkeypatch.setattr(dcp, "save", lambda *args, **kwargs: (time.sleep(0.2), save(*args, **kwargs)))
    assert not syncer.save_dcp("slow")
    monkeypatch.setattr(dcp, "save", lambda *args, **kwargs: 1 / 0)
    assert not new_syncer().save_dcp("broken")
    deadline = time.monotonic() + 60
    while any((tmp_path / "dcp").iterdir()):
        assert time.monotonic() < deadline, "the incomplete state is not deleted"
        time.sleep(0.01)


def test_a_state_appears_with_the_version_of_its_weights_which_nothing_serves_yet(
    syncer: WeightSyncer, model: Tiny, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    train(model, optimizer)
    assert syncer.save_dcp("step-1")
    (version,) = manifests(tmp_path)
    assert version.name == f"step-1-{syncer.session}"
    assert syncer.engine.position == version.position
    assert ChainReader(LocalBucket(tmp_path / "bucket"), tmp_path / "cache").served().version == 0
    assert syncer.hotload(version.name)
    assert syncer.save_only("step-1", "delta") == version.name, "nothing has changed: the same version"
    assert len(manifests(tmp_path)) == 1


@pytest.mark.parametrize("part", ["version", "state"])
def test_a_step_is_invisible_where_one_of_its_parts_fails(
    part: str,
    syncer: WeightSyncer,
    model: Tiny,
    optimizer: torch.optim.Optimizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BucketUnavailable(f"no {part}")

    train(model, optimizer)
    with monkeypatch.context() as failing:
        failing.setattr(*((LocalBucket, "put") if part == "version" else (dcp, "save")), fail)
        assert not syncer.save_dcp("step-1")
    assert f"no {part}" in caplog.text
    assert not [path for path in (tmp_path / "dcp").iterdir() if not path.name.startswith(".")]
    assert syncer.save_dcp("step-1"), "the next one holds what the failed one did not"
    assert [path.name for path in (tmp_path / "dcp").iterdir()] == ["step-1"]
    assert [manifest.version for manifest in manifests(tmp_path)] == [1]


# --- examples


@pytest.mark.parametrize(
    ("script", "options", "saved"),
    [("on_policy", [], [1, 2, 3, 4]), ("interval", ["--every", "2"], [1, 2]), ("split", [], [1, 2, 3, 4])],
)
def test_the_examples_run_unmodified(
    script: str, options: list[str], saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without servers in the configuration, as when all servers have followers."""
    pytest.importorskip("transformers")
    from tests.support.models import save_checkpoint

    base, examples = (
        save_checkpoint("qwen3_tied", tmp_path / "base"),
        Path(__file__).parents[2] / "examples/weight_syncer",
    )
    arguments = ["--model_name_or_path", str(base), "--bucket", str(tmp_path / "bucket"), "--steps", "4", *options]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(examples)
    runpy.run_path(str(examples / f"{script}.py"), run_name="__main__")
    assert [manifest.version for manifest in manifests(tmp_path)] == saved
