"""verl's checkpoint engine: its package, two of its actors under Ray, and a real server. `make test-extras`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from hubsync.demo.compare import greedy
from hubsync.errors import ConfigError
from tests.support.fixtures_server import Served
from tests.support.site import Load, make_site

pytestmark = [pytest.mark.extras, pytest.mark.server]

PROMPTS = ["the quick brown fox", "the lazy dog"]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True)
    yield ray
    ray.shutdown()


def actors_of(ray: Any, base: str, settings: dict[str, Any]) -> Any:
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    from tests.support.verl_actor import Actor

    made = RayClassWithInitArgs(ray.remote(Actor), base=base, settings=settings)
    return RayWorkerGroup(RayResourcePool([2], use_gpu=False, max_colocate_count=1), made, device_name="cpu")


def test_two_actors_publish_their_shards_and_verls_replicas_keep_generating(
    served: Served, ray: Any, tmp_path: Path
) -> None:
    from verl.workers.config import CheckpointEngineConfig

    from hubsync.integrations.verl import HubsyncCheckpointManager

    settings = {"bucket": served.address}
    served.engine.wait()
    actors = actors_of(ray, str(served.base), settings)
    config = CheckpointEngineConfig(backend="hubsync", engine_kwargs={"hubsync": settings})
    replica: Any = SimpleNamespace(server_address=served.url.removeprefix("http://"))  # verl's need GPUs
    manager = HubsyncCheckpointManager(config, actors, [replica])
    first = manager.update_weights(global_steps=0)
    before = greedy(served.url, PROMPTS)
    actors.step()

    with Load(served.url) as load:
        second = manager.update_weights(global_steps=1)

    assert second["weight_sync/version"] > first["weight_sync/version"]
    assert second["weight_sync/changed_fraction"] > 0
    assert {choice["finish_reason"] for choice in load.answers} == {"length"}, "no request was aborted"
    assert greedy(served.url, PROMPTS) != before
    position = served.reader(tmp_path).newest()
    assert position.version == second["weight_sync/version"]
    served.replica.wait_verified(position)


def test_verls_own_manager_is_refused_because_it_gathers(tmp_path: Path) -> None:
    from hubsync.integrations.verl import HubsyncCheckpointEngine

    engine = HubsyncCheckpointEngine(bucket=str(tmp_path))
    gathered = iter([("weight", torch.zeros(2))])
    with pytest.raises(ConfigError, match="checkpoint_manager_class"):
        asyncio.run(engine.send_weights(gathered))


def test_verls_replicas_take_both_worker_extensions_as_one(start_server: Callable[..., str], tmp_path: Path) -> None:
    site = make_site(
        tmp_path,
        start_server,
        environment={"VLLM_PLUGINS": "hubsync", "VLLM_SERVER_DEV_MODE": "1"},
        arguments=["--worker-extension-cls", "hubsync.integrations.verl_worker.WorkerExtension"],
    )
    site.assert_whole(site.publisher.positions[0])
    patch = {"method": "monkey_patch_model", "kwargs": {"vocab_size": 100}}  # as verl calls it after the start
    httpx.post(f"{site.url}/collective_rpc", json=patch, timeout=60).raise_for_status()

    position = site.publish()
    site.bring_to_newest()

    site.assert_whole(position)
