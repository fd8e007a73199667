"""Tiny random checkpoints of vision-language models, with tokenizer and processor. Processors need torchvision."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from . import more_vision
from .models import SIZES, save_model
from .processors import ID, tokenizer

HAS_TORCHVISION = find_spec("torchvision") is not None
"""`make test-matrix` installs it beside the environment; see the Makefile."""

_TOKENS = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}
_VISION_MARKS = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 16,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
}
_EXPERTS = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2}
_HYBRID = {
    **SIZES,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": {**_ROTARY, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
}


def _config(kind: str, text: dict[str, Any], **vision: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, text_config=text, vision_config={**_TOWER, **vision}, **_TOKENS)


_SECTIONS = {**SIZES, "rope_parameters": {**_ROTARY, "mrope_section": [4, 6, 6]}}

VISION: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen3_vl": lambda: _config("qwen3_vl", _SECTIONS, deepstack_visual_indexes=[0, 1]),
    "qwen3_vl_moe": lambda: _config(
        "qwen3_vl_moe", {**_SECTIONS, **_EXPERTS, "norm_topk_prob": True}, deepstack_visual_indexes=[0, 1]
    ),
    "qwen3_5": lambda: _config("qwen3_5", _HYBRID),
    "qwen3_5_moe": lambda: _config("qwen3_5_moe", {**_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 96}),
}
ALL_VISION = {**VISION, **more_vision.CONFIGS}


def save_vision_checkpoint(architecture: str, directory: Path) -> Path:
    """Write a random bf16 checkpoint of an architecture of `ALL_VISION`, as the real ones are."""
    save_model(transformers.AutoModelForImageTextToText.from_config, ALL_VISION[architecture](), directory)
    if architecture in more_vision.CONFIGS:
        more_vision.complete(architecture, directory)
        return directory
    if architecture == "qwen3_vl_moe":  # transformers loads experts transposed, and does not save them so
        transform(directory, "mlp.experts.", lambda tensor: tensor.transpose(1, 2).contiguous())
    _save_processor(directory)
    return directory


def transform(directory: Path, words: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of a checkpoint whose names contain these words."""
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name: change(tensor) for name, tensor in tensors.items() if words in name}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _save_processor(directory: Path) -> None:
    sizes = {"min_pixels": 32 * 32, "max_pixels": 64 * 64, "patch_size": 16}
    transformers.Qwen3VLProcessor(
        tokenizer=tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>", **_VISION_MARKS),
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        video_processor=transformers.Qwen3VLVideoProcessor(**sizes),
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(directory)
