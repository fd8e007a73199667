"""What one turn promises, on a real vLLM server: nobody is answered from keys and values of old weights, exactly.

The prefix cache of vLLM for CPUs has blocks of 128 tokens, and requests here are longer than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from hubsync.replicas.replica import Replica
from tests.servers.test_commits import VERSIONS, Site, make_site

pytestmark = pytest.mark.server

BLOCK = 128


@pytest.fixture(scope="module")
def site(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("turns")
    environment = {"HUBSYNC_CACHE": str(root / "cache")}
    arguments = ["--enable-scale-out"] if VERSIONS else []
    return make_site(root, start_server, environment=environment, arguments=arguments)


@pytest.fixture
def staged(site: Site) -> Iterator[Callable[[str], None]]:
    """Something to commit; with a cache policy."""
    position = site.publish()
    Replica(site.server).wait_staged(position)
    yield lambda kv_cache: Replica(site.server, kv_cache).commit(position) and None
    site.assert_whole(position)


def greedy(site: Site, prompt: list[int], tokens: int) -> dict[str, Any]:
    """A continuation of exactly `tokens` tokens, with the versions that made it where vLLM tells them."""
    sampling = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    if VERSIONS:
        request: dict[str, Any] = {"token_ids": prompt, "sampling_params": sampling}
        answer = httpx.post(f"{site.url}/inference/v1/generate", json=request, timeout=300)
    else:
        request = {"prompt": prompt, "return_token_ids": True, **sampling}
        request["model"] = httpx.get(f"{site.url}/v1/models", timeout=60).json()["data"][0]["id"]
        answer = httpx.post(f"{site.url}/v1/completions", json=request, timeout=300)
    answer.raise_for_status()
    return answer.json()["choices"][0]


def counter(site: Site, name: str) -> float:
    lines = httpx.get(f"{site.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"vllm:{name}{{", f"vllm:{name}_total{{")))


def cached_tokens(site: Site, prompt: list[int]) -> int:
    """How much of a prompt is answered from the prefix cache. Afterwards all of it is there."""
    before = counter(site, "prefix_cache_hits")
    greedy(site, prompt, 1)
    return int(counter(site, "prefix_cache_hits") - before)


def running(site: Site, prompt: list[int], tokens: int) -> tuple[ThreadPoolExecutor, Any]:
    """A request that has begun to answer."""
    pool, before = ThreadPoolExecutor(1), counter(site, "generation_tokens")
    future = pool.submit(greedy, site, prompt, tokens)
    deadline = time.monotonic() + 60
    while counter(site, "generation_tokens") < before + 20:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return pool, future


@pytest.mark.skipif(not VERSIONS, reason="vLLM 0.27 does not tell where the new weights begin")
def test_recomputed_requests_go_on_as_if_the_new_weights_had_read_all_of_it(site: Site, staged: Callable) -> None:
    prompt = list(range(10, 210))
    preempted = counter(site, "num_preemptions")
    pool, request = running(site, prompt, 300)
    with pool:
        staged("recompute")
        answer = request.result()
    assert counter(site, "num_preemptions") == preempted + 1
    old, new = answer["weight_versions"]
    tokens, begin = answer["token_ids"], new["start"]
    assert 0 < begin < 300, (old, new)
    assert site.server.reset_prefix_cache()
    assert greedy(site, prompt + tokens[:begin], 300 - begin)["token_ids"] == tokens[begin:]


def test_kept_requests_go_on_at_once_and_share_nothing(site: Site, staged: Callable) -> None:
    prompt = list(range(300, 500))
    assert cached_tokens(site, prompt) == 0
    assert cached_tokens(site, prompt) == BLOCK, "it would be shared"
    preempted = counter(site, "num_preemptions")
    pool, request = running(site, prompt, 300)  # fills two more blocks, after the commit
    with pool:
        staged("keep")
        assert cached_tokens(site, prompt) == 0, "nothing of before the commit is there"
        assert cached_tokens(site, prompt) == BLOCK, "that is of the new weights, and may be shared"
        answer = request.result()
    if VERSIONS:
        assert len(answer["weight_versions"]) == 2
    assert counter(site, "num_preemptions") == preempted, "it was not interrupted"
    assert cached_tokens(site, prompt + answer["token_ids"]) == BLOCK, "nothing of what it mixed is there"


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_a_prompt_that_was_cached_before_is_read_again(site: Site, staged: Callable, kv_cache: str) -> None:
    prompt = list(range(500, 800))
    assert cached_tokens(site, prompt) in (0, 2 * BLOCK)
    assert cached_tokens(site, prompt) == 2 * BLOCK
    staged(kv_cache)
    assert cached_tokens(site, prompt) == 0
