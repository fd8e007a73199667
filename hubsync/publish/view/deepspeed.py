"""DeepSpeed's engine, optimizers and partitioned parameters, recognised without importing DeepSpeed.

Facts of DeepSpeed 0.19: its engine holds the model as `module`. Its optimizers step master copies with a torch
optimizer, and copy these into the model. A parameter partitioned by ZeRO-3 (`zero/partition_parameters.py`) is empty in
the module; `ds_shape` is its full shape. `ds_tensor` holds this rank's elements in row-major order:
`ds_tensor.ds_numel` elements from rank x `ds_tensor.ds_numel` on. Elements after the end of the parameter are padding.
The optimizer writes to `ds_tensor`. The parameter itself is filled only during a forward or backward pass, and is never
read here.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hubsync.errors import ConfigError

from .boxes import Box, Boxes, with_elements


def is_deepspeeds(thing: object) -> bool:
    """Whether this engine or optimizer is one of DeepSpeed."""
    return type(thing).__module__.startswith("deepspeed.")


def steps_masters(optimizer: object) -> bool:
    """Whether this is an optimizer of DeepSpeed, or accelerate's wrapper around one."""
    while optimizer is not None and not is_deepspeeds(optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer is not None


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 has partitioned this parameter."""
    return hasattr(tensor, "ds_id")


class Partition(torch.Tensor):
    """A partitioned parameter in its full shape, of which this rank holds a run of elements.

    `shards.local_part` returns these elements, flat. All other operations raise TypeError.

    Attributes:
        parameter: the parameter of DeepSpeed.
        box: the run, counted in the flat parameter.

    Raises:
        ConfigError: the run is quantized, or offloaded to a disk.
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
                f"{name} is offloaded by DeepSpeed to a disk: offload parameters to the CPU, or not at all"
            )
        return made

    def __init__(self, name: str, parameter: Any):
        """`__new__` does everything: torch requires it for wrapper subclasses."""

    @property
    def boxes(self) -> Boxes:
        return with_elements([self.box])

    def to_local(self) -> torch.Tensor:
        """The elements that this rank holds, flat, in DeepSpeed's memory."""
        kept: torch.Tensor = self.parameter.ds_tensor  # type: ignore[attr-defined]
        return kept.view(-1)[: self.box.numel]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} on a partitioned parameter: take its local_part")
