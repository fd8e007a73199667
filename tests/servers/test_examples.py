"""Every example trains a tiny model, with a real server (`examples/weight_syncer` runs in tests/lifecycle).

Replaced: the model, the data, and the reward, because math-verify is not installed here; for the asynchronous trainer
also the parts of a GPU that `tests/support/async_toy.py` names.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.errors import ReplicaUnreachable
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from hubsync.retry import retry
from tests.support.async_toy import GENERATIONS, save_policy, share_of_vowels, without_gpu

pytestmark = [pytest.mark.server, pytest.mark.long]

EXAMPLES = Path(__file__).parents[2] / "examples"
ADDRESS, ADAPTERS = "hf://buckets/me/examples/run", "hf://buckets/me/examples/adapters"
PLAIN = ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]


@dataclass
class Place:
    checkpoint: Path
    data: Path
    url: str
    address: str

    def newest(self, cache: Path) -> int:
        """The newest version of the run, which the server serves, verified."""
        newest = ChainReader(open_bucket(self.address), cache).newest()
        Replica(VLLMServer(self.url)).wait_verified(newest)
        return newest.version


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny policy, and data as `load_dataset` takes it from a directory."""
    root = tmp_path_factory.mktemp("examples")
    questions = [{"prompt": [{"role": "user", "content": f"{i} plus 1"}], "solution": str(i + 1)} for i in range(16)]
    (root / "data").mkdir()
    Dataset.from_list(questions).to_json(root / "data" / "train.jsonl")
    return save_policy(root / "policy"), root / "data"


@pytest.fixture(scope="module")
def place(files: tuple[Path, Path], start_server: Callable[..., str]) -> Place:
    return Place(*files, start_server(files[0], bucket=ADDRESS, arguments=PLAIN), ADDRESS)


@pytest.fixture(scope="module")
def lora_place(files: tuple[Path, Path], start_server: Callable[..., str]) -> Place:
    url = start_server(
        files[0],
        bucket=ADAPTERS,
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
        arguments=["--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "16"],
    )
    return Place(*files, url, ADAPTERS)


@pytest.fixture(autouse=True)
def _reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.rewards.accuracy_reward", share_of_vowels)


def run(monkeypatch: pytest.MonkeyPatch, script: str, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def options(place: Place, output: Path) -> list[object]:
    """As in the docstrings of the examples, with small numbers."""
    return [
        *("--model_name_or_path", place.checkpoint, "--dataset_name", place.data, "--bucket", place.address),
        *("--vllm_server_base_url", place.url, "--output_dir", output, "--learning_rate", 1e-3, "--max_steps", 2),
        *("--per_device_train_batch_size", GENERATIONS, "--num_generations", GENERATIONS),
        *("--max_completion_length", 16, "--report_to", "none", "--use_cpu", "--bf16", "False", "--logging_steps", 1),
        *("--gradient_checkpointing", "False"),
    ]


def test_grpo_disaggregated(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "grpo_disaggregated/train.py", *options(place, tmp_path / "out"))
    assert place.newest(tmp_path / "cache") >= 2
    assert (tmp_path / "out" / "config.json").exists()


def test_async_grpo(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = ("--servers", place.url, "--quorum", 1, "--token_budget", -1, "--heartbeat_stale_after_s", 600)
    with without_gpu():
        run(monkeypatch, "async_grpo/train.py", *options(place, tmp_path / "out"), *servers)
    assert place.newest(tmp_path / "cache") >= 2
    assert (tmp_path / "out" / "config.json").exists()


def test_torch_loop(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ("--model_name_or_path", place.checkpoint, "--bucket", place.address, "--servers", place.url)
    run(monkeypatch, "torch_loop/train.py", *model, "--steps", 2)
    assert place.newest(tmp_path / "cache") >= 2


def test_rollouts(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replica = Replica(VLLMServer(place.url))
    if replica.status().position is None:  # as the example's README: the server follows a run
        test_torch_loop(place, tmp_path, monkeypatch)
    run(monkeypatch, "rollouts/rollouts.py", place.url, "--k", 2, "--max-tokens", 8)
    assert "40 samples, 0 too old" in capsys.readouterr().out


def test_lora(lora_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = ("--use_peft", "--lora_r", 8, "--lora_alpha", 16, "--lora_target_modules", "q_proj", "v_proj")
    run(monkeypatch, "lora/train.py", *options(lora_place, tmp_path / "out"), *peft)
    assert lora_place.newest(tmp_path / "cache") >= 2
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_the_command_of_the_readme_starts_a_server_without_a_gpu(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is written there, but for the model, the port and the directory of the run."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    command = readme.partition("**Without a GPU.**")[2].partition("```bash\n")[2].partition("```")[0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for written, here in [
        (".venv/bin/python", sys.executable),
        ("MODEL --", f"{files[0]} --host 127.0.0.1 --"),
        ("--port 8000", f"--port {port}"),
        ("./runs/run1", str(tmp_path / "run")),
    ]:
        assert written in command
        command = command.replace(written, here)
    for setting in re.findall(r"^(\w+)=|\s(\w+)=", command):
        monkeypatch.delenv(setting[0] or setting[1], raising=False)
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(["bash", "-c", f"exec env {command}"], stdout=log, stderr=log, start_new_session=True)
    try:
        server, url = VLLMServer(f"http://127.0.0.1:{port}"), f"http://127.0.0.1:{port}"
        retry(server.version, timeout=300.0, on=ReplicaUnreachable, waiting_for=url)
        model = AutoModelForCausalLM.from_pretrained(files[0], dtype="float32")
        with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=str(tmp_path / "run"), servers=[url])) as engine:
            assert len(engine.sync(0).commits) == 1
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
