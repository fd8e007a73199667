"""A laptop without a GPU: README's quick start, and the command of the quickstart for a server."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.demo.task import make_checkpoint

from .pages import ROOT, Shell, answers, blocks, free_port, here, section, wait_for

pytestmark = [pytest.mark.server, pytest.mark.long]

PLACE = Path(sys.executable).parents[1]  # stands for .venv, which `make` would build


def test_the_demo(tmp_path: Path) -> None:
    """`make demo`, with fewer steps, and the table of README's section."""
    (block,) = blocks("README.md", "bash", "Try it")
    assert re.search(r"^make demo +#", block, re.MULTILINE)
    (options,) = re.findall(r'`make demo ARGS="(.*)"`', section("README.md", "What `make demo` shows"))
    arguments = options.replace("demo.json", str(tmp_path / "demo.json")) + " --steps 6"
    make = f"make --directory={ROOT} VENV={PLACE} --old-file={PLACE}/.ready"
    shell = Shell(tmp_path / "shell", VLLM_API_KEY="")
    shell.run(f'{make} demo ARGS="{arguments}"')
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["exact"]
    assert result["commits"] == result["digest_matches"] == 6


def test_the_server_without_a_gpu(tmp_path: Path) -> None:
    """As it is written, but for the model and the port. Then the commands of the quickstart."""
    (block,) = [text for text in blocks("docs/quickstart.md", "bash", "Without a GPU") if "MODEL" in text]
    checkpoint, port = make_checkpoint(tmp_path / "model"), str(free_port())
    for written, put in (
        (".venv/bin/python", sys.executable),
        ("--model MODEL", f"--model {checkpoint} --host 127.0.0.1"),
        ("--port 8000", f"--port {port}"),
    ):
        assert block.count(written) == 1, written
        block = block.replace(written, put)
    shell = Shell(tmp_path / "shell", VLLM_API_KEY="", VLLM_PLUGINS="")
    url = f"http://127.0.0.1:{port}"
    with shell.background("bash", "-c", f"exec env {block}") as log:
        wait_for(lambda: answers(url), log)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
        run = SyncConfig(bucket=str(shell.directory / "runs/run1"), servers=[url])
        with DeltaWeightTransferEngine(model, None, run) as engine:
            model.lm_head.weight.data += 0.5
            assert len(engine.sync(1).commits) == 1
        commands = blocks("docs/quickstart.md", "bash", "One GPU")[-1].replace("http://127.0.0.1:8000", url)
        listed, status, verified = (
            shell.run(here(line.partition(" #")[0])) for line in commands.splitlines() if line.startswith("hubsync ")
        )
    assert re.search(r"^ +1 +delta .* served$", listed, re.MULTILINE), listed
    assert re.search(r"^state +ready$", status, re.MULTILINE), status
    assert "serves version 1" in verified
