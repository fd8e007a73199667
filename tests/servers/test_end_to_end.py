"""The promises, on a real vLLM server, a real bucket protocol and a training loop. Needs minutes: `-m server`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import transformers

from hubsync.bucket import Upload, open_bucket
from hubsync.chain import Layout
from hubsync.demo.compare import Greedy, greedy
from hubsync.errors import (
    BucketUnavailable,
    ObjectCorrupt,
    ObjectMissing,
    ReplicaRefused,
    ReplicaUnsuitable,
    RunMismatch,
)
from hubsync.format.manifest import Position
from hubsync.localhub import LocalHub
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.support.fixtures_server import Served
from tests.support.models import CONFIGS, save

pytestmark = pytest.mark.server

# One short, and one longer than a block of the prefix cache, so that stale keys and values would be seen.
PROMPTS = ["the quick brown fox", "the lazy dog plus 17 makes " * 40]


def generate(url: str, tokens: int) -> dict:
    """A sampled continuation of a fixed prompt that ends after exactly `tokens` tokens."""
    request = {"token_ids": list(range(5, 25)), "sampling_params": {"max_tokens": tokens, "ignore_eos": True}}
    answer = httpx.post(f"{url}/inference/v1/generate", json=request, timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]


def assert_whole(server: VLLMServer, position: Position) -> None:
    """Running, at `position`, labelled so, its live weights proven by digest, and no window left open."""
    replica = Replica(server)
    replica.wait_verified(position)
    assert replica.status().window is None
    assert not server.is_paused()
    assert server.weight_version() == str(position.version)


def test_every_step_of_a_training_loop_arrives_bit_for_bit(served: Served) -> None:
    before = greedy(served.url, PROMPTS)
    for step in range(3):
        served.train()
        report = served.engine.sync(step)
        assert report.published.changed > 0
        assert report.commits[0].position == served.engine.position
        assert_whole(served.server, served.engine.position)
    assert greedy(served.url, PROMPTS) != before


@dataclass
class Stranger:
    """A server of an anchor of the run, that is told to follow another run."""

    url: str
    address: str
    position: Position
    trained_in_place: list[Greedy]


@pytest.fixture(scope="module")
def stranger(served: Served, start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    served.train()
    served.engine.sync()
    anchor = served.engine.anchor()
    checkpoint = served.reader(tmp_path_factory.mktemp("cache")).fetch(anchor)[0].parent
    transformers.AutoTokenizer.from_pretrained(served.base).save_pretrained(checkpoint)
    address = "hf://buckets/me/stranger/run"
    url = start_server(checkpoint, bucket=address)
    return Stranger(url, address, anchor.position, greedy(served.url, PROMPTS))


def test_a_fresh_server_of_an_anchor_computes_exactly_what_the_followed_one_does(stranger: Stranger) -> None:
    assert greedy(stranger.url, PROMPTS) == stranger.trained_in_place


def test_a_server_only_attaches_to_a_run_that_its_weights_belong_to(
    stranger: Stranger, served: Served, tmp_path: Path
) -> None:
    replica, bucket = Replica(VLLMServer(stranger.url)), open_bucket(stranger.address, create=True)
    with pytest.raises(ObjectMissing, match="start the trainer"):
        replica.attach()

    def begin_run(directory: Path, **sizes: int) -> None:
        config = CONFIGS["qwen3_tied"]()
        config.update(sizes)
        bucket.delete([Layout.RUN])
        model = transformers.AutoModelForCausalLM.from_pretrained(save(config, directory))
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket=stranger.address)).close()

    begin_run(tmp_path / "wider", intermediate_size=384)
    with pytest.raises((RunMismatch, ReplicaRefused), match="mlp"):
        replica.attach()
    begin_run(tmp_path / "untrained")  # the same tensors, but the version before the first training step
    with pytest.raises(RunMismatch, match="not started from a version of the run"):
        replica.attach()
    assert greedy(stranger.url, PROMPTS) == stranger.trained_in_place


def test_requests_in_flight_finish_and_report_both_versions(served: Served) -> None:
    served.engine.sync()
    old, tokens, answers = served.engine.position.version, 400, []
    request = threading.Thread(target=lambda: answers.append(generate(served.url, tokens)))
    request.start()
    while _running_requests(served.url) == 0:
        time.sleep(0.01)
    served.train()
    served.engine.sync()
    request.join()
    spans = answers[0]["weight_versions"]
    assert [span["version"] for span in spans] == [str(old), str(old + 1)]
    assert (spans[0]["start"], spans[-1]["end"], spans[0]["end"]) == (0, tokens, spans[1]["start"])
    assert len(answers[0]["token_ids"]) == tokens


def _running_requests(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


@pytest.mark.parametrize(
    ("step", "commits"),
    [("hubsync_open", False), ("pause", False), ("hubsync_commit", True), ("resume", True)],
)
def test_a_client_killed_in_the_commit_window_leaves_a_server_that_the_next_one_completes(
    served: Served, step: str, commits: bool
) -> None:
    old = served.engine.position
    new = publish(served)
    killed = subprocess.run([sys.executable, "-c", KILLED, served.url, str(new.version), new.digest, step], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert served.replica.status().window.position == new

    assert served.replica.recover()
    assert_whole(served.server, new if commits else old)
    served.engine.sync()
    assert_whole(served.server, new)


# A client that stages and commits, and is killed right after the call that is named on its command line.
KILLED = """
import os, signal, sys
from hubsync.format.manifest import Position
from hubsync.replicas.vllm_http import VLLMServer
from hubsync.replicas.replica import Replica

url, version, digest, step = sys.argv[1:]
server = VLLMServer(url)
replica, position = Replica(server, pause=True), Position(int(version), digest)
replica.wait_staged(position)

def then_die(call, name=None):
    def wrapper(*args):
        result = call(*args)
        if step in (name, *args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapper

server.rpc = then_die(server.rpc)
server.pause = then_die(server.pause, "pause")
server.resume = then_die(server.resume, "resume")
replica.commit(position)
"""


def publish(served: Served) -> Position:
    served.train()
    return served.engine.publish().result().position


def test_a_corrupted_part_is_refused_while_the_old_weights_go_on(
    served: Served, local_hub: LocalHub, tmp_path: Path
) -> None:
    served.engine.sync()
    old, before = served.engine.position, greedy(served.url, PROMPTS)
    local_hub.fail("GET /xorbs", status=503, times=1000)  # the server, told of the new version at once, cannot fetch it
    new = publish(served)
    with pytest.raises(BucketUnavailable):
        served.replica.wait_staged(new)
    local_hub.reset()

    reader, bucket = served.reader(tmp_path), open_bucket(served.address)
    manifest = reader.manifest(new.version)
    good = reader.fetch(manifest)[0].read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    bucket.put([Upload(Layout.part(manifest, manifest.parts[0]), bytes(bad))])
    with pytest.raises(ObjectCorrupt):
        served.replica.wait_staged(new)
    with pytest.raises(ReplicaRefused):
        served.replica.commit(new)
    assert_whole(served.server, old)
    assert greedy(served.url, PROMPTS) == before

    bucket.put([Upload(Layout.part(manifest, manifest.parts[0]), good)])
    served.engine.sync()
    assert_whole(served.server, new)


def test_versions_missed_by_a_server_arrive_as_one(served: Served) -> None:
    served.engine.sync()
    version = served.engine.position.version
    for _ in range(3):
        publish(served)
    served.engine.sync()
    assert served.engine.position.version == version + 3
    assert_whole(served.server, served.engine.position)


def test_a_server_goes_back_to_an_older_version_on_request(served: Served, tmp_path: Path) -> None:
    served.engine.sync()
    old, before = served.engine.position, greedy(served.url, PROMPTS)
    served.train()
    served.engine.sync()
    served.replica.wait_staged(old)
    served.replica.commit(old)
    assert_whole(served.server, old)
    assert greedy(served.url, PROMPTS) == before
    served.engine.sync()
    assert_whole(served.server, served.engine.position)


def test_a_server_without_the_extension_is_told_apart(served: Served) -> None:
    with pytest.raises(ReplicaUnsuitable, match="worker-extension-cls"):
        served.server.rpc("hubsync_of_another_extension")


@pytest.mark.long
def test_a_server_that_is_not_in_development_mode_is_told_so(served: Served, start_server: Callable[..., str]) -> None:
    url = start_server(served.base, environment={"VLLM_SERVER_DEV_MODE": ""})
    with pytest.raises(ReplicaUnsuitable, match="VLLM_SERVER_DEV_MODE=1"):
        Replica(VLLMServer(url)).attach()


def test_the_demo_trains_with_trl_and_is_exact(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "hubsync.cli.main", "demo", "--steps", "4"]
    subprocess.run([*command, "--workdir", str(tmp_path / "work"), "--json", str(report)], check=True, timeout=900)
    result = json.loads(report.read_text())
    assert result["exact"]
    assert result["commits"] == result["digest_matches"] == 4
    assert result["payload_bytes"] < result["dense_bytes"] / 20
