"""Layouts of experts that only GPUs have. Modules are stand-ins with attributes of vLLM, functions are its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hubsync.apply.coordinate_map import build_map
from hubsync.apply.live import LayoutHints
from hubsync.format.table import TensorSpec, TensorTable
from vllm_plugin.expert_layouts import expert_layouts


def layer(backend: str, gated: bool = True) -> Any:
    """What vLLM's layer of experts has after loading, by the kernel that was chosen."""
    method = SimpleNamespace(unquantized_backend=SimpleNamespace(name=backend), moe_kernel=None)
    return SimpleNamespace(quant_method=method, moe_config=SimpleNamespace(is_act_and_mul=gated))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.zeros(3, 8, 5, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, pairs: Any) -> None:
        for name, tensor in pairs:
            half = slice(0, 4) if name == "gate" else slice(4, 8)
            self.w13_weight.data[:, half].copy_(tensor)


@pytest.mark.server  # no server, but half of vLLM is imported
def test_swapped_halves_of_experts_are_followed() -> None:
    """FlashInfer's CUTLASS kernels, vLLM's default on SM120."""
    import vllm.model_executor.layers.fused_moe.experts  # noqa: F401 - as in a server; the function's module needs it

    swap = expert_layouts(layer("FLASHINFER_CUTLASS"))["w13_weight"]
    model, table = Experts(), TensorTable([TensorSpec(name, (3, 4, 5), "BF16") for name in ("gate", "up")])
    weights = {name: torch.randn(3, 4, 5).to(torch.bfloat16) for name in ("gate", "up")}
    model.load_weights(weights.items())
    model.w13_weight.data.copy_(swap(model.w13_weight.data))
    assert torch.equal(model.w13_weight[:, :4], weights["up"])
    coordinates = build_map([model], table, LayoutHints(relayouts={"w13_weight": swap}))
    for spec, (region,) in zip(table, coordinates.regions, strict=True):
        live = coordinates.storages[region.storage].gather(region)
        assert torch.equal(live, weights[spec.name].reshape(-1).view(torch.int16))


@pytest.mark.server
def test_layers_that_keep_their_layout_need_no_function() -> None:
    assert expert_layouts(layer("TRITON")) == {}
    assert expert_layouts(layer("FLASHINFER_CUTLASS", gated=False)) == {}
    assert expert_layouts(nn.Linear(1, 1)) == {}


@pytest.mark.server
def test_layouts_in_blocks_are_those_of_both_weights() -> None:
    """FlashInfer's kernels of TensorRT-LLM, vLLM's default on SM10x. The function itself needs such a GPU."""
    import vllm.model_executor.layers.fused_moe.experts  # noqa: F401

    assert expert_layouts(layer("FLASHINFER_TRTLLM")).keys() == {"w13_weight", "w2_weight"}
