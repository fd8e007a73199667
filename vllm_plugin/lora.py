"""LoRA adapters in vLLM's workers: the loader, and the hook that sees vLLM load the run's adapter.

Used here: the worker's `add_lora`, and the `lora_manager` of its runner with the tables of its `_adapter_manager`;
`PEFTHelper` and `LoRARequest`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hubsync.apply.engine import AdapterHost
from hubsync.errors import ConfigError, ReplicaRefused
from hubsync.format.manifest import Run

from . import compat
from .settings import read_settings


def adapter_host_of(worker: Any) -> AdapterHost:
    """A vLLM worker as hubsync's host of an adapter. Raises as `compat.model_host_of`."""
    compat.require_supported_version(compat.vllm_version())
    config = worker.vllm_config
    if config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe:
        raise ReplicaRefused("adapters are not followed where experts are spread over data parallel engines")
    settings = read_settings(config)
    source = settings.source()
    directory = source.cache.absolute() / "adapters" / str(config.instance_id or os.getppid())
    return AdapterHost(source, LoRALoader(worker), directory, settings.lora_name)


class LoRALoader:
    """`hubsync.apply.engine.AdapterLoader` on a vLLM worker."""

    def __init__(self, worker: Any):
        self._worker = worker

    def check(self, run: Run) -> None:
        from vllm.lora.peft_helper import PEFTHelper

        assert run.adapter is not None
        config = self._worker.vllm_config.lora_config
        try:
            PEFTHelper.from_dict(dict(run.adapter.config)).validate_legal(config)
        except (ValueError, TypeError) as error:
            raise ReplicaRefused(
                f"vLLM cannot serve this run's adapter: {error} If its rank is too high, start the server with "
                f"--max-lora-rank {run.adapter.config['r']} or more"
            ) from None
        manager = self._worker.model_runner.lora_manager._adapter_manager
        supported = {
            part for name in manager.supported_lora_modules for part in manager.packed_modules_mapping.get(name, [name])
        }
        modules = {spec.name.split(".lora_")[0].rpartition(".")[2] for spec in run.table}
        if not modules <= supported:
            raise ReplicaRefused(
                f"vLLM cannot adapt {', '.join(sorted(modules - supported))} of this model, only "
                f"{', '.join(sorted(supported))}: train with these as target_modules"
            )

    def load(self, name: str, number: int, path: Path) -> None:
        from vllm.lora.request import LoRARequest

        add = getattr(self._worker.add_lora, "_hubsync_original", self._worker.add_lora)
        add(LoRARequest(name, number, str(path), load_inplace=True))

    def base(self) -> list[Any]:
        return [self._worker.model_runner.get_model()]

    def copies(self, number: int) -> dict[str, Any]:
        manager = self._worker.model_runner.lora_manager._adapter_manager
        adapter = manager.list_adapters().get(number)
        if adapter is None:
            return {}
        found: dict[str, Any] = {}
        for name, weights in adapter.loras.items():
            for side in ("lora_a", "lora_b"):
                found |= {f"{name}.{side}[{at}]": tensor for at, tensor in _tensors(getattr(weights, side, None))}
        slots = list(manager.lora_index_to_id)
        if number in slots:  # what kernels read; absent while other adapters take all slots
            slot = slots.index(number)
            for name, module in manager.modules.items():
                stacks = {key: value for key, value in vars(module).items() if key.endswith("_stacked")}
                for key, value in stacks.items():
                    found |= {f"{name}.{key}[{at}]": stack[slot] for at, stack in _tensors(value)}
        return found


def _tensors(value: Any) -> list[tuple[int, Any]]:
    """A tensor, or those of a tuple, numbered. Lists hold views of others in another order."""
    import torch

    items = value if isinstance(value, tuple) else (value,)
    return [(at, item) for at, item in enumerate(items) if isinstance(item, torch.Tensor)]


def guard_adapter(worker: Any, registered: Callable[[int, Callable[[], bool]], bool]) -> None:
    """Call `registered` when a client has vLLM load the run's adapter.

    Args:
        registered: given vLLM's number of the adapter and a function that loads it; returns whether that succeeded.
    """
    add = worker.add_lora

    @functools.wraps(add)
    def guarded_add(request: Any) -> bool:
        settings = read_settings(worker.vllm_config)
        try:
            settings.check()
        except ConfigError:  # this server follows no run
            return add(request)
        if request.lora_name != settings.lora_name:
            return add(request)
        return registered(request.lora_int_id, lambda: add(request))

    guarded_add._hubsync_original = add  # type: ignore[attr-defined]
    worker.add_lora = guarded_add
