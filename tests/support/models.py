"""Tiny random checkpoints of the architectures that hubsync promises to be exact for.

Each has a vocabulary that vLLM pads, and weights large enough for greedy outputs to depend on every change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from . import more_models
from .sizes import SIZES, VOCABULARY

__all__ = ["SIZES", "VOCABULARY"]

_IMPLIED_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**_IMPLIED_HEAD_DIM, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=False),
    "qwen3_tied": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, sliding_window=128),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=128),
    "phi3": lambda: transformers.Phi3Config(**_IMPLIED_HEAD_DIM, tie_word_embeddings=False),
}

_SPARSE = {**SIZES, "num_experts_per_tok": 2, "tie_word_embeddings": False}

_LATENT = {
    **_SPARSE,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 96,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 512,  # with the next, a size that vLLM computes attention for
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

# Mixtures of experts; vLLM for CPUs permutes the weights of experts after loading.
EXPERTS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_SPARSE, moe_intermediate_size=96, num_experts=8),
    "mixtral": lambda: transformers.MixtralConfig(**_SPARSE, num_local_experts=4),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**_LATENT, q_lora_rank=None, topk_method="greedy"),
    "gpt_oss": lambda: transformers.GptOssConfig(**{**_SPARSE, "intermediate_size": 128}, num_local_experts=4),
}


_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 32,
}
_UNTIED = {**SIZES, "tie_word_embeddings": False}
_EXPERTS = {**_SPARSE, "moe_intermediate_size": 96}
_NO_LAYERS = {key: value for key, value in _UNTIED.items() if key != "num_hidden_layers"}
_NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

# vLLM serves some of their tensors in float32, whatever dtype the checkpoint has, and computes others (`-exp(A_log)`).
MIXED: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**_LATENT, q_lora_rank=32, **_NOAUX),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **_EXPERTS, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1
    ),
    "glm4_moe_lite": lambda: transformers.Glm4MoeLiteConfig(
        **_LATENT, q_lora_rank=32, mlp_layer_types=["dense", "sparse"]
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_EXPERTS, **_DELTA_NET, num_experts=8, shared_expert_intermediate_size=96
    ),
    "minimax_m2": lambda: transformers.MiniMaxM2Config(
        **{**_SPARSE, "intermediate_size": 96}, num_local_experts=8, rotary_dim=16
    ),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **SIZES, moe_intermediate_size=96, moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1
    ),
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
        **_IMPLIED_HEAD_DIM | {"num_hidden_layers": 3}, moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2,
        num_dense_layers=1, layer_types=["conv", "full_attention", "conv"],
    ),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **SIZES | {"num_hidden_layers": 4, "intermediate_size": 256}, sliding_window=128, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY, laurel_rank=8, activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(**_UNTIED, **_MAMBA, mamba_d_ssm=256),
    "granite_hybrid": lambda: transformers.GraniteMoeHybridConfig(
        **_IMPLIED_HEAD_DIM | {"intermediate_size": 96}, **_MAMBA, mamba_expand=2, num_local_experts=8,
        num_experts_per_tok=2, shared_intermediate_size=96, layer_types=["linear_attention", "full_attention"],
        position_embedding_type="rope", tie_word_embeddings=True,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **_NO_LAYERS, layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"], ssm_state_size=32,
        mamba_num_heads=8, mamba_head_dim=32, n_groups=2, chunk_size=32,
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")},
        bos_token_id=None, eos_token_id=None, pad_token_id=0, num_heads=8, head_dim=32, state_size=32, n_groups=2,
        chunk_size=32,
    ),
}  # fmt: skip

# What vLLM reads from config.json, and real ones have, but transformers' configs do not write.
_ADDED = {
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "deepseek_v3": _NOAUX,
    **more_models.ADDED,
}

MORE = {**more_models.DENSE, **more_models.SPARSE, **more_models.HYBRID}


def save_checkpoint(architecture: str, directory: Path) -> Path:
    """Write a random bf16 checkpoint of an architecture of `CONFIGS`, `EXPERTS`, `MIXED` or `MORE`. No tokenizer."""
    save({**CONFIGS, **EXPERTS, **MIXED, **MORE}[architecture](), directory)
    extend_config(directory, _ADDED.get(architecture, {}))
    return directory


def extend_config(directory: Path, added: dict[str, Any]) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | added, indent=1))


def rename_tensors(directory: Path, old: str, new: str) -> None:
    """Replace a part of the names of a checkpoint's tensors."""
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def save(config: transformers.PretrainedConfig, directory: Path) -> Path:
    """Write a random bf16 checkpoint of any causal language model."""
    return save_model(transformers.AutoModelForCausalLM.from_config, config, directory)


def save_model(make: Callable[..., Any], config: transformers.PretrainedConfig, directory: Path) -> Path:
    """Write a random bf16 checkpoint of the model that an auto class makes of a config."""
    torch.manual_seed(0)
    model = make(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are initialised equal: no test could see a swap
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype) * 0.02)
    model.save_pretrained(directory)
    return directory


def save_with_draft_layer(directory: Path) -> Path:
    """A Qwen2 checkpoint with one layer for multi-token prediction, named and served as in MiMo."""
    from safetensors.torch import load_file, save_file

    save_checkpoint("qwen2", directory)
    extend_config(directory, {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1})
    tensors, hidden = load_file(directory / "model.safetensors"), SIZES["hidden_size"]
    layer, draft = "model.layers.0.", "model.mtp_layers.0."
    shapes = {draft + name.removeprefix(layer): tensors[name].shape for name in tensors if name.startswith(layer)}
    shapes |= {f"{draft}{name}_layernorm.weight": torch.Size([hidden]) for name in ("token", "hidden")}
    shapes[f"{draft}final_layernorm.weight"] = torch.Size([hidden])
    shapes[f"{draft}input_proj.weight"] = torch.Size([hidden, 2 * hidden])
    for name, shape in shapes.items():
        tensors[name] = torch.randn(shape).to(torch.bfloat16) * 0.05
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def save_tokenizer(directory: Path, vocabulary: int = 1000) -> int:
    """Train a byte-level BPE tokenizer with a chat template, add it to a checkpoint, and return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        f"the quick brown fox jumps over {i} lazy dogs plus {j} makes {i + j}" for i in range(40) for j in range(40)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
    )
    fast.chat_template = (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(directory)
    return len(fast)
