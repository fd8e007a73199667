"""What the doctor compares: every tensor that a served model reaches, also outside of parameters and buffers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vllm_plugin.reachable import reachable_tensors


class Kernel:
    """As vLLM's: an object that is no module and keeps a packed copy of a weight."""

    __module__ = "vllm.kernels"

    def __init__(self, weight: torch.Tensor):
        self.packed = weight.t().contiguous()
        self.owner: Any = None

    def apply(self) -> None: ...


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("scale", torch.ones(2))
        self.split = [torch.zeros(1), {"key": torch.zeros(1)}]
        self.bound = Kernel(self.weight).apply
        self.partial = functools.partial(print, torch.zeros(1))
        self.again = self.weight
        self.kv_cache = [torch.zeros(4)]
        self.bound.__self__.owner = self


def test_every_tensor_is_found_once_and_caches_of_requests_are_not() -> None:
    model = torch.nn.Sequential(Layer())
    names = [name for name, _ in reachable_tensors(model)]
    assert len(names) == len(set(names))
    assert sorted(names) == [
        "0.bound.__self__.packed",
        "0.partial.args.0",
        "0.scale",
        "0.split.0",
        "0.split.1.key",
        "0.weight",
    ]
