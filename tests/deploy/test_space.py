"""The container of a Space: its start script, and its health check with a real server."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hubsync.localhub import LocalHub
from tests.support.fixtures_server import Served

SPACE = Path(__file__).parents[2] / "deploy/space"

# Stand in for vLLM and the follower: they write their arguments, and end when told to.
_PROGRAM = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> {log}
until [ -e {directory}/end-$(basename "$0") ]; do sleep 0.05; done
exit 7
"""


def started(directory: Path, **environment: str) -> subprocess.Popen[str]:
    for name in ("vllm", "hubsync"):
        program = directory / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(_PROGRAM.format(log=directory / "log", directory=directory))
        program.chmod(0o755)
    return subprocess.Popen(
        ["bash", str(SPACE / "start.sh")],
        env={"PATH": f"{directory / 'bin'}:{os.environ['PATH']}", **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_both(directory: Path) -> list[str]:
    while not (directory / "log").exists() or len((directory / "log").read_text().splitlines()) < 2:
        time.sleep(0.02)
    return sorted((directory / "log").read_text().splitlines())


def assert_nothing_is_left(group: int) -> None:
    while is_alive(group):
        time.sleep(0.02)


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("first", ["vllm", "hubsync"])
def test_the_container_ends_when_either_ends(first: str, tmp_path: Path) -> None:
    process = started(
        tmp_path, MODEL="me/model", HUBSYNC_BUCKET="hf://buckets/me/rl/run", VLLM_ARGUMENTS="--max-model-len 4096"
    )
    follower, server = wait_for_both(tmp_path)
    assert follower == "hubsync follow hf://buckets/me/rl/run --server http://127.0.0.1:8000"
    assert server.startswith("vllm serve me/model --host 0.0.0.0 --port 8000 ")
    assert server.endswith(" vllm_plugin.DeltaWorkerExtension --max-model-len 4096")
    (tmp_path / f"end-{first}").touch()
    assert process.wait(60) == 7
    assert_nothing_is_left(process.pid)


def test_the_container_stops_both(tmp_path: Path) -> None:
    process = started(tmp_path, MODEL="me/model", HUBSYNC_BUCKET="hf://buckets/me/rl/run")
    wait_for_both(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert_nothing_is_left(process.pid)


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    process = started(tmp_path, MODEL="me/model")
    assert "HUBSYNC_BUCKET: set it to the address" in process.communicate()[1]


@pytest.mark.server
def test_health_is_that_of_proved_weights_of_the_served_version(served: Served, local_hub: LocalHub) -> None:
    why_unhealthy = runpy.run_path(str(SPACE / "healthy.py"))["why_unhealthy"]
    served.train()
    position = served.engine.sync().published.position
    served.replica.wait_verified(position)
    local_hub.reset()
    assert why_unhealthy(served.url, served.address) is None
    assert local_hub.api_calls() <= 5, "the page states them"
    for step in range(3):
        served.train()
        served.engine.publish(step).result()
    behind = why_unhealthy(served.url, served.address)
    assert f"it serves {position}, and the run" in behind
    served.replica.wait_verified(served.engine.sync().published.position)
    assert why_unhealthy(served.url, served.address) is None
