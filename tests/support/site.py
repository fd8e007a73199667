"""A run and a real vLLM server that follows it, load on the server, and clients that die."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from hubsync.format.manifest import Position
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from vllm_plugin import compat

from .publisher import Publisher, small_steps

# Responses of vLLM 0.27 do not report which weights made which tokens, and 0.26 states no version at all.
_OLD = ("0.26", "0.27")
REPORTS_VERSIONS = find_spec("vllm") is not None and not compat.vllm_version().startswith(_OLD)
STATES_VERSION = REPORTS_VERSIONS or (find_spec("vllm") is not None and compat.vllm_version().startswith(_OLD[1]))
SCALE_OUT = ["--enable-scale-out"] if REPORTS_VERSIONS else []


@dataclass
class Site:
    """A run and a server that follows it. Each test continues where the previous one stopped."""

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

    def bring_to_newest(self) -> None:
        """Also after a test that failed half-way."""
        replica, newest = Replica(self.server), self.publisher.positions[-1]
        replica.attach()
        if replica.status().position != newest:
            replica.wait_staged(newest)
            replica.commit(newest)

    def assert_whole(self, position: Position) -> None:
        """Running, verified at `position` and labelled so, with no commit window left open."""
        replica = Replica(self.server)
        replica.wait_verified(position)
        assert replica.status().window is None
        assert not self.server.is_paused()
        assert not STATES_VERSION or self.server.weight_version() == str(position.version)


def make_site(
    root: Path, start_server: Callable[..., str], *, architecture: str = "qwen3_tied", **options: Any
) -> Site:
    """A tiny model, by default a Qwen3 with tied embeddings, and its server, which keeps its cache in `root`."""
    from .models import save_checkpoint, save_tokenizer  # imports transformers: seconds

    base = save_checkpoint(architecture, root / "base")
    save_tokenizer(base)
    publisher = Publisher(root, base)
    environment = {"HUBSYNC_CACHE": str(root / "cache"), **options.pop("environment", {})}
    url = start_server(base, bucket=publisher.address, environment=environment, **options)
    Replica(VLLMServer(url)).attach()
    return Site(publisher, url)


# --- requests ----------------------------------------------------------------------------------------


def generate(url: str, prompt: list[int], tokens: int, **sampling: Any) -> dict[str, Any]:
    """A continuation of exactly `tokens` tokens, with the versions that made it where vLLM reports them."""
    sampling = {"max_tokens": tokens, "ignore_eos": True, **sampling}
    if REPORTS_VERSIONS:
        request: dict[str, Any] = {"token_ids": prompt, "sampling_params": sampling}
        answer = httpx.post(f"{url}/inference/v1/generate", json=request, timeout=300)
    else:
        request = {"prompt": prompt, "return_token_ids": True, **sampling}
        request["model"] = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        answer = httpx.post(f"{url}/v1/completions", json=request, timeout=300)
    answer.raise_for_status()
    return {"weight_versions": [], **answer.json()["choices"][0]}


def metric(url: str, name: str) -> float:
    """The sum of one of vLLM's gauges or counters, over all engines."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"vllm:{name}{{", f"vllm:{name}_total{{")))


def wait_running(url: str) -> None:
    """Until the server works on a request."""
    while not metric(url, "num_requests_running"):
        time.sleep(0.01)


class Load:
    """Two streams of requests, one after the other, while the context is open.

    Attributes:
        answers: responses of the requests that are done.
    """

    def __init__(self, url: str):
        self.answers: list[dict[str, Any]] = []
        self._url = url
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(token,)) for token in (5, 6)]

    def _stream(self, token: int) -> None:
        while not self._ended.is_set():
            self.answers.append(generate(self._url, [token] * 20, 120))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_running(self._url)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


# --- clients that die ----------------------------------------------------------------------------------


_CLIENT = """
import os, random, signal, sys
from hubsync.format.manifest import Position
from hubsync.replicas.vllm_http import VLLMServer
from hubsync.replicas.replica import Replica

url, step, *positions = sys.argv[1:]
server = VLLMServer(url)
paused = step != "never" or random.random() < 0.5  # with a pause, a client can leave more undone
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
server.resume = then_die(server.resume, "resume")
for position in positions:
    version, digest = position.split(":")
    target = Position(int(version), digest)
    replica.wait_staged(target)
    replica.commit(target)
    replica.wait_verified(target)
    print(version, flush=True)
"""


def client(url: str, positions: list[Position], step: str = "never") -> subprocess.Popen[str]:
    """A process that brings the server to each position in turn, and kills itself after the call `step`."""
    targets = [f"{position.version}:{position.digest}" for position in positions]
    command = [sys.executable, "-c", _CLIENT, url, step, *targets]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def core_per_worker() -> dict[str, str]:
    """Environment of a server with two workers: vLLM for CPUs binds each to a core."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
