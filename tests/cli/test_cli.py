"""What a user gets who types something wrong: one line, an exit code, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.cli.main import main


@pytest.fixture
def address(tmp_path: Path) -> str:
    """A run of one version whose name looks like markup."""
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
def test_a_wrong_use_is_explained_in_one_line(
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
    ["", "list", "ls", "show {run} x", "show {run} 100000000", "pull {run} out --version -1", "ls {run} --limit -5"],
)
def test_a_wrong_command_line_shows_its_usage(address: str, capsys: pytest.CaptureFixture[str], words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([word.format(run=address) for word in words.split()])
    assert ended.value.code == 2
    assert "usage: hubsync" in capsys.readouterr().err


def test_a_name_is_shown_as_it_was_given(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", address]) == 0
    assert "grpo [lr=1e-6] [/x] :smile:" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error(address: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        ended = subprocess.run(
            [sys.executable, "-m", "hubsync.cli.main", "ls", address], stdout=nobody, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (1, "")
