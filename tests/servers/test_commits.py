"""Commits on a real vLLM server under load: both cache policies, clients that die, and vLLM's own calls.

The server has both adapters, the worker extension and the weight transfer backend, and a watchdog without patience.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from hubsync.demo.compare import greedy
from hubsync.errors import ReplicaRefused
from hubsync.format.manifest import Position
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.support.models import save_checkpoint, save_tokenizer
from tests.support.publisher import Publisher, small_steps
from vllm_plugin import compat

pytestmark = pytest.mark.server

VERSIONS = not compat.vllm_version().startswith("0.27")  # do responses tell which weights made which tokens?
PATIENCE_S = 2.0
LONG = "the lazy dog plus 17 makes " * 40  # longer than a block of the prefix cache


@dataclass
class Site:
    """A run and a server that follows it. Tests go on where the one before left off."""

    publisher: Publisher
    url: str

    @property
    def server(self) -> VLLMServer:
        return VLLMServer(self.url)

    @property
    def position(self) -> Position:
        position = Replica(self.server).status().position
        assert position is not None
        return position

    def publish(self) -> Position:
        return self.publisher.publish(self.publisher.positions[-1].version + 1, small_steps)

    def assert_whole(self, position: Position) -> None:
        replica = Replica(self.server)
        replica.wait_verified(position)
        assert replica.status().window is None
        assert not self.server.is_paused()
        assert self.server.weight_version() == str(position.version)


def make_site(root: Path, start_server: Callable[..., str], **options: Any) -> Site:
    base = save_checkpoint("qwen3_tied", root / "base")
    save_tokenizer(base)
    publisher = Publisher(root, base)
    url = start_server(base, bucket=publisher.address, **options)
    Replica(VLLMServer(url)).attach()
    return Site(publisher, url)


@pytest.fixture(scope="module")
def site(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    return make_site(
        root,
        start_server,
        environment={"HUBSYNC_WINDOW_TIMEOUT": str(PATIENCE_S), "HUBSYNC_CACHE": str(root / "cache")},
        arguments=["--weight-transfer-config", '{"backend": "hubsync"}', *(["--enable-scale-out"] if VERSIONS else [])],
    )


def generate(url: str, tokens: int, prompt: int = 5) -> dict[str, Any]:
    """A sampled continuation of exactly `tokens` tokens, with the versions that made it where vLLM tells them."""
    sampling = {"max_tokens": tokens, "ignore_eos": True}
    if VERSIONS:
        request: dict[str, Any] = {"token_ids": [prompt] * 20, "sampling_params": sampling}
        answer = httpx.post(f"{url}/inference/v1/generate", json=request, timeout=300)
    else:
        request = {"prompt": [prompt] * 20, "return_token_ids": True, **sampling}
        request["model"] = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        answer = httpx.post(f"{url}/v1/completions", json=request, timeout=300)
    answer.raise_for_status()
    return {"weight_versions": [], **answer.json()["choices"][0]}


class Load:
    """Two streams of requests, one after the other, and what they report."""

    def __init__(self, url: str):
        self.answers: list[dict[str, Any]] = []
        self._url = url
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(prompt,)) for prompt in (5, 6)]

    def _stream(self, prompt: int) -> None:
        while not self._ended.is_set():
            self.answers.append(generate(self._url, 120, prompt))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        while not running_requests(self._url):
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def running_requests(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


# --- what becomes of cached keys and values


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_no_later_request_shares_keys_and_values_of_old_weights(site: Site, kv_cache: str) -> None:
    """The long prompt is in the prefix cache before the commit, and running requests hold blocks during it."""
    before = greedy(site.url, [LONG])
    position, replica = site.publish(), Replica(site.server, kv_cache)
    replica.wait_staged(position)
    with Load(site.url):
        report = replica.commit(position)
        assert site.server.weight_version() == str(position.version)
    assert 0 < report.pause_s < 1
    after = greedy(site.url, [LONG])
    assert after != before
    site.assert_whole(position)
    assert site.server.reset_prefix_cache()
    assert greedy(site.url, [LONG]) == after, "nothing that the answer rests on was cached before the commit"


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_running_requests_go_on_and_report_both_versions(site: Site, kv_cache: str) -> None:
    old, new, replica = site.position, site.publish(), Replica(site.server, kv_cache)
    replica.wait_staged(new)
    answers: list[dict[str, Any]] = []
    request = threading.Thread(target=lambda: answers.append(generate(site.url, 400)))
    request.start()
    while not running_requests(site.url):
        time.sleep(0.01)
    replica.commit(new)
    request.join()
    if VERSIONS:
        assert [span["version"] for span in answers[0]["weight_versions"]] == [str(old.version), str(new.version)]
    assert len(answers[0]["token_ids"]) == 400


# --- clients that die


CLIENT = """
import os, random, signal, sys
from hubsync.format.manifest import Position
from hubsync.replicas.vllm_http import VLLMServer
from hubsync.replicas.replica import Replica

url, step, *positions = sys.argv[1:]
server = VLLMServer(url)
paused = step != "never" or random.random() < 0.5  # in the open, a client can leave more undone
replica = Replica(server, random.choice(("recompute", "keep")), pause=paused)

def then_die(call, name=None):
    def wrapper(*args, **kwargs):
        result = call(*args, **kwargs)
        if step in (name, *args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapper

server.rpc = then_die(server.rpc)
server.pause = then_die(server.pause, "pause")
for position in positions:
    version, digest = position.split(":")
    target = Position(int(version), digest)
    replica.wait_staged(target)
    replica.commit(target)
    replica.wait_verified(target)
    print(version, flush=True)
"""


def client(site: Site, positions: list[Position], step: str = "never") -> subprocess.Popen[str]:
    """A process that brings the server to one position after the other, and dies after a step."""
    targets = [f"{position.version}:{position.digest}" for position in positions]
    command = [sys.executable, "-c", CLIENT, site.url, step, *targets]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("step", "commits"), [("pause", False), ("hubsync_commit", True)])
def test_a_server_that_its_client_left_paused_resumes_by_itself(site: Site, step: str, commits: bool) -> None:
    old, new = site.position, site.publish()
    process = client(site, [new], step)
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert site.server.is_paused()
    deadline = time.monotonic() + 30
    while site.server.is_paused():
        assert time.monotonic() < deadline, "nobody resumes it"
        time.sleep(0.05)
    site.assert_whole(new if commits else old)
    with Load(site.url):  # it serves
        pass
    Replica(site.server).commit(new)
    site.assert_whole(new)


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.long)])
def test_many_commits_under_load_with_clients_that_die_anywhere(count: int, site: Site) -> None:
    """The digest of all live weights agrees after each commit, and no response mixes versions in any order but up."""
    dice = random.Random(0)
    first = site.position.version
    targets = [site.publish() for _ in range(count)]
    kills = 0
    with Load(site.url) as load:
        while (done := site.position.version - first) < count:
            process = client(site, targets[done:])
            assert process.stdout is not None
            for _ in range(dice.randint(2, 12)):
                if not process.stdout.readline():
                    break
            time.sleep(dice.uniform(0, 0.15))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    Replica(site.server).attach()
    site.assert_whole(targets[-1])
    assert kills >= count // 15
    for answer in load.answers:
        versions = [int(span["version"]) for span in answer["weight_versions"]]
        assert versions == sorted(set(versions))
    if VERSIONS:
        assert {int(span["version"]) for answer in load.answers for span in answer["weight_versions"]} > {first}


# --- vLLM's own calls


def call(site: Site, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{site.url}/{path}", json=body or None, timeout=120)


def test_vllms_own_calls_reach_the_same_session(site: Site) -> None:
    position = site.publish()
    assert call(site, "init_weight_transfer_engine", init_info={}).is_success
    assert call(site, "start_weight_update").is_success
    update = {"version": position.version, "digest": position.digest}
    assert call(site, "update_weights", update_info=update).is_success
    assert httpx.post(f"{site.url}/pause", params={"mode": "keep"}, timeout=120).is_success
    assert call(site, "finish_weight_update", weight_version=str(position.version)).is_success
    assert httpx.post(f"{site.url}/resume", timeout=120).is_success
    site.assert_whole(position)


def test_a_failed_update_is_an_error_and_labels_nothing(site: Site) -> None:
    old = site.position
    assert call(site, "start_weight_update").is_success
    failed = call(site, "update_weights", update_info={"version": 9999, "digest": old.digest})
    assert failed.status_code == 500
    assert "9999" in failed.text
    assert not call(site, "finish_weight_update", weight_version="9999").is_success
    site.assert_whole(old)
    assert call(site, "start_weight_update").is_success, "the failed update is over"
    assert not call(site, "update_weights", update_info={"bucket": "somewhere else"}).is_success
    assert not call(site, "finish_weight_update").is_success, "a failed update has ended"
    site.assert_whole(old)


# --- several stages, several engines


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_batches_on_their_way_through_pipeline_stages_are_waited_for(two_stages: Site, kv_cache: str) -> None:
    with Load(two_stages.url) as load:
        for _ in range(5):
            position, replica = two_stages.publish(), Replica(two_stages.server, kv_cache)
            replica.wait_staged(position)
            replica.commit(position)
            replica.wait_verified(position)
    two_stages.assert_whole(position)
    after = greedy(two_stages.url, [LONG])
    assert two_stages.server.reset_prefix_cache()
    assert greedy(two_stages.url, [LONG]) == after
    for answer in load.answers:
        versions = [int(span["version"]) for span in answer["weight_versions"]]
        assert versions == sorted(set(versions))


@pytest.fixture(scope="module")
def two_stages(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    root, cores = tmp_path_factory.mktemp("stages"), sorted(os.sched_getaffinity(0))
    site = make_site(
        root,
        start_server,
        environment={
            "HUBSYNC_CACHE": str(root / "cache"),
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        },
        arguments=["--pipeline-parallel-size", "2", *(["--enable-scale-out"] if VERSIONS else [])],
    )
    # vLLM for CPUs leaves out the warm-up in which later stages make their buffers, and fails at the first request.
    assert call(site, "collective_rpc", method="execute_dummy_batch").is_success
    return site


@pytest.fixture(scope="module")
def two_engines(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    root, cores = tmp_path_factory.mktemp("engines"), sorted(os.sched_getaffinity(0))
    return make_site(
        root,
        start_server,
        environment={
            "HUBSYNC_WINDOW_TIMEOUT": str(PATIENCE_S),
            "HUBSYNC_CACHE": str(root / "cache"),
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        },
        arguments=["--data-parallel-size", "2"],
    )


def test_all_data_parallel_engines_follow_and_are_heard(two_engines: Site) -> None:
    statuses = two_engines.server.rpc("hubsync_status")
    assert [status["engine"]["index"] for status in statuses] == [0, 1]
    for kv_cache in ("recompute", "keep"):
        position, replica = two_engines.publish(), Replica(two_engines.server, kv_cache)
        replica.wait_staged(position)
        assert replica.commit(position).changed > 0
        two_engines.assert_whole(position)
        assert [status["digest"] for status in two_engines.server.rpc("hubsync_status")] == [position.digest] * 2


def test_a_commit_that_no_engine_has_staged_is_refused_by_name(two_engines: Site) -> None:
    old, new = two_engines.position, two_engines.publish()
    with pytest.raises(ReplicaRefused, match="nothing is staged"):
        Replica(two_engines.server).commit(new)
    two_engines.assert_whole(old)
