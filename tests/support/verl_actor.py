"""A verl actor on a CPU: verl's own worker calls, around a small model under FSDP2.

verl's training engines are registered for GPUs only. So the training engine here is an object with a module and an
optimizer, as verl's has; group, dispatch and `update_weights` are verl's.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from verl.checkpoint_engine.base import CheckpointEngineRegistry
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker

import hubsync.integrations.verl  # noqa: F401  registers the backend, as `custom_backend_module` does


class Actor(Worker):
    """One rank.

    Args:
        base: the checkpoint to train.
        settings: of the checkpoint engine, as `engine_kwargs.hubsync`.
    """

    def __init__(self, base: str, settings: dict[str, Any]):
        super().__init__()
        distributed.init_process_group("gloo", rank=self.rank, world_size=self.world_size)
        module = AutoModelForCausalLM.from_pretrained(Path(base), dtype=torch.float32)
        fully_shard(module, mesh=distributed.init_device_mesh("cpu", (self.world_size,)))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        self.actor = SimpleNamespace(engine=SimpleNamespace(module=module, optimizer=optimizer))
        self.config = SimpleNamespace(rollout=SimpleNamespace(checkpoint_engine=SimpleNamespace(backend="hubsync")))
        self.checkpoint_engine = CheckpointEngineRegistry.new(
            "hubsync", is_master=self.rank == 0, bucket_size=1 << 20, **settings
        )

    update_weights = ActorRolloutRefWorker.update_weights
    execute_checkpoint_engine = ActorRolloutRefWorker.execute_checkpoint_engine

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def step(self) -> None:
        engine = self.actor.engine
        for parameter in engine.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        engine.optimizer.step()
