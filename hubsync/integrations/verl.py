"""hubsync as verl's checkpoint engine: no gather, no aborted request, no freed KV cache (verl >= 0.9.1).

    actor_rollout_ref.rollout:
      checkpoint_manager_class: hubsync.integrations.verl.HubsyncCheckpointManager
      checkpoint_engine:
        backend: hubsync
        custom_backend_module: hubsync.integrations.verl
        engine_kwargs:
          hubsync: {bucket: hf://buckets/me/rl/run1, servers: [http://rollouts:8000]}

verl's own manager aborts all requests, frees the KV caches, builds process groups and hands out gathered tensors at
each synchronisation. Ours asks each actor to publish what it owns, and the first one to commit on the servers, which go
on generating.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineManager, CheckpointEngineRegistry
from verl.utils.ray_utils import auto_await

from hubsync.errors import ConfigError
from hubsync.publish import metrics
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.replicas.deployment import Deployment, HotloadReport

BACKEND = "hubsync"

# verl's worker hands the training engine to `send_weights` in this mode alone, and gathered tensors in all others.
_WITH_TRAINING_ENGINE = "delta_sharded"


@CheckpointEngineRegistry.register(BACKEND)
class HubsyncCheckpointEngine(CheckpointEngine):
    """One in each actor; those in rollout workers receive nothing, because the servers follow the bucket.

    Args:
        bucket_size, is_master: verl's; not used.
        settings: of [`SyncConfig`]. Without `servers` the manager names the addresses of verl's replicas.

    Raises:
        ConfigError: a setting cannot work, or another manager hands out gathered tensors.
        BucketError: the version could not be stored. The next synchronisation contains its changes.
        ReplicaError: too few servers serve the version.
    """

    def __init__(self, bucket_size: int = 0, is_master: bool = False, **settings: Any):
        self.config = SyncConfig(**settings)
        self.engine: DeltaWeightTransferEngine | None = None
        self._deployment: Deployment | None = None

    def prepare(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Trainer and servers share a bucket and no process group."""
        return {}, {}

    def init_process_group(self, servers: list[str] | None = None) -> None:
        """Commit on these servers from now on, given as base URLs, unless the settings name others."""
        if servers is not None and not self.config.servers:
            self._close_deployment()
            self._deployment = self._deployment_of(servers)

    def finalize(self) -> None:
        """Nothing is held for one synchronisation."""

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, Any]:
        """Publish the weights of verl's training engine, and return when the servers serve them. A collective.

        Returns:
            metrics, as `weight_sync/...`.
        """
        if not isinstance(getattr(weights, "module", None), torch.nn.Module):
            raise ConfigError(
                "hubsync publishes shards, not gathered tensors: set "
                "actor_rollout_ref.rollout.checkpoint_manager_class=hubsync.integrations.verl.HubsyncCheckpointManager"
            )
        if self.engine is None:
            config = replace(self.config, servers=[], quorum=0)  # verl may add servers later
            self.engine = DeltaWeightTransferEngine(weights.module, weights.optimizer, config)
        engine = self.engine
        published = engine.ranks.together(engine.publish(global_steps).result)
        report = engine.ranks.first(lambda: self._hotload(published.position))
        values = {**metrics.of_publish(published), "version": published.version}
        values |= {} if report is None else metrics.of_commits(report.commits)
        return {f"weight_sync/{name}": value for name, value in values.items()}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Nothing: the server's plugin has written the weights already."""
        return
        yield

    def close(self) -> None:
        """Stop following the optimizer. The servers keep their version."""
        self._close_deployment()
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def _hotload(self, position: Any) -> HotloadReport | None:
        """On the first rank."""
        if self._deployment is None and self.config.servers:
            self._deployment = self._deployment_of(self.config.servers)
        if self._deployment is None:
            return None
        report = self._deployment.hotload(position, timeout=self.config.stage_timeout)
        report.raise_for_quorum()
        return report

    def _deployment_of(self, servers: list[str]) -> Deployment:
        config = self.config
        return Deployment(
            servers,
            kv_cache=config.kv_cache,
            api_key=config.api_key,
            quorum=config.quorum,
            request_timeout=config.commit_timeout,
        )

    def _close_deployment(self) -> None:
        if self._deployment is not None:
            self._deployment.close()
            self._deployment = None


class HubsyncCheckpointManager(CheckpointEngineManager):
    """Has the actors publish and commit. Replicas are neither aborted nor paused, and keep their KV caches."""

    _named: tuple[str, ...] | None = None

    @auto_await
    async def update_weights(self, global_steps: int | None = None) -> dict[str, Any]:
        """Return when the replicas serve the actors' weights.

        Returns:
            metrics of the first actor, as `weight_sync/...`.
        """
        if self.backend != BACKEND:
            raise ConfigError(f"HubsyncCheckpointManager needs checkpoint_engine.backend={BACKEND}, not {self.backend}")
        self._name_servers()
        answers = ray.get(self.actor_wg.update_weights(global_steps=global_steps, mode=_WITH_TRAINING_ENGINE))
        return next((dict(answer) for answer in answers if answer), {})

    def _name_servers(self) -> None:
        """Tell the actors the addresses of the replicas, whenever they change."""
        addresses = tuple(_url(replica.server_address) for replica in self.replicas)
        if not addresses or addresses == self._named:
            return
        actors = self.actor_wg.world_size
        calls = self.actor_wg.execute_checkpoint_engine(
            ["init_process_group"] * actors, servers=[list(addresses)] * actors
        )
        ray.get(calls)
        self._named = addresses


def _url(address: str) -> str:
    return address if "://" in address else f"http://{address}"
