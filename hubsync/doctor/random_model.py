"""A checkpoint with random weights, made of a model's configuration, as a real one would be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hubsync.errors import ConfigError
from hubsync.format.checkpoint import shards_of

Tensors = dict[str, torch.Tensor]

_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json")


def _with_inner_tower(tensors: Tensors) -> Tensors:
    outer, inner = "vision_tower.", "vision_tower.vision_model."
    return {name.replace(outer, inner) if outer in name else name: tensor for name, tensor in tensors.items()}


def _with_transposed_experts(tensors: Tensors) -> Tensors:
    return {n: t.transpose(1, 2).contiguous() if "mlp.experts." in n else t for n, t in tensors.items()}


_AS_RELEASED: dict[str, Callable[[Tensors], Tensors]] = {
    "gemma3": _with_inner_tower,
    "qwen3_vl_moe": _with_transposed_experts,
}
"""Model types that transformers 5.19 saves otherwise than their releases are, which vLLM loads."""


def make_random_checkpoint(source: Path, directory: Path) -> Path:
    """Write a checkpoint with random weights to `directory`, for a `config.json` or a directory with one.

    Other files of the directory are copied: tokenizer and processor, which vision-language models cannot do without.

    Raises:
        ConfigError: transformers has no such model, or files are missing.
    """
    import transformers

    config_dir = source if source.is_dir() else source.parent
    try:
        config = transformers.AutoConfig.from_pretrained(config_dir)
        torch.manual_seed(0)
        model = _auto_class(config).from_config(config, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"transformers cannot build a language model from {source}: {error}") from None
    require_processor(config_dir)
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, norms and biases are constant and would hide a swap
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype) * 0.02)
    model.save_pretrained(directory)
    for file in filter(is_side_file, config_dir.iterdir()):
        if not (directory / file.name).exists():
            shutil.copy(file, directory)
    if (as_released := _AS_RELEASED.get(config.model_type)) is not None:
        for shard in shards_of(directory):
            save_file(as_released(load_file(shard)), shard, {"format": "pt"})
    return directory


def require_processor(directory: Path) -> None:
    """ConfigError if a vision-language model lacks the files without which vLLM does not start it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError):  # vLLM may know it
        return
    if not _sees(config):
        return
    missing = [names[0] for names in (_PROCESSORS, _TOKENIZERS) if not any((directory / n).exists() for n in names)]
    if missing:
        raise ConfigError(
            f"{directory} is a vision-language model, which vLLM starts only with its processor and tokenizer. It "
            f"lacks {' and '.join(missing)}. Add them: "
            f"hf download MODEL --include '*.json' '*.model' --local-dir {directory}"
        )


def is_side_file(file: Path) -> bool:
    """Not weights."""
    return file.is_file() and not file.name.startswith("model") and file.suffix not in (".safetensors", ".bin")


def _auto_class(config: Any) -> Any:
    """The auto class that makes the whole model: a vision-language model's text part is another class."""
    import transformers

    return transformers.AutoModelForImageTextToText if _sees(config) else transformers.AutoModelForCausalLM


def _sees(config: Any) -> bool:
    import transformers

    return type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
