"""Commits on real vLLM servers with pipeline stages, and with several data parallel engines."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from hubsync.demo.compare import greedy
from hubsync.errors import ReplicaRefused
from hubsync.replicas.replica import Replica
from tests.support.site import SCALE_OUT, Load, Site, core_per_worker, make_site

pytestmark = pytest.mark.server

LONG = "the lazy dog plus 17 makes " * 40  # longer than a block of the prefix cache


@pytest.fixture(scope="module")
def two_stages(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = make_site(
        tmp_path_factory.mktemp("stages"),
        start_server,
        environment=core_per_worker(),
        arguments=["--pipeline-parallel-size", "2", *SCALE_OUT],
    )
    # vLLM for CPUs leaves out the warm-up in which later stages make their buffers, and fails at the first request.
    call = {"method": "execute_dummy_batch"}
    assert httpx.post(f"{site.url}/collective_rpc", json=call, timeout=120).is_success
    return site


@pytest.mark.parametrize("kv_cache", ["recompute", pytest.param("keep", marks=pytest.mark.long)])
def test_a_commit_waits_for_batches_between_pipeline_stages(two_stages: Site, kv_cache: str) -> None:
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
def two_engines(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(
        tmp_path_factory.mktemp("engines"),
        start_server,
        environment=core_per_worker(),
        arguments=["--data-parallel-size", "2"],
    )


def test_all_data_parallel_engines_follow_and_answer(two_engines: Site) -> None:
    statuses = two_engines.server.rpc("hubsync_status")
    assert [status["engine"]["index"] for status in statuses] == [0, 1]
    for kv_cache in ("recompute", "keep"):
        position, replica = two_engines.publish(), Replica(two_engines.server, kv_cache)
        replica.wait_staged(position)
        assert replica.commit(position).changed > 0
        two_engines.assert_whole(position)
        assert [status["digest"] for status in two_engines.server.rpc("hubsync_status")] == [position.digest] * 2


def test_a_commit_that_no_engine_has_staged_is_refused(two_engines: Site) -> None:
    old, new = two_engines.position, two_engines.publish()
    with pytest.raises(ReplicaRefused, match="nothing is staged"):
        Replica(two_engines.server).commit(new)
    two_engines.assert_whole(old)
