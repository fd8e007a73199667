"""A server behind NAT: its host reaches the Hub, and nobody its host. By commands of README and `examples/sft`.

The host is a network namespace, in which port 8000 is free: commands are as they are written, but for the model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from hubsync.localhub import LocalHub
from tests.support.isolated import Gate, can_isolate
from tests.support.models import save_checkpoint, save_tokenizer

from .pages import ROOT, RUN, Shell, blocks, here, on_cpu, wait_for

pytestmark = [
    pytest.mark.server,
    pytest.mark.long,
    pytest.mark.skipif(not can_isolate(), reason="network namespaces cannot be created on this machine"),
]

HOST = """
export VLLM_API_KEY=secret
health="import httpx; httpx.get('http://127.0.0.1:8000/health').raise_for_status()"
( {serve} ) > server.log 2>&1 &
until {python} -c "$health" 2>/dev/null; do sleep 1; done
{follow} &
until [ -e trained ]; do sleep 0.2; done
until {status} > status; grep -q "^version  *$(cat trained)$" status; do sleep 0.5; done
{verify} > verified
touch checked
wait
"""


def test_a_follower_behind_nat(hub_process: LocalHub, hub_environment: dict[str, str], tmp_path: Path) -> None:
    checkpoint = save_checkpoint("qwen3_tied", tmp_path / "model")
    save_tokenizer(checkpoint)
    address = "hf://buckets/me/journeys/nat"
    inference = Shell(tmp_path / "inference", VLLM_HOST_IP="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    with Gate(hub_process.url, tmp_path / "gate") as gate:
        command = gate.command(["bash", "-c", host(checkpoint, address)])
        with inference.background(*command) as log:
            seen = train(tmp_path, checkpoint, address)
            (inference.directory / "trained").write_text(str(seen["newest"]["version"]))
            wait_for((inference.directory / "checked").exists, log)
    assert f"serves version {seen['newest']['version']}" in (inference.directory / "verified").read_text()


def host(checkpoint: Path, address: str) -> str:
    """The inference host: README's server, and README's follower beside it."""
    serve = blocks("README.md", "bash", "Train with TRL, serve with vLLM, on two hosts")[0]
    (follow,) = [block for block in blocks("README.md", "bash", "Many servers: push or pull") if "follow" in block]
    server = "--server http://127.0.0.1:8000"
    assert server in follow
    return HOST.format(
        serve=on_cpu(serve.replace("VLLM_API_KEY=...", "VLLM_API_KEY=secret").replace(RUN, address), checkpoint),
        follow=here(f"{follow.strip().replace(RUN, address)} --report-status"),
        status=here(f"hubsync status {server}"),
        verify=here(f"hubsync verify {server}"),
        python=here("python ").strip(),
    )


def train(directory: Path, checkpoint: Path, address: str) -> dict:
    """The training host, by the command in the example. Returns what `hubsync watch` shows there in the end."""
    training = Shell(directory / "training")
    (training.directory / "data").mkdir()
    Dataset.from_list([{"text": f"{i} plus 1"} for i in range(8)]).to_json(training.directory / "data/train.jsonl")
    command = (ROOT / "examples/sft/train.py").read_text().partition("\npython ")[2].partition("\n\n")[0]
    for written, here_ in {
        "examples/sft": str(ROOT / "examples/sft"),
        "Qwen/Qwen3-0.6B": str(checkpoint),
        "trl-lib/Capybara": "data",
        "hf://buckets/<your-name>/rl/sft-1": address,
        "--publish_every 10": "--publish_every 2",
        "--max_steps 200": "--max_steps 4 --use_cpu --bf16 False --gradient_checkpointing False --report_to none",
        "--learning_rate 2e-5": "--learning_rate 1e-3",
    }.items():
        assert command.count(written) == 1, written
        command = command.replace(written, here_)
    training.run(here(f"python {command}"))
    return json.loads(training.run(here(f"hubsync watch {address} --once --json")))
