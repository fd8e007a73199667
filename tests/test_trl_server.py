"""TRL's family on a real vLLM server: several steps per generation, evaluation first, resuming, and students.

The policy is a mixture of experts, which TRL holds fused and vLLM loads one by one, and each lays out in its own way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hubsync.integrations.trl import HubSyncCallback
from hubsync.manifest import Position
from hubsync.replica.server import VLLMServer
from hubsync.replica.sync import Replica
from hubsync.trainer.config import SyncConfig

from .async_toy import digest_of, save_policy
from .models import save_checkpoint, save_tokenizer
from .test_trl_family import distillation, sdft, settings

pytestmark = pytest.mark.server

ADDRESS = "hf://buckets/me/family/run"
STEPS = 4
PROMPTS = Dataset.from_dict({"prompt": [f"{i} plus 1" for i in range(8)]})


@dataclass
class Policy:
    """A checkpoint of a Qwen3-MoE, and a server of it that follows `ADDRESS`. Every training continues that run."""

    checkpoint: Path
    url: str

    def served(self) -> Position:
        position = Replica(VLLMServer(self.url)).status().position
        assert position is not None
        return position

    def assert_served(self, model: Any) -> None:
        """The server's live weights are those of the model, bit for bit."""
        position = self.served()
        assert position.digest == digest_of(model)
        Replica(VLLMServer(self.url)).wait_verified(position)


@pytest.fixture(scope="module")
def policy(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Policy:
    checkpoint = save_policy(tmp_path_factory.mktemp("family"), "qwen3_moe")
    url = start_server(checkpoint, bucket=ADDRESS, arguments=["--logprobs-mode", "processed_logprobs"])
    return Policy(checkpoint, url)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [random.random() for _ in completions]


def train(kind: str, policy: Policy, directory: Path, resume: str | None = None, **more: Any) -> Any:
    """Returns the trained trainer and its callback."""
    trainer_class, config_class = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    trainer = trainer_class(
        str(policy.checkpoint),
        reward,
        args=config_class(
            output_dir=str(directory),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            learning_rate=1e-4,
            vllm_server_base_url=policy.url,
            **{"save_strategy": "no", **more},
        ),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS.select(range(2)),
    )
    callback = HubSyncCallback(trainer, SyncConfig(bucket=ADDRESS))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


@pytest.fixture(scope="module")
def several(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two optimizer steps for each generation, an evaluation before the first, and a checkpoint after the second."""
    return train(
        "grpo",
        policy,
        tmp_path_factory.mktemp("several"),
        steps_per_generation=2,
        eval_on_start=True,
        per_device_eval_batch_size=2,
        save_strategy="steps",
        save_steps=2,
    )


def test_several_steps_between_generations_arrive_together(policy: Policy, several: Any) -> None:
    trainer, callback = several
    rows = [row for row in trainer.state.log_history if "weight_sync/changed_fraction" in row]
    assert callback.commits == callback.digest_matches == STEPS // 2, "one for two versions"
    assert sum("weight_sync/changed_fraction" in row for row in rows) >= 1
    assert policy.served().version >= STEPS
    policy.assert_served(trainer.model)


def test_an_evaluation_before_the_first_step_generates_on_the_server(several: Any) -> None:
    trainer, _ = several
    first = next(row for row in trainer.state.log_history if "eval_loss" in row)
    assert first["step"] == 0
    assert first["eval_completions/mean_length"] > 0


def test_a_training_resumed_from_a_checkpoint_brings_the_server_to_it(
    policy: Policy, several: Any, tmp_path: Path
) -> None:
    before = policy.served().version
    checkpoint = Path(several[0].args.output_dir) / "checkpoint-2"
    trainer, callback = train("grpo", policy, tmp_path, resume=str(checkpoint))
    assert trainer.state.global_step == STEPS
    assert policy.served().version > before
    assert callback.commits == callback.digest_matches == 1 + STEPS - 2
    policy.assert_served(trainer.model)


def test_rloo_follows_the_same_way(policy: Policy, several: Any, tmp_path: Path) -> None:
    trainer, callback = train("rloo", policy, tmp_path)
    assert callback.commits == callback.digest_matches == 1 + STEPS
    policy.assert_served(trainer.model)


@pytest.mark.parametrize("kind", ["distillation", "sdft"])
def test_students_follow_the_same_way(kind: str, policy: Policy, several: Any, tmp_path: Path) -> None:
    common = settings(tmp_path, policy.url, learning_rate=1e-3)
    if kind == "sdft":
        trainer = sdft(str(policy.checkpoint), common)
    else:
        teacher = save_checkpoint("qwen3", tmp_path / "teacher")
        save_tokenizer(teacher)
        trainer = distillation(str(policy.checkpoint), common, str(teacher))
    callback = HubSyncCallback(trainer, SyncConfig(bucket=ADDRESS))
    trainer.train()
    assert callback.commits == callback.digest_matches == 1 + 2
    policy.assert_served(trainer.model)
