"""Real vLLM servers that pull: followers, publishers that know no servers, hosts that reach only the Hub."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pytest

from hubsync.localhub import LocalHub
from hubsync.replicas.deployment import Deployment
from tests.support.isolated import Gate, can_isolate
from tests.support.models import save_checkpoint, save_tokenizer
from tests.support.site import Load, Site

pytestmark = pytest.mark.server


@contextmanager
def following(site: Site) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hubsync.cli.main", "follow", "--json", "--interval", "0.2"]
    command += ["--bucket", site.publisher.address, "--server", site.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def commits(output: IO[str] | None) -> Iterator[dict[str, Any]]:
    assert output is not None
    events = (json.loads(line) for line in output)
    return (event for event in events if event["event"] == "commit")


def test_a_follower_commits_every_version_of_a_publisher_that_does_not_know_it(site: Site) -> None:
    with following(site) as follower, Load(site.url):
        seen = commits(follower.stdout)
        for _ in range(3):
            position = site.publish()
            commit = next(seen)
            assert (commit["version"], commit["digest"], commit["lag"]) == (position.version, position.digest, 1)
            assert 0 < commit["bytes"] < site.publisher.table.nbytes / 10
            assert commit["changed"] > 0
        site.assert_whole(position)


def test_a_restarted_follower_catches_up_in_one_commit(site: Site) -> None:
    with following(site) as follower:
        site.publish()
        next(commits(follower.stdout))
        follower.send_signal(signal.SIGKILL)
        follower.wait()
    position = [site.publish() for _ in range(3)][-1]
    with following(site) as follower:
        assert next(commits(follower.stdout))["lag"] == 3
    site.assert_whole(position)


def test_a_pushing_publisher_and_two_followers_bring_the_server_to_the_same_version(site: Site) -> None:
    deployment = Deployment([site.url])
    with following(site), following(site), Load(site.url):
        for _ in range(5):
            position = site.publish()
            deployment.hotload(position).raise_for_quorum()
            assert site.position == position
    site.assert_whole(position)
    deployment.close()


def test_a_follower_goes_back_with_the_served_version_and_forward_again(site: Site) -> None:
    older, newest = site.publish(), site.publish()
    with following(site) as follower, Load(site.url):
        seen = commits(follower.stdout)
        while next(seen)["version"] != newest.version:
            pass
        site.publisher.writer.serve(older.version)
        commit = next(seen)
        assert (commit["version"], commit["digest"], commit["lag"]) == (older.version, older.digest, -1)
        site.assert_whole(older)
        site.publisher.writer.serve(newest.version)
        assert next(seen)["digest"] == newest.digest
        site.assert_whole(newest)


# --- hosts that reach only the Hub


# A server and its follower on one host, until the input ends. A line of input restarts the server.
HOST = """
import subprocess, sys
from pathlib import Path
from urllib.parse import urlsplit
from hubsync.demo.serving import ServerProcess

model, address, log = sys.argv[1:]

def start(arguments=(), url=None):
    server = ServerProcess(Path(model), Path(log), bucket=address, arguments=arguments)
    server.url = url or server.url
    server.wait_ready()
    return server

server = start()
command = [sys.executable, "-m", "hubsync.cli.main", "follow", "--json", "--interval", "0.5"]
follower = subprocess.Popen([*command, "--bucket", address, "--server", server.url])
for _ in sys.stdin:
    server.stop()
    server = start(["--port", str(urlsplit(server.url).port)], server.url)
follower.terminate()
server.stop()
sys.exit(follower.wait())
"""

# A training process: publishes three steps, and prints the version and digest of the last.
TRAINER = """
import json, sys
import torch, transformers
from hubsync import DeltaWeightTransferEngine, SyncConfig

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=sys.argv[2])) as engine:
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3 * (torch.rand_like(parameter) < 0.05))
        engine.publish(step).result()
    print(json.dumps([engine.position.version, engine.position.digest]))
"""

needs_isolation = pytest.mark.skipif(not can_isolate(), reason="network namespaces cannot be created on this machine")


@pytest.fixture
def gate(hub_process: LocalHub, tmp_path: Path) -> Iterator[Gate]:
    with Gate(hub_process.url, tmp_path / "gate") as gate:
        yield gate


@needs_isolation
def test_an_isolated_host_reaches_the_hub_and_nothing_else(gate: Gate, hub_process: LocalHub) -> None:
    """The next test relies on this."""
    reach = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])))"
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        ports = {"hub": urlsplit(hub_process.url).port, "elsewhere": elsewhere.getsockname()[1]}
        codes = {
            name: subprocess.run(gate.command([sys.executable, "-c", reach, str(port)]), capture_output=True).returncode
            for name, port in ports.items()
        }
    assert codes == {"hub": 0, "elsewhere": 1}


@needs_isolation
def test_hosts_that_reach_only_the_hub_train_and_serve(
    gate: Gate, hub_environment: dict[str, str], tmp_path: Path
) -> None:
    """The trainer on one host, the server and its follower on another. The server restarts once, and follows again."""
    base, address = save_checkpoint("qwen3_tied", tmp_path / "base"), "hf://buckets/me/pull/run"
    save_tokenizer(base)
    environment = {**os.environ, **hub_environment, "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}

    def run(script: str, *arguments: str) -> subprocess.Popen[str]:
        command = gate.command([sys.executable, "-c", script, str(base), address, *arguments])
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    trained, _ = run(TRAINER).communicate(timeout=300)
    version, digest = json.loads(trained)
    host = run(HOST, str(tmp_path / "log"))
    assert host.stdin is not None
    try:
        seen = commits(host.stdout)
        first = next(seen)
        host.stdin.write("again\n")
        host.stdin.flush()
        second = next(seen)
    finally:
        host.stdin.close()
        code = host.wait(60)
    for commit in (first, second):
        assert (commit["version"], commit["digest"], commit["lag"]) == (version, digest, version)
    assert code == 0
