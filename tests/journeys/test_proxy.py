"""Two hosts, and a reverse proxy in front of the server that wants a token: by README's commands.

Replaced: the model, its task, and the port. The proxy is a small one of the tests; it takes the token away, as gateways
do.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hubsync.demo.task import make_checkpoint
from tests.support.proxy import TOKEN, TokenProxy

from .pages import RUN, TRAINER_URL, Shell, answers, blocks, free_port, here, on_cpu, wait_for

pytestmark = [pytest.mark.server, pytest.mark.long]

TITLE = "Train with TRL, serve with vLLM, on two hosts"
STEPS = 3


def test_a_proxy_that_wants_a_token(tmp_path: Path, hub_environment: dict[str, str]) -> None:
    checkpoint, port = make_checkpoint(tmp_path / "model"), free_port()
    inference = Shell(tmp_path / "inference", HF_HOME=str(tmp_path / "inference/hf"))
    training = Shell(tmp_path / "training", HF_HOME=str(tmp_path / "training/hf"), VLLM_API_KEY=TOKEN)
    stranger = Shell(tmp_path / "stranger", VLLM_API_KEY="")
    address = "hf://buckets/me/journeys/proxy"
    command = blocks("README.md", "bash", TITLE)[0].replace("VLLM_API_KEY=... ", "").replace(RUN, address)
    serve = on_cpu(command, checkpoint, f"--host 127.0.0.1 --port {port}")
    url = f"http://127.0.0.1:{port}"
    with inference.background("bash", "-c", serve) as log, TokenProxy(url) as proxy:
        wait_for(lambda: answers(url), log)
        training.directory.joinpath("train.py").write_text(script(checkpoint, proxy.url, address))
        training.run(here("python train.py"))
        said = training.run(here(f"hubsync verify --server {proxy.url}"))
        assert f"serves version {STEPS}" in said
        refused = stranger.run(here(f"hubsync status --server {proxy.url}"), fails=True)
        assert "wants an API key, and none was given" in refused
    assert any(path.startswith("/v1/hubsync") for path in proxy.passed)
    assert not any("collective_rpc" in path for path in proxy.passed), "development mode is off"


def script(checkpoint: Path, url: str, address: str) -> str:
    """README's trainer, for a tiny model."""
    (text,) = [block for block in blocks("README.md", "python", TITLE) if "GRPOTrainer(" in block]
    small = f"max_steps={STEPS}, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to='none', "
    small += "learning_rate=1e-4, per_device_train_batch_size=16, num_generations=8, max_completion_length=6, "
    small += "output_dir='out', "
    for written, here_ in (
        ('"Qwen/Qwen3-0.6B"', repr(str(checkpoint))),
        ("learning_rate=1e-6, ", small),
        (TRAINER_URL, url),
        (RUN, address),
    ):
        assert text.count(written) == 1, written
        text = text.replace(written, here_)
    task = "from hubsync.demo.task import prompts, tagged_answer as reward\ndataset = prompts(64)\n"
    return task + text
