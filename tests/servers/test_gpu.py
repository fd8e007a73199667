"""Real vLLM servers on a GPU: commits under load, a fresh server of the same version, rollback, sleep.

Only on machines with a GPU (`make test-gpu`). The other tests of servers run there too: they use the GPU where there is
one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from hubsync.cli.main import main
from hubsync.demo.compare import greedy
from hubsync.replicas.replica import Replica
from tests.support.models import save_tokenizer
from tests.support.on_gpu import DEVICE
from tests.support.site import Load, Site, make_site

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU"),
]

COMMITS = 20
PROMPTS = ["the lazy dog plus 17 makes " * 3, "17 plus 4 is"]
COMPILED = ["--no-enforce-eager", "--enable-sleep-mode"]


@pytest.fixture(scope="module", params=["qwen3_tied", "qwen3_moe"])
def gpu_site(
    request: pytest.FixtureRequest, start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Site:
    """A server that is compiled and uses CUDA graphs."""
    root = tmp_path_factory.mktemp("gpu")
    return make_site(root, start_server, architecture=request.param, arguments=COMPILED, max_model_len=512)


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_commits_under_load_are_verified(gpu_site: Site, kv_cache: str) -> None:
    replica = Replica(gpu_site.server, kv_cache)
    with Load(gpu_site.url) as load:
        for _ in range(COMMITS // 2):
            position = gpu_site.publish()
            replica.wait_staged(position)
            replica.commit(position)
            gpu_site.assert_whole(position)
    assert all(len(answer["token_ids"]) == 120 for answer in load.answers)


def test_a_rollback_brings_the_old_answers_back(gpu_site: Site) -> None:
    """The answers of the newest version are those of a fresh server of it, as far as two fresh servers agree."""
    gpu_site.bring_to_newest()
    old, before = gpu_site.position, greedy(gpu_site.url, PROMPTS)
    new, replica = gpu_site.publish(), Replica(gpu_site.server)
    for position in (new, old):
        replica.wait_staged(position)
        replica.commit(position)
        gpu_site.assert_whole(position)
        answers = greedy(gpu_site.url, PROMPTS)
    assert answers == before


def test_a_fresh_server_of_the_version_computes_the_same(
    gpu_site: Site, start_server: Callable[..., str], tmp_path: Path
) -> None:
    position, publisher = gpu_site.position, gpu_site.publisher
    assert main(["pull", publisher.address, str(tmp_path / "pulled"), "--version", str(position.version),
                 "--base", str(publisher.base)]) == 0  # fmt: skip
    save_tokenizer(tmp_path / "pulled")
    fresh = [start_server(tmp_path / "pulled", arguments=COMPILED) for _ in range(2)]
    ours, first, second = (greedy(url, PROMPTS) for url in (gpu_site.url, *fresh))
    assert first == second, "two fresh servers differ: no comparison is possible"
    assert ours == first


@pytest.mark.parametrize("level", [1, 2])
def test_a_server_that_slept_serves_the_version_again(gpu_site: Site, level: int) -> None:
    """At level 1 weights wait in main memory. At level 2 they are gone, and are rebuilt from the run."""
    gpu_site.bring_to_newest()
    position, before = gpu_site.position, greedy(gpu_site.url, PROMPTS)
    httpx.post(f"{gpu_site.url}/sleep", params={"level": level}, timeout=120).raise_for_status()
    httpx.post(f"{gpu_site.url}/wake_up", timeout=120).raise_for_status()
    assert greedy(gpu_site.url, PROMPTS) == before, "the first forward pass waits until the weights are right"
    gpu_site.assert_whole(position)
    newest, replica = gpu_site.publish(), Replica(gpu_site.server)
    replica.wait_staged(newest)
    replica.commit(newest)
    gpu_site.assert_whole(newest)
