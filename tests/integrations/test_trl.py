"""Which trainers the TRL callback supports, and its errors for others. tests/servers/test_end_to_end.py runs it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer, TrlParser

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.errors import ConfigError, ReplicaUnreachable
from hubsync.integrations import trl_compat
from hubsync.integrations.trl import HubSyncCallback, HubWeightTransfer, server_url
from hubsync.localhub import LocalHub
from hubsync.publish.config import SyncConfig
from tests.support.async_toy import digest_of
from tests.support.models import save_checkpoint, save_tokenizer

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_checkpoint("qwen3_tied", tmp_path_factory.mktemp("policy"))
    save_tokenizer(directory)
    return directory


def settings(directory: Path, **extra: Any) -> dict[str, Any]:
    common = {"output_dir": str(directory), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    return {**common, "vllm_server_base_url": NOBODY, "vllm_server_timeout": 0.0, **extra}


def grpo(checkpoint: Path, directory: Path, **extra: Any) -> GRPOTrainer:
    return GRPOTrainer(
        model=str(checkpoint),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["one plus two"] * 8}),
        args=GRPOConfig(**settings(directory, **extra)),
    )


@pytest.fixture
def config(tmp_path: Path) -> SyncConfig:
    return SyncConfig(bucket=str(tmp_path / "bucket"))


def test_a_server_that_is_not_up_is_unreachable(checkpoint: Path, tmp_path: Path, config: SyncConfig) -> None:
    with pytest.raises(ReplicaUnreachable, match="is the vLLM server up"):
        HubSyncCallback(grpo(checkpoint, tmp_path), config)


def test_a_url_without_a_vllm_server_is_waited_for_until_the_timeout(
    checkpoint: Path, tmp_path: Path, config: SyncConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with LocalHub(tmp_path / "hub") as hub:  # speaks HTTP but has no /health
        trainer = grpo(checkpoint, tmp_path, vllm_server_base_url=hub.url, vllm_server_timeout=0.5)
        with pytest.raises(ReplicaUnreachable, match="answers, but is not a running vLLM server"):
            HubSyncCallback(trainer, config)
    assert [record.getMessage() for record in caplog.records if "(vllm_server_timeout), up to" in record.getMessage()]


def test_rloo_generates_on_the_server_too(checkpoint: Path, tmp_path: Path, config: SyncConfig) -> None:
    trainer = RLOOTrainer(
        model=str(checkpoint),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["one plus two"] * 8}),
        args=RLOOConfig(**settings(tmp_path)),
    )
    with pytest.raises(ReplicaUnreachable):  # it gets as far as connecting to the server
        HubSyncCallback(trainer, config)


def test_a_trainer_that_does_not_generate_is_refused(checkpoint: Path, tmp_path: Path, config: SyncConfig) -> None:
    trainer = SFTTrainer(
        model=str(checkpoint),
        train_dataset=Dataset.from_dict({"text": ["one plus two is three"] * 8}),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
    )
    for attach in (HubSyncCallback, lambda trainer, config: HubWeightTransfer(config).attach(trainer)):
        with pytest.raises(ConfigError, match=r"SFTTrainer .*: use a DeltaWeightTransferEngine, .*docs/trainers\.md"):
            attach(trainer, config)


def test_the_callback_of_the_documentation_publishes_every_step_of_any_trainer(
    checkpoint: Path, tmp_path: Path, config: SyncConfig
) -> None:
    """The remedy of the error above, run as docs/trainers.md has it."""
    text = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text().partition("## Any other trainer")[2]
    trainer = SFTTrainer(
        model=str(checkpoint),
        train_dataset=Dataset.from_dict({"text": ["one plus two is three"] * 8}),
        args=SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=3, learning_rate=1e-3
        ),
    )
    exec(text.partition("```python\n")[2].partition("```")[0], {"trainer": trainer, "config": config})
    trainer.train()
    with tempfile.TemporaryDirectory() as cache:
        reader = ChainReader(open_bucket(config.bucket), cache)
        assert [manifest.step for manifest in reader.manifests() if manifest.kind == "delta"] == [1, 2, 3]
        assert reader.newest().digest == digest_of(trainer.model)


def test_the_error_for_a_trainer_with_vllm_says_to_build_it_without(
    checkpoint: Path, tmp_path: Path, config: SyncConfig
) -> None:
    trainer = grpo(checkpoint, tmp_path)
    trainer.args.use_vllm = True
    with pytest.raises(ConfigError, match="use_vllm=False"):
        HubSyncCallback(trainer, config)


def test_continuous_batching_is_refused_because_it_casts_the_policy(
    checkpoint: Path, tmp_path: Path, config: SyncConfig
) -> None:
    trainer = grpo(checkpoint, tmp_path)
    trainer.args.use_transformers_continuous_batching = True
    with pytest.raises(ConfigError, match="casts the policy"):
        HubSyncCallback(trainer, config)


def test_a_loss_that_needs_token_level_correction_keeps_its_check(
    checkpoint: Path, tmp_path: Path, config: SyncConfig
) -> None:
    trainer = grpo(checkpoint, tmp_path, loss_type="vespo", vllm_importance_sampling_mode="sequence_mask")
    with pytest.raises(ConfigError, match="token_truncate"):
        HubSyncCallback(trainer, config)


def test_the_server_comes_from_trls_arguments(tmp_path: Path) -> None:
    by_url = GRPOConfig(**settings(tmp_path, vllm_server_base_url="http://inference:8000/"))
    by_host = GRPOConfig(**settings(tmp_path, vllm_server_base_url=None, vllm_server_host="h", vllm_server_port=1))
    assert server_url(by_url) == "http://inference:8000"
    assert server_url(by_host) == "http://h:1"


def test_the_settings_parse_together_with_trls(tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path), "--bucket", "runs/a", "--anchor_every", "50", "--kv_cache", "keep"]
    training, sync = TrlParser((GRPOConfig, SyncConfig)).parse_args_and_config(
        [*arguments, "--use_cpu", "--bf16", "False"]
    )
    assert training.output_dir == str(tmp_path)
    assert sync == SyncConfig(bucket="runs/a", anchor_every=50, kv_cache="keep")


@pytest.mark.parametrize("token", [{"token_id": 7}, {"token": "token_id:7"}], ids=["vLLM 0.32", "before"])
def test_answers_to_prompts_with_images_are_as_trl_reads_them(token: dict[str, Any]) -> None:
    """`tests/servers/test_examples.py` trains a vision-language model."""
    from trl.generation.vllm_client import parse_logprobs

    entry = {**token, "logprob": -0.5, "top_logprobs": [{**token, "logprob": -0.5}]}
    answer = trl_compat._with_token_names({"choices": [{"logprobs": {"content": [entry]}}]})
    assert parse_logprobs([choice["logprobs"] for choice in answer["choices"]]) == ([[[-0.5]]], [[[7]]])
    assert trl_compat._with_token_names({"choices": [{"logprobs": None}]}) == {"choices": [{"logprobs": None}]}
