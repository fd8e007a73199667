"""Random histories of publishers and replicas that die, stall, lag and meet faults.

Every replica must be exact, or report that it is out of service. `benchmarks/README.md` describes the histories.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and sends signals to its children"),
]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

# A history in which the follower of a real server is killed, and that restarts the server never: each start takes long.
FOLLOWER_KILLED = 4177

# Seeds of faults that outlast all tries, one of each effect: a status that is retried and one that is not, a dropped
# connection, a lost answer, corrupted bytes, late names, and a storage that says nothing.
ENDLESS = {
    "hub 503 without end": 4,
    "hub 403 without end": 8,
    "connection dropped without end": 12,
    "answer lost without end": 13,
    "bytes corrupted without end": 15,
    "names late without end": 17,
    "storage silent without end": 19,
}


def chaos(*arguments: object) -> Any:
    """The report. A process of its own, because it must not have started a thread before it forks."""
    command = [sys.executable, "-m", "benchmarks.chaos", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=3600)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def assert_exact(report: Any) -> None:
    assert report["failures"] == []
    assert report["silent_divergence"] == 0


def test_every_replica_is_exact_or_reports_that_it_is_out_of_service() -> None:
    """Twelve histories share all kinds of events. With these seeds every event finds what it strikes."""
    report = chaos("--json", "--cover", "--runs", 12, "--seed", 60)
    assert_exact(report)
    assert report["runs"] == 12
    assert set(report["histories_by_fault"]) == set(chaos("--kinds"))


@pytest.mark.long
def test_replicas_are_exact_or_out_of_service_in_random_histories() -> None:
    report = chaos("--json", "--runs", 100)
    assert_exact(report)
    assert set(report["histories_by_fault"]) == set(chaos("--kinds"))


def test_clients_report_a_lasting_fault_and_recover_after_it() -> None:
    """The fault outlasts all tries of publisher, server and follower."""
    report = chaos("--json", "--endless", "--only", *ENDLESS.values())
    assert_exact(report)
    assert ENDLESS.keys() <= report["histories_by_fault"].keys()


@pytest.mark.long
def test_clients_report_every_kind_of_lasting_fault_and_recover_after_it() -> None:
    kinds = set(chaos("--endless", "--kinds"))
    report = chaos("--json", "--endless", "--runs", len(kinds))
    assert_exact(report)
    assert kinds <= set(report["histories_by_fault"])


@needs_vllm
def test_a_real_server_is_exact_in_a_random_history() -> None:
    """Its follower is killed on the way, and at the end it is compared with a server of the last checkpoint."""
    report = chaos("--json", "--vllm", "--only", FOLLOWER_KILLED)
    assert_exact(report)
    assert report["out_of_service"] == 0
    assert "follower killed" in report["histories_by_fault"]


@pytest.mark.long
@needs_vllm
def test_real_servers_are_exact_in_random_histories() -> None:
    assert_exact(chaos("--json", "--vllm", "--runs", 6, "--seed", 10, "--jobs", 1))


def test_the_judge_detects_one_bit_that_flips_after_the_last_verification() -> None:
    report = chaos("--json", "--runs", 2, "--plant")
    assert report["silent_divergence"] == 2
    assert report["silent_divergence_seeds"] == sorted(failure["seed"] for failure in report["failures"])
    assert all("1 bytes of down" in failure["what"] for failure in report["failures"])
