"""AsyncGRPOTrainer with a real vLLM server that generates while its weights move.

The trainer, its process of rollouts, the bucket and the server are real. What the CPU needs stand-ins for is named, and
made, in `async_toy`: TRL's attention kernel and its probe of the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.errors import ConfigError
from hubsync.format.manifest import Position
from hubsync.integrations.trl import HubWeightTransfer
from hubsync.publish.config import SyncConfig
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.support.async_toy import digest_of, make_distillation_trainer, make_trainer, save_policy, without_gpu
from tests.support.launched import launch
from tests.support.proxy import TOKEN, TokenProxy

pytestmark = pytest.mark.server

STEPS = 4
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens
ADDRESS = "hf://buckets/me/async-grpo/run"
WITHOUT_DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "", "VLLM_PLUGINS": "hubsync"}


@dataclass
class Policy:
    """A checkpoint, and a server of it that follows `ADDRESS`."""

    checkpoint: Path
    url: str


@dataclass
class Training:
    """What happened in one training.

    Attributes:
        published: TRL's version -> the version of the run that was its policy.
        tokens: generated on the server while each synchronisation was under way.
        samples: (version that TRL uses, oldest and newest version of the run) of each that was taken.
    """

    trainer: Any
    newest: Position
    published: dict[int, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    samples: list[tuple[int, int, int]] = field(default_factory=list)


@pytest.fixture(scope="module")
def policy(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Policy:
    checkpoint = save_policy(tmp_path_factory.mktemp("async"))
    return Policy(
        checkpoint,
        start_server(checkpoint, bucket=ADDRESS, environment=WITHOUT_DEVELOPMENT, arguments=["--enable-scale-out"]),
    )


@pytest.fixture(scope="module")
def training(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A few steps, beside a second server that is dead, and that the quorum does without.

    The trainer and its process of rollouts reach the server through a proxy that demands a token.
    """
    with without_gpu(), TokenProxy(policy.url) as proxy:
        config = SyncConfig(bucket=ADDRESS, servers=[proxy.url, NOBODY], api_key=TOKEN)
        transfer = HubWeightTransfer(config, quorum=1, timeout=300)
        trainer = make_trainer(
            policy.checkpoint,
            tmp_path_factory.mktemp("trainer"),
            proxy.url,
            max_steps=STEPS,
            max_staleness=1,  # so that the trainer comes to samples of later versions, and drops the ones before
            weight_transfer=transfer,
        )
        transfer.attach(trainer)
        seen = Training(trainer, Position(0, ""))
        send, take = transfer.send_weights, trainer.rollout_queue.get

        def watched_send(iterator: Any) -> None:
            before = generated_tokens(policy.url)
            send(iterator)
            seen.tokens.append(generated_tokens(policy.url) - before)
            seen.newest = transfer.last.position
            seen.published[trainer.model_version + 1] = seen.newest.version

        def watched_take(*args: Any, **kwargs: Any) -> Any:
            sample = take(*args, **kwargs)
            oldest, newest = (int(sample.metrics[f"weight_sync/version_{end}"]) for end in ("min", "max"))
            seen.samples.append((sample.model_version, oldest, newest))
            return sample

        transfer.send_weights, trainer.rollout_queue.get = watched_send, watched_take
        trainer.train()
        assert proxy.refused == 0
    print(f"\ntokens generated during each synchronisation: {seen.tokens}; samples (TRL's, oldest, newest version): ")
    print(sorted(set(seen.samples)))
    return seen


def generated_tokens(url: str) -> int:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total")))


def test_the_server_ends_bit_equal_to_the_policy(training: Training, policy: Policy) -> None:
    assert training.newest.version >= STEPS, "every step changed some weights"
    assert training.newest.digest == digest_of(training.trainer.model)
    Replica(VLLMServer(policy.url)).wait_verified(training.newest)
    assert VLLMServer(policy.url).weight_version() == str(training.newest.version)
    assert not VLLMServer(policy.url).is_paused()


def test_the_server_generates_while_its_weights_move(training: Training) -> None:
    assert len(training.tokens) == 1 + STEPS
    assert sum(training.tokens[1:]) > 0  # nobody had asked for anything before the first


def test_trls_version_moves_with_each_synchronisation_that_a_quorum_acknowledged(training: Training) -> None:
    assert training.trainer.model_version == 1 + STEPS
    assert list(training.published) == list(range(1, 2 + STEPS))
    logged = [row["weight_sync/acknowledged"] for row in training.trainer.state.log_history if "loss" in row]
    assert logged == [1.0] * STEPS, "of two servers"


def test_no_sample_counts_as_newer_than_the_oldest_weights_that_made_it(training: Training) -> None:
    assert len({oldest for _, oldest, _ in training.samples}) > 1
    for trl_version, oldest, newest in training.samples:
        assert 0 <= training.published[trl_version] <= oldest <= newest <= training.newest.version


def test_the_range_of_versions_is_logged(training: Training) -> None:
    rows = [row for row in training.trainer.state.log_history if "loss" in row]
    assert all(0 <= row["weight_sync/version_min"] <= row["weight_sync/version_max"] for row in rows)


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.long), "fsdp2"])
def test_each_of_two_ranks_publishes_what_it_owns_and_gathers_nothing(
    how: str, policy: Policy, training: Training, tmp_path: Path
) -> None:
    """Another training on the same run, by two processes, whose policy begins at the checkpoint again."""
    launch(how, "tests.support.async_ranks", policy.checkpoint, policy.url, ADDRESS, tmp_path, 300)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["ranks"], first["trl_version"], first["gathered"], second["gathered"]) == (2, 3, 0, 0)
    assert first["trained"] == second["trained"] == first["served"] == second["served"]
    assert first["version"] > training.newest.version
    reader = ChainReader(open_bucket(ADDRESS), tmp_path / "cache")
    assert {part.rank for part in list(reader.manifests())[-1].parts} == {0, 1}
    Replica(VLLMServer(policy.url)).wait_verified(Position(first["version"], first["served"]))


def test_async_distillation_takes_the_same_transfer_and_dates_its_samples(
    policy: Policy, training: Training, tmp_path: Path
) -> None:
    transfer = HubWeightTransfer(SyncConfig(bucket=ADDRESS), timeout=300)
    samples: list[tuple[int, int, int]] = []
    with without_gpu():
        trainer = make_distillation_trainer(
            policy.checkpoint, tmp_path, policy.url, max_steps=2, max_staleness=1, weight_transfer=transfer
        )
        transfer.attach(trainer)
        take = trainer.rollout_queue.get

        def watched_take(*args: Any, **kwargs: Any) -> Any:
            sample = take(*args, **kwargs)
            oldest, newest = (int(sample.metrics[f"weight_sync/version_{end}"]) for end in ("min", "max"))
            samples.append((sample.model_version, oldest, newest))
            return sample

        trainer.rollout_queue.get = watched_take
        trainer.train()
    assert trainer.model_version == 3
    assert transfer.last.position.digest == digest_of(trainer.model)
    Replica(VLLMServer(policy.url)).wait_verified(transfer.last.position)
    published = transfer.version_map.versions
    assert samples
    for date, oldest, newest in samples:
        assert 0 <= published[date] <= oldest <= newest <= transfer.last.position.version
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all(0 <= row["weight_sync/version_min"] <= row["weight_sync/version_max"] for row in rows)


def test_without_a_quorum_a_dead_server_is_named(policy: Policy, training: Training, tmp_path: Path) -> None:
    config = SyncConfig(bucket=ADDRESS, servers=[policy.url, NOBODY])
    transfer = HubWeightTransfer(config, timeout=20)
    with without_gpu():
        trainer = make_trainer(policy.checkpoint, tmp_path, policy.url, max_steps=1, weight_transfer=transfer)
        transfer.attach(trainer)
        with pytest.raises(Exception, match=rf"1 of 2 servers serve .* and 2 must\. {NOBODY}: cannot connect"):
            trainer.train()
    assert trainer.model_version == 0


def test_a_transfer_that_was_not_told_its_policy_says_so(policy: Policy, tmp_path: Path) -> None:
    transfer = HubWeightTransfer(SyncConfig(bucket=ADDRESS))
    with without_gpu():
        trainer = make_trainer(policy.checkpoint, tmp_path, policy.url, max_steps=1, weight_transfer=transfer)
        with pytest.raises(ConfigError, match=r"transfer\.attach"):
            trainer.train()
