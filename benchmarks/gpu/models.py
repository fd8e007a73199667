"""Models for measurements on a GPU: only their shapes are those of the real ones, their weights are random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """A Qwen3, or with experts a Qwen3-MoE.

    Attributes:
        name: of the model whose shapes these are.
        dtype: of the trainer's parameters.
        experts: of each layer, in one parameter as transformers holds them; 0 for a dense model.
        expert: inner size of an expert.
    """

    name: str
    hidden: int
    inner: int
    heads: int
    layers: int
    words: int
    tied: bool
    dtype: torch.dtype
    kv: int = 8
    dim: int = 128
    experts: int = 0
    expert: int = 0

    @property
    def shapes(self) -> Shapes:
        embeddings: Shapes = [(self.words, self.hidden)] * (1 if self.tied else 2)
        return [*embeddings, *self._layer() * self.layers, (self.hidden,)]

    def _layer(self) -> Shapes:
        hidden, dim = self.hidden, self.dim
        attention: Shapes = [(self.heads * dim, hidden), (self.kv * dim, hidden), (self.kv * dim, hidden)]
        attention += [(hidden, self.heads * dim), (dim,), (dim,), (hidden,), (hidden,)]
        if self.experts:
            sizes = [(self.experts, 2 * self.expert, hidden), (self.experts, hidden, self.expert)]
            return [*attention, (self.experts, hidden), *sizes]
        return [*attention, (self.inner, hidden), (self.inner, hidden), (hidden, self.inner)]

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def config(self) -> Any:
        """Of transformers."""
        from transformers import Qwen3Config, Qwen3MoeConfig

        common: dict[str, Any] = {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv, "head_dim": self.dim, "vocab_size": self.words,
            "tie_word_embeddings": self.tied, "max_position_embeddings": 4096, "bos_token_id": None,
            "eos_token_id": None,
        }  # fmt: skip
        if not self.experts:
            return Qwen3Config(**common, intermediate_size=self.inner)
        return Qwen3MoeConfig(
            **common, num_experts=self.experts, moe_intermediate_size=self.expert, num_experts_per_tok=8,
            norm_topk_prob=True,
        )  # fmt: skip

    def write_checkpoint(self, directory: Path) -> None:
        """Random weights in bfloat16."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.bfloat16)
        model.save_pretrained(directory)


SIZES = {
    "0.6b": Size("Qwen3-0.6B", 1024, 3072, 16, 28, 151936, True, torch.float32),
    "4b": Size("Qwen3-4B", 2560, 9728, 32, 36, 151936, True, torch.float32),
    "8b": Size("Qwen3-8B", 4096, 12288, 32, 36, 151936, False, torch.bfloat16),
    "moe": Size(
        "9 layers of Qwen3-30B-A3B", 2048, 0, 32, 9, 151936, True, torch.bfloat16, kv=4, experts=128, expert=768
    ),
    "tiny": Size("tiny", 256, 768, 8, 4, 4000, True, torch.float32, dim=32),
    "tiny-moe": Size("tiny-moe", 256, 0, 8, 2, 4000, True, torch.bfloat16, kv=4, dim=32, experts=8, expert=64),
}


class Weights(torch.nn.Module):
    """Parameters of these shapes, normally distributed."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: torch.device):
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        for number, shape in enumerate(shapes):
            values = torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)
            self.register_parameter(f"w{number}", torch.nn.Parameter(values.to(dtype)))

    @property
    def numel(self) -> int:
        return sum(math.prod(parameter.shape) for parameter in self.parameters())

    def receive_gradients(self) -> None:
        """Random ones, the same for every step."""
        for number, parameter in enumerate(self.parameters()):
            generator = torch.Generator(parameter.device).manual_seed(1 + number)
            parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3, generator=generator)
