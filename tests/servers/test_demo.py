"""`hubsync demo`: GRPO with TRL against a real vLLM server, exact after every step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.server


def demo(directory: Path, steps: int) -> Any:
    """The demo's report."""
    report = directory / "report.json"
    command = [sys.executable, "-m", "hubsync.cli.main", "demo", "--steps", str(steps)]
    subprocess.run(
        [*command, "--workdir", str(directory / "work"), "--json", str(report)], check=True, timeout=900 + 10 * steps
    )
    return json.loads(report.read_text())


def assert_exact(result: Any, steps: int) -> None:
    assert result["exact"]
    assert result["commits"] == result["digest_matches"] == steps
    assert result["payload_bytes"] < result["dense_bytes"] / 20


def test_the_demo_trains_with_trl_and_is_exact(tmp_path: Path) -> None:
    assert_exact(demo(tmp_path, 3), 3)


@pytest.mark.long
def test_the_whole_demo_learns_and_is_exact(tmp_path: Path) -> None:
    result = demo(tmp_path, 80)
    assert_exact(result, 80)
    assert result["reward_last"] > result["reward_first"]
