"""HF Jobs: what `deploy/jobs` starts is accepted by the installed huggingface_hub. No job is started."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[2]


def test_the_three_jobs_are_accepted() -> None:
    """`hf jobs run --dry-run` prints what it would submit."""
    if not (Path(sys.executable).parent / "hf").exists():
        pytest.skip("huggingface_hub has no command here")
    done = subprocess.run(
        ["bash", "deploy/jobs/launch.sh", "--dry-run"],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NAMESPACE": "me",
            "HF_TOKEN": "hf_x",
            "VLLM_API_KEY": "secret-key",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(dry run) Job not submitted.") == 3
    for word in ("server-a", "server-b", "trainer", "hf://buckets/me/rl/run1", "./dist:/dist", "four_servers/train.py"):
        assert word in done.stdout, done.stdout
    assert "secret-key" not in done.stdout + done.stderr


def hf_commands() -> list[list[str]]:
    """Arguments of each `hf` command on the pages of `deploy`."""
    lines = [line for page in sorted((ROOT / "deploy").rglob("*.md")) for line in page.read_text().splitlines()]
    written = [line for line in lines if line.startswith("hf ")] + re.findall(r"`(hf \w+ \w[^`]*)`", "\n".join(lines))
    return [shlex.split(line)[1:] for line in written]


@pytest.mark.parametrize("words", hf_commands(), ids=" ".join)
def test_commands_of_the_pages_are_accepted(words: list[str]) -> None:
    """Parsed by the command line of the installed huggingface_hub, and not run."""
    from huggingface_hub.cli.hf import app

    command, parent = app, None
    while isinstance(command, click.Group):
        parent = command.make_context(command.name, list(words), parent=parent)
        name, command, words = command.resolve_command(parent, words)
        assert command is not None, name
    if words != ["--dry-run"]:  # `hf jobs run --dry-run`, without the rest
        command.make_context(command.name, list(words), parent=parent)
