"""Tiny random checkpoints of the architectures that hubsync promises to be exact for.

Each has a vocabulary that vLLM pads, and weights large enough for greedy outputs to depend on every change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

VOCABULARY = 1003  # not a multiple of 64: vLLM pads it to 1024

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
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
    "head_dim": 32,
    "moe_intermediate_size": 96,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
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
    "mamba_d_ssm": 256,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 32,
}

# vLLM serves some of their tensors in float32, whatever dtype the checkpoint has, and computes others (`-exp(A_log)`).
MIXED: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_LATENT, q_lora_rank=32, topk_method="noaux_tc", scoring_func="sigmoid"
    ),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **_SPARSE, moe_intermediate_size=96, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_SPARSE, **_DELTA_NET, moe_intermediate_size=96, num_experts=8, shared_expert_intermediate_size=96
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(**SIZES, **_MAMBA, tie_word_embeddings=False),
}


def save_checkpoint(architecture: str, directory: Path) -> Path:
    """Write a random bf16 checkpoint of an architecture (of `CONFIGS`, `EXPERTS` or `MIXED`), without a tokenizer."""
    return save({**CONFIGS, **EXPERTS, **MIXED}[architecture](), directory)


def save(config: transformers.PretrainedConfig, directory: Path) -> Path:
    """Write a random bf16 checkpoint of any causal language model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are initialised equal: no test could see a swap
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype) * 0.02)
    model.save_pretrained(directory)
    return directory


def save_with_draft_layer(directory: Path) -> Path:
    """A Qwen2 checkpoint with one layer for multi-token prediction, named and served as in MiMo."""
    from safetensors.torch import load_file, save_file

    save_checkpoint("qwen2", directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    tensors, hidden = load_file(directory / "model.safetensors"), config["hidden_size"]
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
