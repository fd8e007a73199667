"""No request is answered from keys and values of old weights: exact checks on a real vLLM server.

The prefix cache of vLLM for CPUs has blocks of 128 tokens, and requests here are longer than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hubsync.replicas.replica import Replica
from tests.support.site import REPORTS_VERSIONS, Site, generate, metric

pytestmark = pytest.mark.server

BLOCK = 128


@pytest.fixture
def staged(site: Site) -> Iterator[Callable[[str], None]]:
    """A staged version, which calling the fixture with a cache policy commits."""
    position = site.publish()
    Replica(site.server).wait_staged(position)
    yield lambda kv_cache: Replica(site.server, kv_cache).commit(position) and None
    site.assert_whole(position)


def greedy(site: Site, prompt: list[int], tokens: int) -> dict[str, Any]:
    return generate(site.url, prompt, tokens, temperature=0.0)


def counter(site: Site, name: str) -> float:
    return metric(site.url, name)


def cached_tokens(site: Site, prompt: list[int]) -> int:
    """How many tokens of a prompt come from the prefix cache. Afterwards the cache has all of it."""
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


@pytest.mark.skipif(not REPORTS_VERSIONS, reason="vLLM 0.27 does not report where the new weights begin")
def test_recomputed_requests_continue_as_if_the_new_weights_had_read_all_of_it(site: Site, staged: Callable) -> None:
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


def test_kept_requests_continue_at_once_and_share_nothing(site: Site, staged: Callable) -> None:
    prompt = list(range(300, 500))
    assert cached_tokens(site, prompt) == 0
    assert cached_tokens(site, prompt) == BLOCK, "it would be shared"
    preempted = counter(site, "num_preemptions")
    pool, request = running(site, prompt, 300)  # fills two more blocks, after the commit
    with pool:
        staged("keep")
        assert cached_tokens(site, prompt) == 0, "nothing from before the commit is left"
        assert cached_tokens(site, prompt) == BLOCK, "computed by the new weights, so it may be shared"
        answer = request.result()
    if REPORTS_VERSIONS:
        assert len(answer["weight_versions"]) == 2
    assert counter(site, "num_preemptions") == preempted, "the request was not interrupted"
    assert cached_tokens(site, prompt + answer["token_ids"]) == BLOCK, "nothing that mixes versions is cached"


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_a_prompt_cached_before_the_commit_is_computed_again(site: Site, staged: Callable, kv_cache: str) -> None:
    prompt = list(range(500, 800))
    assert cached_tokens(site, prompt) in (0, 2 * BLOCK)
    assert cached_tokens(site, prompt) == 2 * BLOCK
    staged(kv_cache)
    assert cached_tokens(site, prompt) == 0
