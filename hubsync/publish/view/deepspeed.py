"""What DeepSpeed's engine, optimizers and parameters are. It is never imported for that.

Facts of DeepSpeed 0.19: its engine holds the model as `module`. Its optimizers step masters of their own with a torch
optimizer, and copy these into the model. A parameter that ZeRO-3 has partitioned (`zero/partition_parameters.py`) is
empty in the module; `ds_shape` is its own shape. `ds_tensor` is what this rank keeps of its elements in row-major
order: `ds_tensor.ds_numel` of them from rank x `ds_tensor.ds_numel` on, of which those behind the end of the parameter
are padding. The optimizer writes to it. The parameter itself is filled while a forward or backward pass needs it, and
never read here.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hubsync.errors import ConfigError

from .shards import Box


def is_deepspeeds(thing: object) -> bool:
    """Whether DeepSpeed has made this engine or optimizer."""
    return type(thing).__module__.startswith("deepspeed.")


def steps_masters(optimizer: object) -> bool:
    """Whether this is DeepSpeed's optimizer, or a wrapper of accelerate's around it."""
    while optimizer is not None and not is_deepspeeds(optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer is not None


def is_partitioned(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")


class Partition(torch.Tensor):
    """A partitioned parameter as it is published: in its own shape, of which this rank holds a run of elements.

    `shards.local_part` gives these, flat; other operations are refused.

    Attributes:
        parameter: DeepSpeed's.
        box: the run, counted in the flat parameter.

    Raises:
        ConfigError: the run is in no memory, but on a disk.
    """

    parameter: torch.Tensor
    box: Box

    @staticmethod
    def __new__(cls, name: str, parameter: Any) -> Partition:
        kept = parameter.ds_tensor
        made: Partition = torch.Tensor._make_wrapper_subclass(
            cls, tuple(parameter.ds_shape), dtype=kept.dtype, device=kept.device, requires_grad=parameter.requires_grad
        )
        total, size = math.prod(parameter.ds_shape), int(kept.ds_numel)
        start = min(torch.distributed.get_rank(parameter.ds_process_group) * size, total)
        made.parameter, made.box = parameter, Box((start,), (min(size, total - start),))
        if not kept.is_floating_point():
            raise ConfigError(f"{name} is quantized by DeepSpeed ({kept.dtype}): set zero_quantized_weights to false")
        if kept.numel() < made.box.numel:
            raise ConfigError(
                f"{name} is offloaded by DeepSpeed to a disk: offload parameters to the CPU, or to nowhere"
            )
        return made

    def __init__(self, name: str, parameter: Any):
        """All is done in `__new__`, as torch wants it."""

    def to_local(self) -> torch.Tensor:
        """The elements that this rank holds, flat, where DeepSpeed keeps them."""
        kept: torch.Tensor = self.parameter.ds_tensor  # type: ignore[attr-defined]
        return kept.view(-1)[: self.box.numel]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} on a partitioned parameter: take its local_part")
