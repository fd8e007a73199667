"""The rollout sampler against a real vLLM server that commits a version while it generates."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from hubsync.lifecycle.rollouts.sampler import Sample, Sampler
from hubsync.lifecycle.rollouts.window import AdaptiveWindow
from hubsync.replicas.replica import Replica
from tests.support.site import REPORTS_VERSIONS, Site, make_site, metric

pytestmark = pytest.mark.server

PROMPTS = [[5] * 20, [6] * 20, [7] * 20, [8] * 20]


@pytest.fixture(scope="module")
def site_without_scale_out(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A server that does not report spans, and runs no more than 8 requests at once."""
    return make_site(tmp_path_factory.mktemp("site"), start_server, arguments=["--max-num-seqs", "8"])


async def samples_around_a_commit(site: Site, sampler: Sampler) -> list[Sample]:
    """Eight samples at once, and more after them. The commit happens while the first ones run."""
    new, replica = site.publish(), Replica(site.server)
    await asyncio.to_thread(replica.wait_staged, new)

    async def commit() -> None:
        while not await asyncio.to_thread(metric, site.url, "num_requests_running"):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(replica.commit, new)

    committing = asyncio.ensure_future(commit())
    sampling = sampler.sample(PROMPTS, 5, logprobs=True, max_tokens=300, ignore_eos=True, seed=1)
    samples = [sample async for sample in sampling]
    await committing
    return samples


@pytest.mark.skipif(not REPORTS_VERSIONS, reason="this vLLM does not report which weights made which tokens")
def test_samples_report_which_version_made_which_tokens_across_a_commit(site: Site) -> None:
    async def check() -> list[Sample]:
        async with Sampler([site.url], window=AdaptiveWindow(initial_window=8, max_window=8)) as sampler:
            return await samples_around_a_commit(site, sampler)

    old = site.position.version
    samples = asyncio.run(check())
    new = site.position.version
    assert new == old + 1
    assert sorted((sample.prompt, sample.k) for sample in samples) == [(i, k) for i in range(4) for k in range(5)]
    for sample in samples:
        versions = [span.version for span in sample.spans]
        assert versions in ([old], [new], [old, new])
        assert (sample.min_version, sample.max_version) == (versions[0], versions[-1])
        ends = [0, *(span.end for span in sample.spans)]
        assert [span.start for span in sample.spans] == ends[:-1]
        assert ends[-1] == len(sample.token_ids) == len(sample.logprobs or ()) == 300
    assert (old, new) in {(sample.min_version, sample.max_version) for sample in samples}
    assert (new, new) in {(sample.min_version, sample.max_version) for sample in samples}
    assert len({sample.token_ids for sample in samples}) == len(samples), "each sample has its own seed"


@pytest.mark.skipif(not REPORTS_VERSIONS, reason="this vLLM does not report which weights made which tokens")
def test_requests_that_demand_a_version_are_answered_by_no_other(site: Site) -> None:
    old, new, replica = site.position.version, site.publish(), Replica(site.server)
    replica.wait_staged(new)
    prompt = {"prompt": [5] * 20, "max_tokens": 400, "ignore_eos": True}

    def ask(header: str, version: int, **more: object) -> httpx.Response:
        headers = {f"X-Hubsync-{header}": str(version)}
        return httpx.post(f"{site.url}/v1/completions", json={**prompt, **more}, headers=headers, timeout=300)

    early = ask("Min-Version", new.version)
    assert (early.status_code, early.json()["error"]["current_version"]) == (409, old)
    with ThreadPoolExecutor(3) as pool:
        exact = pool.submit(ask, "Version", old)
        least = pool.submit(ask, "Min-Version", old)
        streamed = pool.submit(ask, "Version", old, stream=True)
        while metric(site.url, "num_requests_running") < 3:
            time.sleep(0.01)
        replica.commit(new)
    assert exact.result().status_code == 409
    assert least.result().headers["X-Hubsync-Versions"] == f"{old}-{new.version}"
    assert '"VersionConflict"' in streamed.result().text.split("data: ")[-2]
    after = ask("Version", new.version, stream=True, max_tokens=4)
    assert json.loads(after.text.split("data: ")[-2])["versions"] == [new.version, new.version]


@pytest.mark.skipif(not REPORTS_VERSIONS, reason="only token ids, before vLLM 0.32")
def test_a_text_prompt_is_answered_with_text(site: Site) -> None:
    async def check() -> list[Sample]:
        async with Sampler([site.url], window=4) as sampler:
            drawn = sampler.sample(["the lazy dog"], 16, max_tokens=8, temperature=2.0)
            return [sample async for sample in drawn]

    samples = asyncio.run(check())
    assert any(
        sample.text for sample in samples
    )  # the tokenizer knows only some of the tokens that random weights draw
    assert {(sample.min_version, sample.max_version) for sample in samples} == {(site.position.version,) * 2}


@pytest.mark.long
def test_without_scale_out_the_versions_before_and_after_a_sample_bound_its_version(
    site_without_scale_out: Site,
) -> None:
    site = site_without_scale_out

    async def check() -> list[Sample]:
        async with Sampler([site.url], window=8) as sampler:
            return await samples_around_a_commit(site, sampler)

    old = site.position.version
    samples = asyncio.run(check())
    new = site.position.version
    assert len(samples) == 20
    bounds = {(sample.min_version, sample.max_version) for sample in samples}
    assert bounds <= {(old, old), (old, new), (new, new)}
    assert bounds >= {(old, new), (new, new)}
    assert all(sample.spans == () and len(sample.token_ids) == 300 for sample in samples)


@pytest.mark.long
def test_the_window_adapts_to_what_the_server_can_run(site_without_scale_out: Site) -> None:
    url, sizes = site_without_scale_out.url, []

    async def check() -> None:
        # The length of the queue alone decides: on a slow machine every request takes long.
        window = AdaptiveWindow(initial_window=32, prefill_queue_target=600.0)
        async with Sampler([url], window=window, poll_s=0.2) as sampler:
            # Long answers, so that the engine is slower than the requests to it.
            async for _ in sampler.sample(PROMPTS, 30, max_tokens=400, ignore_eos=True):
                sizes.append(sampler.windows[url])

    asyncio.run(check())
    assert len(sizes) == 120
    assert 4 <= statistics.median(sizes[60:]) <= 20, "8 run, 4 may wait: it halves above, and grows below"
