"""More tiny checkpoints for `make test-matrix`: text models of the other families that vLLM serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from .sizes import SIZES, VOCABULARY

_BASE = {key: value for key, value in SIZES.items() if key != "head_dim"}
_UNTIED = {"tie_word_embeddings": False}
_FOUR = {"num_hidden_layers": 4}
_EXPERTS = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2}
_SMALL_EXPERTS = {**_BASE, "intermediate_size": 96, "num_experts_per_tok": 2}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
_GEMMA4 = {
    **SIZES,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LATENT = {
    **SIZES,
    **_UNTIED,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 96,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
_LLAMA4 = {**SIZES, **_FOUR, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 256}
_MAMBA1 = {
    **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "state_size": 8,  # A_log is loaded whole, and is a larger share of a tiny model
}


def of(model_type: str, /, **sizes: Any) -> Callable[[], transformers.PretrainedConfig]:
    return lambda: transformers.AutoConfig.for_model(model_type, **sizes)


DENSE: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "apertus": of("apertus", **_BASE, **_UNTIED),
    "arcee": of("arcee", **_BASE, **_UNTIED),
    "bloom": of("bloom", vocab_size=VOCABULARY, hidden_size=128, n_layer=2, n_head=4, initializer_range=0.2),
    "cohere": of("cohere", **_BASE, use_qk_norm=True),
    "cohere2": of("cohere2", **_BASE, sliding_window=128),
    "cwm": of("cwm", **SIZES | {"bos_token_id": 1, "eos_token_id": 2}, **_UNTIED, sliding_window=128),
    "ernie4_5": of("ernie4_5", **SIZES),
    "exaone4": of("exaone4", **_BASE, **_UNTIED, sliding_window=128),
    "falcon": of(
        "falcon",
        **{key: _BASE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        new_decoder_architecture=True, num_kv_heads=2, initializer_range=0.2,
    ),
    "gemma4": of("gemma4_text", **_GEMMA4),
    "glm": of("glm", **SIZES, **_UNTIED),
    "glm4": of("glm4", **SIZES, **_UNTIED),
    "gpt2": of("gpt2", vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2),
    "gpt_bigcode": of(
        "gpt_bigcode", vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2
    ),
    "gpt_neox": of("gpt_neox", **{k: v for k, v in _BASE.items() if k != "num_key_value_heads"}),
    "gptj": of("gptj", vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, n_positions=512, rotary_dim=16),
    "granite": of("granite", **_BASE, tie_word_embeddings=True),
    "hunyuan_dense": of("hunyuan_v1_dense", **SIZES, tie_word_embeddings=True),
    "jais2": of("jais2", **SIZES, **_UNTIED),
    "lfm2": of("lfm2", **_BASE, layer_types=["conv", "full_attention"]),
    "llama3": of(
        "llama", **SIZES, **_UNTIED,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
        },
    ),
    "ministral3": of("ministral3", **SIZES, **_UNTIED),
    "mistral": of("mistral", **SIZES, **_UNTIED, sliding_window=None),
    "nemotron": of("nemotron", **SIZES, **_UNTIED),
    "olmo": of("olmo", **_BASE, **_UNTIED),
    "olmo2": of("olmo2", **_BASE, **_UNTIED),
    "olmo3": of("olmo3", **_BASE, **_UNTIED, sliding_window=128),
    "opt": of(
        "opt", vocab_size=VOCABULARY, hidden_size=128, ffn_dim=352, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=128, init_std=0.2,
    ),
    "seed_oss": of("seed_oss", **SIZES, **_UNTIED),
    "smollm3": of("smollm3", **_BASE, tie_word_embeddings=True),
    "stablelm": of("stablelm", **_BASE, use_qkv_bias=True),
    "starcoder2": of("starcoder2", **_BASE),
    "vaultgemma": of("vaultgemma", **SIZES, sliding_window=128),
}  # fmt: skip

SPARSE: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "dots1": of("dots1", **SIZES, **_UNTIED, moe_intermediate_size=96, n_routed_experts=8, num_experts_per_tok=2,
                n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, sliding_window=None),
    "exaone_moe": of("exaone_moe", **SIZES, **_UNTIED, **_EXPERTS, num_shared_experts=1, first_k_dense_replace=1,
                     sliding_window=128, n_group=1, topk_group=1),
    "flex_olmo": of("flex_olmo", **_SMALL_EXPERTS, **_UNTIED, num_experts=8),
    "gemma4_moe": of(
        "gemma4_text", **_GEMMA4, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=96
    ),
    "granite_moe": of("granitemoe", **_SMALL_EXPERTS, num_local_experts=8, tie_word_embeddings=True),
    "granite_moe_shared": of(
        "granitemoeshared", **_SMALL_EXPERTS, num_local_experts=8, shared_intermediate_size=96, tie_word_embeddings=True
    ),
    "hunyuan_moe": of("hunyuan_v1_moe", **SIZES, num_experts=8, moe_topk=2),
    "kimi_k2": of("deepseek_v3", **_LATENT),
    "llama4": of("llama4_text", **_LLAMA4, **_UNTIED, interleave_moe_layer_step=2, attention_chunk_size=128),
    "olmoe": of("olmoe", **_SMALL_EXPERTS, **_UNTIED, num_experts=8),
    "phimoe": of("phimoe", **_SMALL_EXPERTS, **_UNTIED, num_local_experts=4),
    "qwen2_moe": of(
        "qwen2_moe", **_BASE, **_UNTIED, **_EXPERTS, shared_expert_intermediate_size=96, decoder_sparse_step=1
    ),
}  # fmt: skip

HYBRID: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "falcon_mamba": of("falcon_mamba", **_MAMBA1),
    "jamba": of(
        "jamba", **_BASE | _FOUR, num_experts=4, num_experts_per_tok=2, attn_layer_period=4, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=16, mamba_dt_rank=8, use_mamba_kernels=False,
        **_UNTIED,
    ),
    "mamba": of("mamba", **_MAMBA1),
    "qwen3_5_text": of("qwen3_5_text", **SIZES | _FOUR, **_DELTA_NET),
}  # fmt: skip

# What vLLM reads from config.json, and real ones have, but transformers' configs do not write.
ADDED: dict[str, dict[str, Any]] = {
    "kimi_k2": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "model_type": "kimi_k2"},
    "lfm2": {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 352},
}
