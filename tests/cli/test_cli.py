"""The command line as a whole: help, wrong use, and errors as one line with an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig, __version__
from hubsync.cli.main import main


@pytest.fixture
def address(tmp_path: Path) -> str:
    """A run of one version, with a name that looks like markup."""
    model = torch.nn.Linear(4, 4)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=str(tmp_path / "bucket"))) as engine:
        torch.nn.init.ones_(model.weight)
        engine.publish(1, "grpo [lr=1e-6] [/x] :smile:")
    return str(tmp_path / "bucket")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("ls {tmp}/nowhere", "is not a directory"),
        ("ls {tmp}/file", "is not a directory"),
        ("ls {tmp}", "holds no run"),
        ("ls s3://bucket/run", "is not a bucket address"),
        ("show {run} 99", "deltas to versions 1..1"),
        ("verify {run} --base {tmp}/nowhere", "is not a directory"),
        ("verify {run} --base {tmp}/damaged", "cannot be read as a safetensors file"),
        ("pull {run} {tmp}/file", "is not empty"),
        ("pull {run} {tmp}/file/out", "{tmp}/file"),
        ("pull {run} /proc/out", "/proc"),
        ("hub --root {tmp}/file", "{tmp}/file"),
        ("hub --root=", "--root must name a directory"),
        ("hub --root {tmp}/hub --port 99999", "choose another port"),
        ("demo --steps 0", "--steps must be at least 1"),
        ("demo --workdir {tmp}/file", "{tmp}/file"),
        ("demo --workdir {tmp}/demo --json {tmp}/nowhere/out.json", "nowhere/out.json"),
    ],
)
def test_a_user_error_is_one_line_with_exit_code_1(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, says: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_text("no")
    assert main([word.format(tmp=tmp_path, run=address) for word in words.split()]) == 1
    explanation = capsys.readouterr().err
    assert explanation.startswith("hubsync: ")
    assert says.format(tmp=tmp_path) in explanation
    assert explanation.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    ["list", "ls", "show {run} x", "show {run} 100000000", "pull {run} out --version -1", "ls {run} --limit -5"],
)
def test_a_wrong_command_line_prints_its_usage(address: str, capsys: pytest.CaptureFixture[str], words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([word.format(run=address) for word in words.split()])
    assert ended.value.code == 2
    assert "usage: hubsync" in capsys.readouterr().err


def test_without_a_command_it_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "list the versions of a run" in capsys.readouterr().err


def test_the_help_of_every_command_is_light() -> None:
    """`--help` imports neither torch nor numba, nor anything else that takes long. One process for all commands."""
    code = """
import contextlib, io, sys, time
from hubsync.cli.commands import BUILT_IN
from hubsync.cli.main import main

for words in ([], *([name] for name in BUILT_IN)):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert text.getvalue().startswith("usage: hubsync"), words
heavy = {"torch", "numba", "numpy", "rich", "httpx", "requests", "huggingface_hub"} & sys.modules.keys()
assert not heavy, heavy
print(time.process_time())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 0.5, "seconds of CPU"


def test_the_package_is_a_program() -> None:
    shown = subprocess.run([sys.executable, "-m", "hubsync", "--version"], capture_output=True, text=True)
    assert shown.stdout == f"hubsync {__version__}\n"


def test_ls_prints_a_name_that_looks_like_markup_unchanged(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", address]) == 0
    assert "grpo [lr=1e-6] [/x] :smile:" in capsys.readouterr().out


def test_a_pipe_that_is_closed_early_ends_quietly(address: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        ended = subprocess.run(
            [sys.executable, "-m", "hubsync", "ls", address], stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (1, "")
