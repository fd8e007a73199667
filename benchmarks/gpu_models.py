"""Models for measurements on a GPU: only their shapes are those of the real ones, their weights are random."""

from __future__ import annotations

import math

import torch

Shapes = list[tuple[int, ...]]


def _qwen3(hidden: int, inner: int, heads: int, kv: int, layers: int, tied: bool) -> Shapes:
    dim = 128
    layer: Shapes = [(heads * dim, hidden), (kv * dim, hidden), (kv * dim, hidden), (hidden, heads * dim)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (dim,), (dim,), (hidden,), (hidden,)]
    embeddings: Shapes = [(151936, hidden)] * (1 if tied else 2)
    return [*embeddings, *layer * layers, (hidden,)]


def _mixture(layers: int) -> Shapes:
    """Layers of Qwen3-30B-A3B: 128 experts, in one parameter for each layer as transformers holds them."""
    hidden, dim = 2048, 128
    layer: Shapes = [(32 * dim, hidden), (4 * dim, hidden), (4 * dim, hidden), (hidden, 32 * dim)]
    layer += [(dim,), (dim,), (hidden,), (hidden,), (128, hidden), (128, 2 * 768, hidden), (128, hidden, 768)]
    return [(151936, hidden), *layer * layers, (hidden,)]


MODELS: dict[str, tuple[Shapes, torch.dtype]] = {
    "qwen3-4b": (_qwen3(2560, 9728, 32, 8, 36, tied=True), torch.float32),
    "qwen3-8b": (_qwen3(4096, 12288, 32, 8, 36, tied=False), torch.bfloat16),
    "mixture-6b": (_mixture(9), torch.float32),
    "tiny": ([(300, 64), (128, 48), (64,), (40, 104)], torch.float32),
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
