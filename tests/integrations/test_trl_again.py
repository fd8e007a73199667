"""The TRL callback after and during failures: the served weights are still the trained ones.

The servers are stand-ins that also answer TRL's client, with random tokens; the trainers and the runs are real.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hubsync import SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.errors import BucketUnavailable, ConfigError, ReplicaUnsuitable, RunMismatch
from hubsync.integrations.trl import HubSyncCallback, HubWeightTransfer
from tests.integrations.test_trl_family import _choice, grpo, settings
from tests.support.async_toy import save_policy
from tests.support.standin import StandIn


class GeneratingStandIn(StandIn):
    """A stand-in whose base model is version 0 of the run in a bucket. `made_by`: the version behind each generation.

    Attributes:
        says: vLLM's version.
    """

    def __init__(self, bucket: Path):
        self._bucket = bucket
        self.made_by: list[int] = []
        self.says = "0.32.0"
        super().__init__()

    def version(self) -> str:
        return self.says

    def hubsync_attach(self, engine: int) -> list[dict[str, Any]]:
        if self.state in ("detached", "refused") and self.mismatch is None:
            self.base = ChainReader(LocalBucket(self._bucket), self._bucket.with_name("cache")).run().origin
            self.positions = [[self.base]]
        return super().hubsync_attach(engine)

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/server_info":  # no development mode
            return 404, {"detail": "Not Found"}
        if path == "/v1/hubsync":
            return 200, {"protocol": 1, "logprobs_mode": "processed_logprobs"}
        if path == "/v1/completions":
            self.made_by.append(self.position.version)
            return 200, {"choices": [_choice(prompt) for prompt in body["prompt"] for _ in range(body["n"])]}
        return super().answer(path, body)


@pytest.fixture
def config(tmp_path: Path) -> SyncConfig:
    return SyncConfig(bucket=str(tmp_path / "bucket"), stage_timeout=10.0)


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[[], GeneratingStandIn]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(GeneratingStandIn(tmp_path / "bucket"))


@pytest.fixture
def server(new_server: Callable[[], GeneratingStandIn]) -> GeneratingStandIn:
    return new_server()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_policy(tmp_path_factory.mktemp("again")))


@pytest.fixture
def trainer(policy: str, server: GeneratingStandIn, tmp_path: Path) -> Any:
    return grpo(policy, settings(tmp_path / "out", server.url))


def test_a_callback_is_attached_once_and_again_after_a_failure(
    trainer: Any, server: GeneratingStandIn, config: SyncConfig
) -> None:
    server.says = "0.20.0"
    with pytest.raises(ReplicaUnsuitable, match="upgrade"):
        HubSyncCallback(trainer, config)
    assert not trainer.use_vllm
    server.says = "0.32.0"
    callback = HubSyncCallback(trainer, config)
    with pytest.raises(ConfigError, match="has a HubSyncCallback already"):
        HubSyncCallback(trainer, config)
    assert trainer.callback_handler.callbacks.count(callback) == 1


def test_training_continues_after_an_earlier_run_lost_its_server(
    trainer: Any, server: GeneratingStandIn, config: SyncConfig
) -> None:
    HubSyncCallback(trainer, config)
    score = trainer.reward_funcs[0]

    def ending(**settings: Any) -> Any:
        if server.position.version == 0:
            return score(**settings)
        server.stop()
        server.start()
        raise KeyError("the user's own")

    trainer.reward_funcs[0] = ending
    with pytest.raises(KeyError, match="the user's own"):
        trainer.train()
    trainer.reward_funcs[0] = score
    trainer.train()
    assert server.made_by == [0, 1, 1, 2]
    assert server.position.version == 3


def test_an_error_that_ended_a_training_does_not_affect_the_next(
    trainer: Any, server: GeneratingStandIn, config: SyncConfig, tmp_path: Path
) -> None:
    callback = HubSyncCallback(trainer, config)
    server.mismatch = "its weights are of no version of this run"
    with pytest.raises(RunMismatch):
        trainer.train()
    server.mismatch = None
    trainer.train()
    assert len(server.made_by) == 2
    assert server.position == ChainReader(LocalBucket(config.bucket), tmp_path / "cache").newest()
    assert callback.engine is None


def test_a_quorum_always_includes_the_generating_server(
    policy: str, new_server: Callable[[], GeneratingStandIn], config: SyncConfig, tmp_path: Path
) -> None:
    own, other = new_server(), new_server()
    own.fault = lambda call, before: time.sleep(0.3) if call == "hubsync_stage" and before else None
    trainer = grpo(policy, settings(tmp_path / "out", own.url))
    config.servers, config.quorum = [own.url, other.url], 1
    HubSyncCallback(trainer, config)
    trainer.train()
    assert own.made_by == [0, 1]
    assert own.position == other.position


def rows_of(trainer: Any, name: str) -> dict[int, float]:
    """Step -> value, of all rows of the log that have it. Each step has one."""
    found = [(row["step"], row[name]) for row in trainer.state.log_history if name in row]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_metrics_belong_to_the_step_that_made_them(
    policy: str, server: GeneratingStandIn, config: SyncConfig, tmp_path: Path
) -> None:
    trainer = grpo(policy, settings(tmp_path / "out", server.url) | {"max_steps": 3, "logging_steps": 1})
    tracked: list[tuple[int, dict[str, float]]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            assert not ended
            tracked.append((state.global_step, dict(logs)))

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            ended.append(True)

    ended: list[bool] = []
    trainer.add_callback(Tracker())
    HubSyncCallback(trainer, config)
    trainer.train()
    deltas = {
        manifest.step: manifest.nbytes
        for manifest in ChainReader(LocalBucket(config.bucket), tmp_path / "cache").manifests()
        if manifest.kind == "delta"
    }
    assert list(deltas) == [1, 2, 3]
    assert rows_of(trainer, "weight_sync/payload_bytes") == deltas
    assert {step for step, logs in tracked if "weight_sync/upload_s" in logs} == {1, 2, 3}
    assert rows_of(trainer, "weight_sync/version") == {1: 0, 2: 1, 3: 2}
    assert set(rows_of(trainer, "weight_sync/stage_s")) == {1, 2, 3}
    assert all("weight_sync/payload_bytes" not in row for row in trainer.state.log_history if "loss" in row)


def test_rows_of_several_steps_have_means_and_the_last_is_not_lost(
    policy: str, server: GeneratingStandIn, config: SyncConfig, tmp_path: Path
) -> None:
    trainer = grpo(policy, settings(tmp_path / "out", server.url) | {"max_steps": 3, "logging_steps": 2})
    HubSyncCallback(trainer, config)
    trainer.train()
    sizes = [
        manifest.nbytes
        for manifest in ChainReader(LocalBucket(config.bucket), tmp_path / "cache").manifests()
        if manifest.kind == "delta"
    ]
    assert rows_of(trainer, "weight_sync/payload_bytes") == {2: (sizes[0] + sizes[1]) / 2, 3: sizes[2]}


def test_metrics_of_an_outage_are_those_of_the_publish_that_ended_it(
    policy: str, server: GeneratingStandIn, config: SyncConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = grpo(policy, settings(tmp_path / "out", server.url) | {"max_steps": 3, "logging_steps": 1})
    put, failures = LocalBucket.put, iter([BucketUnavailable("the storage is away")])

    def fails_once(bucket: LocalBucket, uploads: Any) -> None:
        if any("/deltas/00000002" in upload.name for upload in uploads) and (failure := next(failures, None)):
            raise failure
        put(bucket, uploads)

    monkeypatch.setattr(LocalBucket, "put", fails_once)
    HubSyncCallback(trainer, config)
    trainer.train()
    assert set(rows_of(trainer, "weight_sync/payload_bytes")) == {1, 2, 3}
    assert next(failures, None) is None


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "600"])
def test_an_invalid_transfer_timeout_is_refused(config: SyncConfig, timeout: Any) -> None:
    with pytest.raises(ConfigError, match="number of seconds"):
        HubWeightTransfer(config, timeout=timeout)
