"""A worker extension for tests: hubsync's, and two collectives that vLLM for CPUs lacks.

Expert layers of data parallel engines need them to exchange tokens. They are slow, and only good for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

from vllm_plugin.extension import DeltaWorkerExtension


class LockstepExtension(DeltaWorkerExtension):
    """For `--worker-extension-cls`. Workers import this module, and with it the collectives, before anything runs."""


def all_gatherv(self: Any, tensors: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Gather the rows of all ranks; each rank has its own number of rows."""

    def gather(rows: torch.Tensor) -> torch.Tensor:
        counts = sizes or [len(rows)] * self.world_size
        padded = torch.zeros((max(counts), *rows.shape[1:]), dtype=rows.dtype)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.cpu_group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    return [gather(rows) for rows in tensors] if isinstance(tensors, list) else gather(tensors)


def reduce_scatterv(self: Any, rows: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """Sum over all ranks, and return this rank's rows."""
    counts = sizes or [len(rows) // self.world_size] * self.world_size
    total = rows.float().contiguous()
    dist.all_reduce(total, group=self.cpu_group)
    first = sum(counts[: self.rank_in_group])
    return total[first : first + counts[self.rank_in_group]].to(rows.dtype)


DeviceCommunicatorBase.all_gatherv = all_gatherv
DeviceCommunicatorBase.reduce_scatterv = reduce_scatterv
