"""What a rank of a Megatron-Core GPT model holds of a Llama or Qwen checkpoint, with tensor, pipeline, data and expert
parallelism (`SequentialMLP`). docs/trainers.md shows the use."""

from collections.abc import Callable, Iterator
from typing import Any

from hubsync import Cut


def layout_of(vocabulary: int, tp: int, tp_rank: int, ep_rank: int = 0) -> Callable[[Any], Iterator[Cut]]:
    def split(name: str, weight: Any, dim: int) -> Cut:
        shape, offset = list(weight.shape), [0] * weight.dim()
        shape[dim], offset[dim] = tp * weight.shape[dim], tp_rank * weight.shape[dim]
        return Cut(name, weight, shape, offset)

    def words(name: str, weight: Any) -> Cut:  # Megatron adds rows, which are no part of the checkpoint
        first = tp_rank * len(weight)
        return Cut(name, weight[: max(0, vocabulary - first)], (vocabulary, weight.shape[1]), (first, 0))

    def norm(name: str, module: Any, fused: Any = None) -> Iterator[Cut]:  # Transformer Engine fuses it into a layer
        found = (getattr(module, "weight", None), getattr(fused, "layer_norm_weight", None))
        return (Cut(f"{name}.weight", weight) for weight in found if weight is not None)

    def attention(name: str, module: Any, config: Any) -> Iterator[Cut]:
        size, groups = config.kv_channels, config.num_query_groups
        queries = config.num_attention_heads // groups  # in a group, followed by its key and its value
        fused = module.linear_qkv.weight.view(groups // tp, queries + 2, size, -1)
        for group, weight in enumerate(fused, tp_rank * len(fused)):
            for part, first, heads in (("q", 0, queries), ("k", queries, 1), ("v", queries + 1, 1)):
                rows, total = weight[first : first + heads].flatten(0, 1), groups * heads * size
                yield Cut(f"{name}.{part}_proj.weight", rows, (total, rows.shape[1]), (group * heads * size, 0))
        yield split(f"{name}.o_proj.weight", module.linear_proj.weight, 1)
        yield from (*norm(f"{name}.q_norm", module.q_layernorm), *norm(f"{name}.k_norm", module.k_layernorm))

    def mlp(name: str, module: Any) -> Iterator[Cut]:
        for part, rows in zip(("gate", "up"), module.linear_fc1.weight.chunk(2), strict=True):
            yield split(f"{name}.{part}_proj.weight", rows, 0)
        yield split(f"{name}.down_proj.weight", module.linear_fc2.weight, 1)

    def cuts(model: Any) -> Iterator[Cut]:
        if model.pre_process:
            yield words("model.embed_tokens.weight", model.embedding.word_embeddings.weight)
        for layer in model.decoder.layers:
            name, dense = f"model.layers.{layer.layer_number - 1}", getattr(layer.mlp, "linear_fc1", None)
            yield from norm(f"{name}.input_layernorm", layer.input_layernorm, layer.self_attention.linear_qkv)
            yield from attention(f"{name}.self_attn", layer.self_attention, model.config)
            yield from norm(f"{name}.post_attention_layernorm", layer.pre_mlp_layernorm, dense)
            if dense is not None:
                yield from mlp(f"{name}.mlp", layer.mlp)
                continue
            yield Cut(f"{name}.mlp.gate.weight", layer.mlp.router.weight)
            experts = layer.mlp.experts.local_experts
            for number, expert in enumerate(experts, ep_rank * len(experts)):
                yield from mlp(f"{name}.mlp.experts.{number}", expert)
        if model.post_process:
            yield from norm("model.norm", model.decoder.final_layernorm)
        if model.post_process and not model.share_embeddings_and_output_weights:
            yield words("lm_head.weight", model.output_layer.weight)

    return cuts
