"""How vLLM's kernels rearrange the weights of experts after loading: vLLM's own functions, by parameter.

The digest proves the result: a server whose weights, read back through them, are no version of the run is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_Transform = Callable[[torch.Tensor], torch.Tensor]


def expert_layouts(module: Any) -> dict[str, _Transform]:
    """Name of a parameter of this module -> the function that has rearranged it. Empty if none was."""
    isa = _cpu_kernel(module)
    if isa is not None:
        return dict.fromkeys(("w13_weight", "w2_weight"), _prepack(isa))
    backend = getattr(getattr(getattr(module, "quant_method", None), "unquantized_backend", None), "name", None)
    gated = bool(getattr(getattr(module, "moe_config", None), "is_act_and_mul", True))
    if backend == "FLASHINFER_CUTLASS" and gated:  # the default on SM120, and a choice on others
        from vllm.model_executor.layers.quantization.utils.flashinfer_utils import swap_w13_to_w31

        return {"w13_weight": swap_w13_to_w31}
    if backend == "FLASHINFER_TRTLLM":  # the default on SM10x
        return {"w13_weight": _blocks(gated, first=True), "w2_weight": _blocks(gated, first=False)}
    return {}


def _cpu_kernel(module: Any) -> str | None:
    """The instruction set that vLLM's CPU kernel has packed this layer's experts for; None if it has not."""
    experts = getattr(getattr(getattr(module, "quant_method", None), "moe_kernel", None), "fused_experts", None)
    if experts is not None and hasattr(experts, "isa") and not getattr(experts, "_use_zentorch", False):  # not in 0.27
        return str(experts.isa)
    kernel = getattr(module, "cpu_fused_moe", None)  # 0.27
    if kernel is not None and getattr(kernel, "forward_method", None) == getattr(kernel, "forward_grouped_gemm", 0):
        return str(kernel.isa)
    return None


@functools.cache
def _prepack(isa: str) -> _Transform:
    """vLLM's packing of expert weights for its grouped matrix products on CPUs: a permutation within each expert."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    return functools.partial(cpu_prepack_moe_weight, isa=isa)


@functools.cache
def _blocks(gated: bool, first: bool) -> _Transform:
    """FlashInfer's layout in blocks for TensorRT-LLM's kernels, which vLLM writes in place."""
    from vllm.model_executor.layers.quantization.utils.flashinfer_utils import (
        convert_moe_weights_to_flashinfer_trtllm_block_layout as convert,
    )

    def transform(weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.to("cuda", copy=True)
        rows, columns = weight.shape[1:]
        other = (
            (len(weight), columns, rows // 2 if gated else rows)
            if first
            else (len(weight), columns * (1 + gated), rows)
        )
        filler = blocks.new_zeros(other)
        convert({}, *((blocks, filler) if first else (filler, blocks)), is_gated_act_gemm=gated)
        return blocks.to(weight.device)

    return transform
