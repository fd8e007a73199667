"""What vLLM can do with weights that a commit in place cannot follow. Refused by name, before anything is written.

What is not known by name is found by values: see `hubsync.apply.copies`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hubsync.errors import ReplicaRefused


def refuse_configuration(config: Any) -> None:
    """ReplicaRefused, with the option to change, for a configuration of vLLM that hubsync cannot be exact with."""
    reason = next(_of_configuration(config), None)
    if reason is not None:
        raise ReplicaRefused(f"this server {reason}")


def refuse_modules(models: Iterable[torch.nn.Module]) -> None:
    """ReplicaRefused for modules that compute with copies of weights.

    Args:
        models: the served module, and a draft, from whatever checkpoint it is.
    """
    for model in models:
        for path, module in model.named_modules():
            reason = next(_of_module(module), None)
            if reason is not None:
                raise ReplicaRefused(f"{path}: this server {reason}")


def _of_configuration(config: Any) -> Iterator[str]:
    """Why it cannot be followed, as the rest of a sentence. Fields that this vLLM does not have are not set."""
    parallel = config.parallel_config
    if _field(parallel, "enable_eplb") or _field(parallel, "enable_elastic_ep"):
        yield "moves experts between workers; start it without --enable-eplb and elastic EP"
    if str(_field(parallel, "all2all_backend")).lower() == "moonep":
        yield "replaces the weights of experts (MoonEP); start it with another --all2all-backend"
    if str(_field(config, "load_config", "load_format")).lower() == "ipc_cache":
        yield (
            "shares its weights with other engines (vllm preload), which a commit would change too; start it without "
            "--load-format ipc_cache"
        )
    if _field(config, "offload_config", "uva", "cpu_offload_gb") or _field(config.cache_config, "cpu_offload_gb"):
        yield "keeps weights in host memory; start it without --cpu-offload-gb"  # the latter before vLLM 0.28
    prefetches = _field(config, "offload_config", "offload_backend") == "prefetch"
    if prefetches or _field(config, "offload_config", "prefetch", "offload_group_size"):
        yield "fetches weights layer by layer; start it without --offload-group-size"
    if _field(config, "ec_transfer_config") is not None:
        yield (
            "shares outputs of its encoders with others, which keep those of old weights; start it without "
            "--ec-transfer-config"
        )
    if config.quant_config is not None:
        yield f"quantises its weights ({config.model_config.quantization}); serve the run's own dtype"
    if config.lora_config is not None:
        yield "runs with LoRA, which wraps the layers; start it without --enable-lora"


def _of_module(module: Any) -> Iterator[str]:
    """Why this module, as it is after loading, cannot be followed, as the rest of a sentence."""
    if _has_other_sinks(module):
        yield (
            "computes with a float32 copy of attention sinks (FlashInfer), which a commit would not change; start it "
            "with --attention-backend TRITON_ATTN"
        )
    if _field(module, "is_amx_bmm_enabled"):  # packed copies alone are left; `keep_linears_live` does not prevent that
        yield "packs the weights of latent attention (MLA) for AMX; start it with --attention-backend CPU_MLA"
    if isinstance(_field(module, "W_K_scale"), torch.Tensor):
        yield (
            "quantises the absorbed matrices of latent attention (MLA); start it with VLLM_ROCM_USE_AITER_FP8BMM=0 and "
            "VLLM_ROCM_USE_AITER_FP4BMM=0 in its environment"
        )
    if isinstance(_field(module, "W_UK_T_dcp_qrep"), torch.Tensor):
        yield ("keeps matrices of latent attention (MLA) that other workers hold; start it with --no-dcp-q-replicate")
    if _field(module, "_moonep_weight_layout") is not None:
        yield "has replaced the weights of experts (MoonEP); start it with another --all2all-backend"
    if type(module).__name__ == "ConstantExpertSubstitution":
        yield "replaces experts by constants, which are no weights of the run; serve the run's base model"
    if _is_quantised_online(module):
        yield (
            "computes with a quantised copy of a weight, as vLLM makes one for the head of a draft; start it without "
            "quantisation in --speculative-config"
        )


def _has_other_sinks(module: Any) -> bool:
    """Does the layer's attention read other memory for its sinks than their parameter?"""
    source, used = _field(module, "impl", "_sinks_source"), _field(module, "impl", "sinks")
    return (
        isinstance(source, torch.Tensor)
        and isinstance(used, torch.Tensor)
        and source.untyped_storage().data_ptr() != used.untyped_storage().data_ptr()
    )


def _is_quantised_online(module: Any) -> bool:
    """Was it quantised after loading, in a server that quantises nothing else?"""
    kinds = type(_field(module, "quant_method")).__mro__
    return any(kind.__name__ in ("OnlineLinearBase", "OnlineMoEMethodBase") for kind in kinds)


def _field(owner: Any, *names: str) -> Any:
    """An attribute of an attribute, or None."""
    for name in names:
        owner = getattr(owner, name, None)
    return owner
