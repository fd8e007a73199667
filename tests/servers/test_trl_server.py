"""TRL's family on a real vLLM server: several steps per generation, evaluation first, resuming, and all its trainers.

A loop without TRL follows the same way. The policy is a mixture of experts, which trainers hold fused and vLLM loads
one by one, and each lays out in its own way.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.format.manifest import Position
from hubsync.integrations.trl import HubSyncCallback
from hubsync.publish.config import SyncConfig
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.integrations.test_trl_family import BUILDERS, TAUGHT, grpo, settings
from tests.support.async_toy import digest_of, save_policy
from tests.support.models import save_checkpoint, save_tokenizer

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

    def generated(self) -> float:
        """Tokens that the server says it has generated, ever."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


@pytest.fixture(scope="module")
def policy(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Policy:
    checkpoint = save_policy(tmp_path_factory.mktemp("family"), "qwen3_moe")
    url = start_server(checkpoint, bucket=ADDRESS, arguments=["--logprobs-mode", "processed_logprobs"])
    return Policy(checkpoint, url)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = save_checkpoint("qwen3", tmp_path_factory.mktemp("teacher"))
    save_tokenizer(directory)
    return str(directory)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [random.random() for _ in completions]


def train(policy: Policy, directory: Path, resume: str | None = None, **more: Any) -> Any:
    """Returns the trained trainer and its callback."""
    trainer = GRPOTrainer(
        str(policy.checkpoint),
        reward,
        args=GRPOConfig(
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
    assert callback.commits == callback.digest_matches == STEPS // 2, "one for two versions"
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
    trainer, callback = train(policy, tmp_path, resume=str(checkpoint))
    assert trainer.state.global_step == STEPS
    assert policy.served().version > before
    assert callback.commits == callback.digest_matches == 1 + STEPS - 2
    policy.assert_served(trainer.model)


@pytest.mark.parametrize("build", [build for build in BUILDERS if build is not grpo])
def test_the_rest_of_the_family_follows_the_same_way(
    build: Callable[..., Any],
    policy: Policy,
    teacher: str,
    several: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = settings(tmp_path, policy.url, learning_rate=1e-3)
    trainer = build(str(policy.checkpoint), common, **({"teacher": teacher} if build in TAUGHT else {}))
    callback = HubSyncCallback(trainer, SyncConfig(bucket=ADDRESS))
    monkeypatch.delattr("transformers.GenerationMixin.generate")  # nothing can be generated beside the server
    completions, before = completions_of(trainer), policy.generated()
    trainer.train()
    assert policy.generated() - before == sum(map(len, completions)) > 0
    assert callback.commits == callback.digest_matches == 1 + 2
    policy.assert_served(trainer.model)


def completions_of(trainer: Any) -> list[list[int]]:
    """Takes up the tokens of all completions that the trainer will be given."""
    taken: list[list[int]] = []
    generate = trainer.vllm_generation.generate

    def generate_and_note(*args: Any, **options: Any) -> Any:
        answer = generate(*args, **options)
        taken.extend(answer[1])
        return answer

    trainer.vllm_generation.generate = generate_and_note
    return taken


def test_a_plain_torch_loop_follows_the_same_way(policy: Policy, several: Any, tmp_path: Path) -> None:
    """The example, as a user starts it."""
    root, before = Path(__file__).parents[2], policy.generated()
    script = root / "examples/torch_loop/train.py"
    options = ["--model_name_or_path", str(policy.checkpoint), "--bucket", ADDRESS, "--servers", policy.url]
    done = subprocess.run(
        [sys.executable, str(script), *options, "--steps", "3"],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    newest = ChainReader(open_bucket(ADDRESS), tmp_path).newest()
    versions = [int(line.split()[5]) for line in done.stdout.splitlines()]
    assert versions == [newest.version - 2, newest.version - 1, newest.version]
    assert policy.served() == newest
    Replica(VLLMServer(policy.url)).wait_verified(newest)
    assert policy.generated() - before == 3 * 8 * 32
