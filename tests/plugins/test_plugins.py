"""A package extends hubsync through entry points alone: a bucket scheme, an inference engine, a metric, a command.

The package is `toy_package`, next to this file: two directories on the path, as pip would install them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.cli.main import main
from hubsync.publish import metrics

PACKAGE = Path(__file__).parent / "toy_package"


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(PACKAGE))
    monkeypatch.setenv("TOY_ROOT", str(tmp_path))
    metrics._registered.cache_clear()
    yield
    metrics._registered.cache_clear()


@pytest.mark.usefixtures("_installed")
def test_a_metric_that_fails_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert metrics.of_packages(None) == {}
    assert "the metric 'megabytes' is left out: AttributeError" in caplog.text


@pytest.mark.usefixtures("_installed")
def test_a_run_is_published_and_served_with_plugins_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hubsync_toy.engine import NullServer

    model = torch.nn.Linear(4, 4)
    config = SyncConfig(bucket="toy://x", servers=["null://engine"], name="toy")
    with DeltaWeightTransferEngine(model, None, config) as engine:
        torch.nn.init.ones_(model.weight)
        report = engine.sync(1)
    assert NullServer.served["null://engine"] == report.published.position
    assert metrics.of_packages(report)["megabytes"] == report.published.payload_bytes / 1e6
    assert main(["ls", "toy://x"]) == 0
    assert "toy" in capsys.readouterr().out.splitlines()[-1]
    assert main(["newest", "toy://x"]) == 0
    assert capsys.readouterr().out == "1\n"
    follow = ["follow", "--bucket", "toy://x", "--server", "null://other", "--cache", str(tmp_path / "cache")]
    assert main([*follow, "--once"]) == 0
    assert NullServer.served["null://other"] == report.published.position


def hubsync_help(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])}
    return subprocess.run([sys.executable, "-m", "hubsync", "--help"], capture_output=True, text=True, env=environment)


def test_the_help_lists_commands_of_packages() -> None:
    assert "newest    print the newest version of a run" in hubsync_help(PACKAGE).stdout


@pytest.mark.parametrize(
    ("entry", "warning"),
    [
        ("broken = nowhere", "hubsync: the command 'broken' cannot be loaded from nowhere: No module named 'nowhere'"),
        ("ls = nowhere", "hubsync: ignoring the command 'ls' of nowhere: hubsync has a command of that name"),
    ],
)
def test_a_broken_command_is_left_out_with_a_warning(tmp_path: Path, entry: str, warning: str) -> None:
    information = tmp_path / "broken-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[hubsync.commands]\n{entry}\n")
    shown = hubsync_help(tmp_path)
    assert shown.returncode == 0
    assert shown.stderr == warning + "\n"
    assert "list the versions of a run" in shown.stdout
