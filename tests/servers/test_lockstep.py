"""Data parallel engines that share a model with experts: each forward pass is a collective of all engines.

So a commit needs a pause, all workers of all engines vote together, and engines that a client left paused must all
resume by themselves. The experts are sliced: with whole experts in each engine (`--enable-expert-parallel`) vLLM's
kernel for CPUs crashes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from hubsync.demo.compare import greedy
from hubsync.errors import ReplicaRefused
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.support.models import SIZES, save, save_tokenizer
from tests.support.publisher import Publisher
from tests.support.site import Site, client, core_per_worker

pytestmark = pytest.mark.server

# Engines finish up to 32 forward passes together before they are all paused; on two busy cores that takes seconds.
PATIENCE_S = 10.0

PROMPTS = ["the quick brown fox", "the lazy dog plus 17 makes " * 40]


@pytest.fixture(scope="module")
def lockstep(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("lockstep")
    sizes = {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    base = save(transformers.Qwen3MoeConfig(**SIZES, **sizes), root / "base")
    save_tokenizer(base)
    publisher = Publisher(root, base)
    url = start_server(
        base,
        bucket=publisher.address,
        environment={
            **core_per_worker(),
            "HUBSYNC_WINDOW_TIMEOUT": str(PATIENCE_S),
            "HUBSYNC_CACHE": str(root / "cache"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        },
        arguments=["--data-parallel-size", "2", "--worker-extension-cls", "tests.support.lockstep.LockstepExtension"],
    )
    Replica(VLLMServer(url)).attach()
    return Site(publisher, url)


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_engines_in_lockstep_commit_in_a_window(lockstep: Site, kv_cache: str) -> None:
    before = greedy(lockstep.url, PROMPTS)
    position, replica = lockstep.publish(), Replica(lockstep.server, kv_cache)
    replica.wait_staged(position)
    assert not replica.status().atomic
    with pytest.raises(ReplicaRefused, match="pause it first"):
        lockstep.server.rpc("hubsync_commit", position.version, position.digest, kv_cache)
    replica.commit(position)
    lockstep.assert_whole(position)
    assert greedy(lockstep.url, PROMPTS) != before


@pytest.mark.parametrize(("step", "commits"), [("pause", False), ("hubsync_commit", True)])
def test_engines_in_lockstep_all_resume_by_themselves(lockstep: Site, step: str, commits: bool) -> None:
    old, new = lockstep.position, lockstep.publish()
    assert client(lockstep.url, [new], step).wait(timeout=120) == -signal.SIGKILL
    assert lockstep.server.is_paused()
    deadline = time.monotonic() + 30
    while lockstep.server.is_paused():
        assert time.monotonic() < deadline, "the watchdog does not resume it"
        time.sleep(0.05)
    lockstep.assert_whole(new if commits else old)
    greedy(lockstep.url, PROMPTS)
    Replica(lockstep.server).commit(new)
    lockstep.assert_whole(new)
    greedy(lockstep.url, PROMPTS)
