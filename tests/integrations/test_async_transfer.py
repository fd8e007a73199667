"""Which trainers the weight transfer supports, and its errors for others. tests/servers/test_async_grpo.py runs it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import torch

from hubsync.errors import ConfigError, ReplicaUnreachable
from hubsync.integrations import trl_checks
from hubsync.integrations.trl import HubWeightTransfer
from hubsync.integrations.trl_rollouts import DatedRollouts, _ServerSession, distill
from hubsync.publish.config import SyncConfig
from tests.support.adapted import lora
from tests.support.async_ranks import RandomRollouts
from tests.support.async_toy import make_distillation_trainer, make_trainer, save_policy, without_gpu
from tests.support.launched import launch
from tests.support.proxy import TOKEN, TokenProxy

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def build(policy: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(**arguments: Any) -> Any:
        with without_gpu():
            return make_trainer(policy, tmp_path, NOBODY, max_steps=1, **arguments)

    return make


@pytest.fixture
def config(tmp_path: Path) -> SyncConfig:
    return SyncConfig(bucket=str(tmp_path / "bucket"))


def test_samples_of_trls_worker_carry_their_versions(build: Callable[..., Any], config: SyncConfig) -> None:
    transfer = HubWeightTransfer(config)
    trainer = build(weight_transfer=transfer)
    transfer.attach(trainer)
    assert trainer.rollout_worker._loop_cls is DatedRollouts
    assert transfer.config.servers == [NOBODY]


def test_samples_of_the_distillation_worker_carry_their_versions(
    policy: Path, config: SyncConfig, tmp_path: Path
) -> None:
    transfer = HubWeightTransfer(config)
    with without_gpu():
        trainer = make_distillation_trainer(policy, tmp_path, NOBODY, max_steps=1, weight_transfer=transfer)
    transfer.attach(trainer)
    started = trainer.rollout_worker._mp_ctx.Process(target=print, args=("TRL's own",))
    assert started._target is distill
    assert started._args == ("TRL's own",)


@pytest.mark.slow
def test_an_error_of_the_main_process_is_raised_on_every_rank(policy: Path, tmp_path: Path) -> None:
    launch("ddp", "tests.support.async_ranks", policy, NOBODY, tmp_path / "bucket", tmp_path, 10)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["error"].startswith(f"ReplicaUnreachable: cannot connect to {NOBODY}")


def test_the_quorum_of_the_config_counts(tmp_path: Path) -> None:
    config = SyncConfig(bucket=str(tmp_path / "bucket"), servers=[NOBODY, "http://127.0.0.1:19"], quorum=1)
    assert HubWeightTransfer(config).quorum == 1
    assert HubWeightTransfer(config, quorum=2).quorum == 2
    assert HubWeightTransfer(SyncConfig(bucket="run")).quorum is None


def test_a_quorum_needs_samples_with_versions(build: Callable[..., Any], config: SyncConfig) -> None:
    config.servers = [NOBODY, "http://127.0.0.1:19"]
    transfer = HubWeightTransfer(config, quorum=1)
    trainer = build(weight_transfer=transfer, rollout_worker=RandomRollouts())
    with pytest.raises(ConfigError, match="RandomRollouts of this trainer do not say which weights made them"):
        transfer.attach(trainer)


@pytest.mark.parametrize("make", [make_trainer, make_distillation_trainer])
def test_an_adapter_is_not_merged_during_a_transfer(
    make: Callable[..., Any], policy: Path, config: SyncConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer, adapter = HubWeightTransfer(config), lora(init_lora_weights=False)
    with without_gpu():
        trainer = make(policy, tmp_path, NOBODY, max_steps=1, weight_transfer=transfer, peft_config=adapter)
    transfer.attach(trainer)
    base = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    before, during = base.clone(), []
    monkeypatch.setattr(transfer, "send_weights", lambda _: during.append(base.clone()))  # there is no server here
    trainer._sync_weight()
    assert torch.equal(during[0], before)
    assert torch.equal(base, before)
    trainer.model.merge_adapter()
    assert not torch.equal(base, before)


def test_an_adapter_is_refused_when_trl_trains_none(
    build: Callable[..., Any], config: SyncConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the older releases of the supported range."""
    transfer = HubWeightTransfer(config)
    trainer = build(weight_transfer=transfer, peft_config=lora())
    monkeypatch.setattr(type(trainer), "_sync_weight_merged", None)
    monkeypatch.setattr(trl_checks, "require_unmoved", lambda _: None)
    with pytest.raises(ConfigError, match=r"install TRL >= 1\.14"):
        transfer.attach(trainer)


@pytest.mark.parametrize(
    ("oldest", "trls_own", "dated"),
    [(7, 2, 2), (6, 2, 1), (5, 2, 1), (9, 2, 2), (9, 1, 1), (4, 2, -(2**31))],
    ids=["same version", "between two", "previous version", "later than any", "older in TRL", "no version"],
)
def test_a_samples_version_is_its_oldest_weights_and_never_newer_than_trls(
    oldest: int, trls_own: int, dated: int, build: Callable[..., Any], config: SyncConfig
) -> None:
    transfer = HubWeightTransfer(config)
    trainer = build(weight_transfer=transfer)
    taken = SimpleNamespace(model_version=trls_own, metrics={"weight_sync/version_min": float(oldest)})
    trainer.rollout_queue = SimpleNamespace(get=lambda: taken)
    transfer.attach(trainer)
    for trl_version, run_version in [(1, 5), (2, 7)]:
        transfer.version_map.note(trl_version, run_version)
    assert trainer.rollout_queue.get().model_version == dated


def test_trls_own_requests_and_its_workers_settings_carry_the_token_of_a_proxy(
    policy: Path, config: SyncConfig, tmp_path: Path
) -> None:
    """tests/servers/test_async_grpo.py trains through such a proxy."""
    with TokenProxy("http://127.0.0.1:9") as proxy:
        transfer = HubWeightTransfer(replace(config, api_key=TOKEN))
        with without_gpu():
            trainer = make_trainer(policy, tmp_path, f"{proxy.url}/", max_steps=1, weight_transfer=transfer)
        transfer.attach(trainer)
        for ask in (trainer.vllm_client.wait_for_server_ready, trainer.vllm_client.get_max_model_len):
            trainer.vllm_client._timeout = 0.0
            with pytest.raises(ReplicaUnreachable):  # nothing listens behind the proxy
                ask()
        assert (set(proxy.passed), proxy.refused) == ({"/health", "/v1/models"}, 0)
    settings = trainer.rollout_worker._loop_kwargs
    assert (settings["vllm_server_url"], settings["server_headers"]) == (
        proxy.url,
        {"Authorization": f"Bearer {TOKEN}"},
    )


def test_the_rollout_process_sends_the_token_to_the_trained_server_and_not_to_teachers() -> None:
    async def ask(server: str, teacher: str) -> list[int]:
        async with aiohttp.ClientSession() as connections:
            session = _ServerSession(connections, server, {"Authorization": f"Bearer {TOKEN}"})
            answers = []
            for url in (server, teacher):
                async with session.post(f"{url}/v1/completions", json={}) as answer:
                    answers.append(answer.status)
            return answers

    with TokenProxy("http://127.0.0.1:9") as server, TokenProxy("http://127.0.0.1:9") as teacher:
        assert asyncio.run(ask(server.url, teacher.url)) == [502, 401]  # nothing listens behind the proxies
        assert (server.refused, teacher.refused) == (0, 1)


def test_a_trainer_is_attached_once(build: Callable[..., Any], config: SyncConfig) -> None:
    config.servers = [NOBODY, "http://127.0.0.1:19"]
    transfer = HubWeightTransfer(config, quorum=1)
    trainer = build(weight_transfer=transfer)
    transfer.attach(trainer)
    with pytest.raises(ConfigError, match="is attached to this AsyncGRPOTrainer already"):
        transfer.attach(trainer)


def test_a_trainer_built_with_another_transfer_is_refused(build: Callable[..., Any], config: SyncConfig) -> None:
    with pytest.raises(ConfigError, match="build the trainer with weight_transfer=transfer"):
        HubWeightTransfer(config).attach(build(weight_transfer=HubWeightTransfer(config)))


def test_the_error_for_a_trainer_without_transfers_names_the_engine(config: SyncConfig) -> None:
    with pytest.raises(ConfigError, match="use a DeltaWeightTransferEngine"):
        HubWeightTransfer(config).attach(object())


def test_the_weight_iterator_is_always_drained(config: SyncConfig) -> None:
    """Gathering each weight is a collective, so other ranks would wait forever."""
    left = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    with pytest.raises(ConfigError, match="has ended"):
        HubWeightTransfer(config).send_weights(left)
    assert list(left) == []


@pytest.mark.parametrize("wrong", [{"quorum": 0}, {"timeout": 0.0}])
def test_impossible_settings_are_refused_at_once(config: SyncConfig, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        HubWeightTransfer(config, **wrong)
