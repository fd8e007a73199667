"""A small model with the layouts of real models, and views of it with random bits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from hubsync.format.digest import digest_view
from hubsync.format.manifest import Position
from hubsync.format.patch import Patch, TensorDelta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import TORCH_DTYPES, bits_of, difference

TABLE = TensorTable(
    [
        TensorSpec("embed", (37, 8), "BF16"),
        TensorSpec("q", (8, 8), "BF16"),
        TensorSpec("k", (4, 8), "BF16"),
        TensorSpec("down", (24, 8), "BF16"),
        TensorSpec("mixed", (6, 5), "BF16"),
        TensorSpec("scale", (), "F32"),
        TensorSpec("fp8", (3, 5), "F8_E4M3"),
    ]
)

Tensors = dict[str, torch.Tensor]


class Model(nn.Module):
    """A model with fused, padded, transposed, permuted and tied parameters of 8, 16 and 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape, dtype in [
            ("embed", (64, 8), torch.bfloat16),
            ("qkv", (12, 8), torch.bfloat16),
            ("down", (8, 24), torch.bfloat16),
            ("mixed", (6, 5), torch.bfloat16),
            ("scale", (1,), torch.float32),
            ("fp8", (3, 5), torch.float8_e4m3fn),
        ]:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.head = self.embed
        self.register_buffer("cache", torch.arange(5.0))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            match name:
                case "embed":
                    self.embed.data[:37].copy_(tensor)
                    self.embed.data[37:].fill_(0)
                case "q":
                    self.qkv.data[:8].copy_(tensor)
                case "k":
                    self.qkv.data[8:].copy_(tensor)
                case "down":
                    self.down.data.copy_(tensor.t())
                case "mixed":
                    self.mixed.data.copy_(tensor.flip(0))
                case "scale":
                    self.scale.data.copy_(tensor.reshape(1))
                case "fp8":
                    self.fp8.data.copy_(tensor)


def view(seed: int) -> Tensors:
    """A view with random bits in checkpoint coordinates, including NaN payloads, infinities and both zeros."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for spec in TABLE:
        bits = generator.integers(0, 256, spec.nbytes, dtype=np.uint8)
        tensors[spec.name] = torch.from_numpy(bits).view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
    return tensors


def nudged(tensors: Tensors, seed: int, fraction: float = 0.2) -> Tensors:
    """A copy with changed bits in a fraction of the elements of every tensor."""
    generator = np.random.default_rng(seed)
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in out.values():
        bits = bits_of(tensor)
        chosen = generator.choice(len(bits), max(1, int(len(bits) * fraction)), replace=False)
        bits[chosen] ^= generator.integers(1, 1 << (8 * bits.itemsize), len(chosen), dtype=np.uint64).astype(bits.dtype)
    return out


def patch_between(old: Tensors, new: Tensors, table: TensorTable = TABLE) -> Patch:
    """The exact delta from one view to another."""
    patch = {}
    for index, spec in enumerate(table):
        a, b = bits_of(old[spec.name]), bits_of(new[spec.name])
        indices = np.flatnonzero(a != b)
        if len(indices):
            patch[index] = TensorDelta(indices, difference(a[indices], b[indices]))
    return patch


def position_of(version: int, tensors: Tensors, table: TensorTable = TABLE) -> Position:
    return Position(version, digest_view(table, tensors).hex)


def memory(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every byte of every parameter and buffer."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone() for name, tensor in named}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def loaded(tensors: Tensors, device: str | torch.device = "cpu") -> Model:
    """The model with a view loaded into it."""
    with torch.device(device):
        model = Model()
    model.load_weights(tensors.items())
    return model
