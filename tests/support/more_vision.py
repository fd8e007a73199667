"""More tiny checkpoints for `make test-matrix`: vision-language models of the other families that vLLM serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from .models import rename_tensors
from .processors import ID, tokenizer
from .sizes import SIZES, VOCABULARY

_BASE = {key: value for key, value in SIZES.items() if key != "head_dim"}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_QWEN = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}
_SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
_GLM = {
    "image_token_id": ID["<|image|>"],
    "video_token_id": ID["<|video|>"],
    "image_start_token_id": ID["<|begin_of_image|>"],
    "image_end_token_id": ID["<|end_of_image|>"],
    "video_start_token_id": ID["<|begin_of_video|>"],
    "video_end_token_id": ID["<|end_of_video|>"],
}
_GLM_TEXT = {
    "attention_bias": True,
    "rope_parameters": {**_SECTIONS, "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5},
}
_GLM_TOWER = {
    "depth": 2, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 128, "intermediate_size": 96, "image_size": 56,
}  # fmt: skip


def _of(model_type: str, /, **parts: Any) -> Callable[[], transformers.PretrainedConfig]:
    return lambda: transformers.AutoConfig.for_model(model_type, **parts)


CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen2_vl": _of(
        "qwen2_vl", text_config={**_BASE, "rope_parameters": _SECTIONS},
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 4}, **_QWEN,
    ),
    "qwen2_5_vl": _of(
        "qwen2_5_vl", text_config={**_BASE, "rope_parameters": _SECTIONS},
        vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128,
                       "fullatt_block_indexes": [1]}, **_QWEN,
    ),
    "gemma3_vl": _of(
        "gemma3", text_config={**SIZES, "sliding_window": 128}, vision_config={**_SIGLIP, "vision_use_head": False},
        mm_tokens_per_image=4, boi_token_index=ID["<start_of_image>"], eoi_token_index=ID["<end_of_image>"],
        image_token_index=ID["<image_soft_token>"],
    ),
    "gemma4_vl": _of(
        "gemma4",
        text_config={**SIZES, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY,
                     "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={"model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 128,
                       "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
                       "position_embedding_size": 64, "default_output_length": 4},
        audio_config=None, boi_token_id=ID["<start_of_image>"], eoi_token_id=ID["<end_of_image>"],
        image_token_id=ID["<image_soft_token>"], video_token_id=ID["<|video|>"], boa_token_id=ID["<|audio_start|>"],
        eoa_token_index=ID["<|audio_end|>"], audio_token_id=ID["<audio_soft_token>"],
    ),
    "llama4_vl": _of(
        "llama4",
        text_config={**SIZES, "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 1,
                     "intermediate_size_mlp": 256, "interleave_moe_layer_step": 1, "attention_chunk_size": 128},
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
                       "vision_output_dim": 64, "image_size": 56, "patch_size": 14, "projector_input_dim": 64,
                       "projector_output_dim": 64},
        boi_token_index=ID["<|image_start|>"], eoi_token_index=ID["<|image_end|>"], image_token_index=ID["<|patch|>"],
    ),
    "mistral3": _of(
        "mistral3", text_config={**SIZES, "model_type": "mistral", "tie_word_embeddings": False},
        vision_config={**_SIGLIP, "head_dim": 16}, image_token_index=ID["[IMG]"], tie_word_embeddings=False,
    ),
    "glm4v": _of("glm4v", text_config={**_BASE, **_GLM_TEXT}, vision_config=_GLM_TOWER, **_GLM),
    "glm4v_moe": _of(
        "glm4v_moe",
        text_config={**SIZES, **_GLM_TEXT, "moe_intermediate_size": 96, "n_routed_experts": 8, "n_shared_experts": 1,
                     "use_qk_norm": False,
                     "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        vision_config=_GLM_TOWER, **_GLM,
    ),
    "idefics3": _of(
        "idefics3", text_config={**_BASE, "model_type": "llama"}, vision_config=_SIGLIP, image_token_id=ID["<image>"],
        pad_token_id=0,
    ),
    "internvl": _of(
        "internvl", text_config={**_BASE, "model_type": "qwen2"}, image_token_id=ID["<IMG_CONTEXT>"],
        vision_config={**_SIGLIP, "image_size": [56, 56], "patch_size": [14, 14]}, image_seq_length=4,
    ),
}  # fmt: skip


def complete(architecture: str, directory: Path) -> None:
    """Add a processor, and give tensors the names that real checkpoints have."""
    _PROCESSORS[architecture]().save_pretrained(directory)
    if architecture == "gemma3_vl":
        rename_tensors(directory, "vision_tower.", "vision_tower.vision_model.")


def _qwen(name: str) -> Any:
    fast = tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>", vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )  # fmt: skip
    sizes = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
    return getattr(transformers, name)(
        tokenizer=fast, image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes), chat_template=fast.chat_template,
    )  # fmt: skip


def _gemma3() -> Any:
    fast = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    image = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    return transformers.Gemma3Processor(image_processor=image, tokenizer=fast, image_seq_length=4)


def _gemma4() -> Any:
    fast = tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
        video_token="<video>", audio_token="<audio_soft_token>", boa_token="<|audio_start|>",
        eoa_token="<|audio_end|>",
    )  # fmt: skip
    return transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(), tokenizer=fast,
        image_processor=transformers.Gemma4ImageProcessor(), video_processor=transformers.Gemma4VideoProcessor(),
    )  # fmt: skip


def _llama4() -> Any:
    image = transformers.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=1)
    return transformers.Llama4Processor(
        image_processor=image, tokenizer=tokenizer(), patch_size=14, pixel_shuffle_ratio=0.5,
        fake_image_token="<|image|>", image_token="<|image|>", start_of_image_token="<|image_start|>",
        end_of_image_token="<|image_end|>", patch_token="<|patch|>",
    )  # fmt: skip


def _mistral3() -> Any:
    image = transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return transformers.PixtralProcessor(
        image_processor=image, tokenizer=tokenizer(), patch_size=14, spatial_merge_size=2, image_token="[IMG]"
    )


def _glm() -> Any:
    fast = tokenizer(
        image_token="<|image|>", video_token="<|video|>", image_start_token="<|begin_of_image|>",
        image_end_token="<|end_of_image|>",
    )  # fmt: skip
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    return transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(size=size), tokenizer=fast,
        video_processor=transformers.Glm4vVideoProcessor(size=size),
    )  # fmt: skip


def _idefics3() -> Any:
    fast = tokenizer(
        image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}}
    image = transformers.Idefics3ImageProcessor(**sizes)
    return transformers.Idefics3Processor(image_processor=image, tokenizer=fast, image_seq_len=4)


def _internvl() -> Any:
    fast = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, max_patches=2),
        tokenizer=fast, video_processor=transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
    )  # fmt: skip


_PROCESSORS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VLProcessor"),
    "gemma3_vl": _gemma3,
    "gemma4_vl": _gemma4,
    "llama4_vl": _llama4,
    "mistral3": _mistral3,
    "glm4v": _glm,
    "glm4v_moe": _glm,
    "idefics3": _idefics3,
    "internvl": _internvl,
}
