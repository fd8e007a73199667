"""Megatron-Core itself: what the layout in `examples/megatron` publishes of it, from ranks that gather nothing.

Megatron-Core is made for GPUs. What needs CUDA is replaced here, so that its model, its tensor and expert parallelism
and its distributed optimizer run on CPUs over gloo. `make test-extras` installs it.
"""

from __future__ import annotations

import contextlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hubsync import DeltaWeightTransferEngine, SyncConfig
from tests.publish.test_ranks import follow
from tests.support.tiny import same_bits
from tests.support.training import run, watched

pytestmark = pytest.mark.extras

layout_of = runpy.run_path(str(Path(__file__).parents[2] / "examples/megatron/layout.py"))["layout_of"]

WORDS, EXPERTS = 61, 4


class OnCpu(TorchFunctionMode):
    """Stands in for a GPU: what Megatron makes on "cuda" is on the CPU, and says that it is on "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        made = func(*args, **kwargs)
        return made.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and isinstance(made, str) else made


def trains(rank: int, address: str, tp: int, ep: int) -> tuple[list[int], dict[str, torch.Tensor], set[str]]:
    with OnCpu(), _without_cuda():
        return _trains(rank, address, tp, ep)


def _trains(rank: int, address: str, tp: int, ep: int) -> tuple[list[int], dict[str, torch.Tensor], set[str]]:
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    mpu.initialize_model_parallel(tensor_model_parallel_size=tp, expert_model_parallel_size=ep)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    model = _model(tp, ep)
    buckets = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(model.config, buckets, model)
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-2, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(settings, [wrapped])
    changed, collectives = [], {}
    layout = layout_of(WORDS, tp, tp_rank, mpu.get_expert_model_parallel_rank())
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address), layout=layout) as engine:
        for step in range(1, 3):
            _step(wrapped, optimizer, step)
            with watched() as watch:
                changed.append(engine.publish(step).result().changed)
            collectives |= watch.collectives
    return changed, {name: tensor.detach().clone() for name, tensor in model.named_parameters()}, set(collectives)


def _model(tp: int, ep: int) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    experts = None if ep == 1 else EXPERTS
    moe: dict[str, Any] = {"num_moe_experts": experts, "moe_router_topk": 2, "expert_model_parallel_size": ep}
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=48,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        tensor_model_parallel_size=tp,
        bf16=True,
        params_dtype=torch.bfloat16,
        **(moe if experts else {}),
    )
    torch.manual_seed(1)
    spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=True, normalization="RMSNorm")
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=64,  # a multiple of what Megatron pads to
        max_sequence_length=16,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def _step(model: Any, optimizer: Any, seed: int) -> None:
    from megatron.core.distributed import finalize_model_grads

    torch.manual_seed(seed)
    tokens = torch.randint(0, WORDS, (2, 8))
    mask = torch.triu(torch.ones(8, 8, dtype=torch.bool), 1)[None, None]
    model.zero_grad_buffer()
    optimizer.zero_grad()
    model(tokens, torch.arange(8).expand(2, 8), mask, labels=tokens).float().mean().backward()
    finalize_model_grads([model])
    assert optimizer.step()[0]


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(moe_utils, "te_general_gemm", None, raising=False)  # 0.16.1 forgets it without Transformer Engine
        patch.setattr(random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
        yield


def joined(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The checkpoint, put together as Megatron's converters do, from the parameters of all tensor parallel ranks."""
    found: dict[str, torch.Tensor] = {}
    for name, first in ranks[0].items():
        parts = [parameters[name] for parameters in ranks]
        out = name.replace("decoder.layers", "model.layers")
        if "linear_qkv" in name:
            grouped = torch.cat(parts).view(4, 4, 4, 32)  # groups; two queries, a key and a value; head size
            for part, heads in (("q", grouped[:, :2]), ("k", grouped[:, 2]), ("v", grouped[:, 3])):
                found[out.replace("self_attention.linear_qkv", f"self_attn.{part}_proj")] = heads.reshape(-1, 32)
        elif "linear_fc1" in name:
            halves = [part.chunk(2) for part in parts]
            for number, part in enumerate(("gate", "up")):
                found[out.replace("linear_fc1", f"{part}_proj")] = torch.cat([half[number] for half in halves])
        elif "linear_fc2" in name:
            found[out.replace("linear_fc2", "down_proj")] = torch.cat(parts, 1)
        elif "linear_proj" in name:
            found[out.replace("self_attention.linear_proj", "self_attn.o_proj")] = torch.cat(parts, 1)
        elif "word_embeddings" in name or "output_layer" in name:
            found["lm_head.weight" if "output" in name else "model.embed_tokens.weight"] = torch.cat(parts)[:WORDS]
        else:
            for old, new in (
                ("self_attention.q_layernorm", "self_attn.q_norm"),
                ("self_attention.k_layernorm", "self_attn.k_norm"),
                ("pre_mlp_layernorm", "post_attention_layernorm"),
                ("decoder.final_layernorm", "model.norm"),
                ("mlp.router", "mlp.gate"),
            ):
                out = out.replace(old, new)
            found[out] = first
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def renumbered(parameters: dict[str, torch.Tensor], ep: int, ep_rank: int) -> dict[str, torch.Tensor]:
    """With the numbers of its experts among those of all ranks."""

    def number(found: re.Match[str]) -> str:
        return f"experts.{int(found[1]) + ep_rank * EXPERTS // ep}"

    return {re.sub(r"experts\.local_experts\.(\d+)", number, name): tensor for name, tensor in parameters.items()}


@pytest.mark.parametrize(("ranks", "tp", "ep"), [(2, 2, 1), (4, 2, 1), (2, 1, 2)])
def test_what_megatrons_ranks_publish_is_the_checkpoint(ranks: int, tp: int, ep: int, tmp_path: Path) -> None:
    outcomes = run(ranks, trains, tmp_path / "run", tp, ep)
    changed, _, collectives = outcomes[0]
    assert min(changed) > 1000
    view = follow(tmp_path / "run", tmp_path)
    assert view.position.version == 2
    held = [parameters for _, parameters, _ in outcomes]
    if ep > 1:
        held = [{k: v for rank in range(ep) for k, v in renumbered(held[rank], ep, rank).items()}]
    assert same_bits(view.tensors, joined(held[:tp]))
    assert collectives == {"allgather_.default"}, "of outcomes, not of weights"
