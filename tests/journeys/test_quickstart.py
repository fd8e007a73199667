"""The quickstart, as a new user types it: the page's server, its script and its commands, without development mode.

Replaced: the model and its prompts, the port, and what needs a GPU. The Hub of the second journey is the local one.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hubsync.demo.serving import ServerProcess
from hubsync.demo.task import make_checkpoint
from hubsync.localhub import LocalHub

pytestmark = [pytest.mark.server, pytest.mark.long]

PAGE = (Path(__file__).parents[2] / "docs/quickstart.md").read_text()
ONE_GPU, TWO_HOSTS = (PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0] for title in ("One GPU", "Two hosts"))
STEPS = 3


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def patched(text: str, diff: str) -> str:
    """`text` with the lines of a diff on the page. They follow each other in `text`."""
    old = "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in " -")
    new = "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in " +")
    assert text.count(old) == 1, f"the page's diff does not fit:\n{old}"
    return text.replace(old, new)


def started(command: str, checkpoint: Path) -> ServerProcess:
    """The page's `vllm serve`, on a CPU."""
    words = shlex.split(command.replace("\\\n", " ").replace(" 2048 ", " 512 "))  # the tiny model's context
    at = words.index("vllm")
    environment = dict(word.split("=", 1) for word in words[:at])
    arguments = words[at + 3 :]
    assert words[at + 1 : at + 3] == ["serve", "Qwen/Qwen3-0.6B"]
    return ServerProcess(
        checkpoint,
        Path("server.log"),
        bucket=environment["HUBSYNC_BUCKET"],
        environment={**environment, "VLLM_SERVER_DEV_MODE": ""},
        arguments=arguments,
    )


def adapted(script: str, checkpoint: Path, url: str) -> str:
    """The page's script for a tiny model on a CPU."""
    for old, new in {
        '"Qwen/Qwen3-0.6B"': repr(str(checkpoint)),
        "Write a sentence about the number {n}.": "{n % 5} + {n % 4} =",
        "max_steps=20": f"max_steps={STEPS}, use_cpu=True, bf16=False",
        "max_completion_length=64": "max_completion_length=6",
    }.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return re.sub(r"http://[\w.]+:8000", url, script)


def run(*command: str, key: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_API_KEY": key})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def journey(server: str, script: str, address: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    key = re.search(r"VLLM_API_KEY=(\S+)", server)[1]  # type: ignore[index]
    with started(server, checkpoint) as process:
        os.environ["VLLM_API_KEY"] = key
        process.wait_ready()
        Path("train.py").write_text(adapted(script, checkpoint, process.url))
        log = run(sys.executable, "train.py", key=key)
        assert f"'weight_sync/version': '{STEPS - 1}'" in log  # of the last generation
        commands = blocks(ONE_GPU, "bash")[-1].replace("http://127.0.0.1:8000", process.url)
        said = [
            run(sys.executable, "-m", "hubsync", *words[1:], key=key)
            for line in commands.replace("./runs/run1", address).splitlines()
            if (words := shlex.split(line, comments=True))[0] == "hubsync"
        ]
    assert re.search(rf"^ +{STEPS} +delta .* served$", said[0], re.MULTILINE), said[0]
    assert re.search(r"^state +ready$", said[1], re.MULTILINE), said[1]
    assert re.search(rf"serves version {STEPS} .* bit for bit", said[2]), said[2]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("VLLM_API_KEY", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def test_one_gpu(tmp_path: Path) -> None:
    journey(blocks(ONE_GPU, "bash")[0], blocks(ONE_GPU, "python")[0], "./runs/run1", tmp_path)


def test_two_hosts(tmp_path: Path) -> None:
    of_server, of_script = blocks(TWO_HOSTS, "diff")
    server = patched(blocks(ONE_GPU, "bash")[0], of_server)
    script = patched(blocks(ONE_GPU, "python")[0], of_script)
    with LocalHub(tmp_path / "hub") as hub:
        os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN="hf_local")
        journey(server, script, "hf://buckets/you/rl/run1", tmp_path)
