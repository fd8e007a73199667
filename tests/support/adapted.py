"""Tiny models with LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from .models import save_checkpoint, save_tokenizer

TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_base(directory: Path) -> Path:
    base = save_checkpoint("qwen3_tied", directory)
    save_tokenizer(base)
    return base


def adapted(base: Path, **settings: Any) -> peft.PeftModel:
    """The base in float32 with a fresh adapter, which changes nothing yet."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.get_peft_model(model, lora(**settings))


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})


def parameters(model: peft.PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: peft.PeftModel, lr: float = 0.05) -> None:
    """A step that moves everything of the adapter, and nothing else."""
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(torch.randn_like(parameter) * lr)


def published(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """What is to be served: the adapter as PEFT would save it, cast."""
    return {name: tensor.bfloat16() for name, tensor in peft.get_peft_model_state_dict(model).items()}
