"""Random histories of publishers and replicas that die, stall, lag and meet faults: exact, or loud."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and sends its children signals"),
]

FOLLOWER_KILLED = 16  # a seed that promises it
RUNS = int(os.environ.get("HUBSYNC_CHAOS_RUNS", "50"))


def chaos(*arguments: str) -> Any:
    """A process of its own: it must not have started a thread before it forks."""
    command = [sys.executable, "-m", "benchmarks.chaos", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=3600)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_every_replica_is_exact_or_says_that_it_is_not_in_service() -> None:
    kinds = set(chaos("--kinds"))
    report = chaos("--json", "--runs", str(RUNS))
    assert report["failures"] == []
    assert report["silent_divergence"] == 0
    assert report["runs"] == RUNS
    assert len(kinds) > RUNS or set(report["histories_by_fault"]) == kinds


def test_who_gives_up_says_so_and_goes_on_once_the_fault_has_ended() -> None:
    """Each kind of fault outlasts all tries of publisher, server and follower once."""
    kinds = set(chaos("--endless", "--kinds"))
    report = chaos("--json", "--endless", "--runs", str(len(kinds)))
    assert report["failures"] == []
    assert report["silent_divergence"] == 0
    assert kinds <= set(report["histories_by_fault"])


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_a_real_server_is_exact_or_says_that_it_is_not_in_service() -> None:
    """Its follower is killed in the history, and it is compared with a server of the last checkpoint."""
    report = chaos("--json", "--vllm", "--runs", "1", "--seed", str(FOLLOWER_KILLED))
    assert report["failures"] == []
    assert report["silent_divergence"] == report["out_of_service"] == 0
    assert "follower killed" in report["histories_by_fault"]


def test_the_judge_sees_one_bit_that_flips_after_the_last_verification() -> None:
    report = chaos("--json", "--runs", "6", "--plant")
    assert report["silent_divergence"] == 6
    assert report["silent_divergence_seeds"] == sorted(failure["seed"] for failure in report["failures"])
    assert all("1 bytes of down" in failure["what"] for failure in report["failures"])
