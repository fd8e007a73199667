"""A small trained model, its published view, and its replay from a bucket."""

from __future__ import annotations

from pathlib import Path

import torch

from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import View, replay
from hubsync.kernels.bits import bits_of
from hubsync.publish.detect.recorder import HostRecorder
from hubsync.publish.detect.sliced import Sliced
from hubsync.publish.view.live import published_tensors, table_of


class Tiny(torch.nn.Module):
    """An embedding tied to the output, a buffer, a scalar and odd sizes."""

    def __init__(self, width: int = 6, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = torch.nn.Embedding(11, width, dtype=dtype)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(width, width, dtype=dtype) for _ in range(2)])
        self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))
        self.register_buffer("bias", torch.linspace(-1, 1, 7, dtype=dtype))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.head = torch.nn.Linear(width, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden)) * self.scale
        return self.head(hidden)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        tokens = torch.randint(0, 11, (2, 5))
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def view_of(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(dtype, copy=True) for name, tensor in published_tensors(model).items()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(patterns(left[name]) == patterns(right[name]) for name in left)


def patterns(tensor: torch.Tensor) -> list[int]:
    return bits_of(tensor.contiguous()).tolist()


def follow(address: str, tmp_path: Path, to: int | None = None, base: dict[str, torch.Tensor] | None = None) -> View:
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    return replay(reader, reader.plan(None, to, base_available=base is not None), base)


def sliced(model: torch.nn.Module, optimizer: torch.optim.Optimizer, view: torch.dtype = torch.bfloat16) -> Sliced:
    """A detector with buckets so small that every step needs several."""
    tensors = published_tensors(model)
    return Sliced(tensors, table_of(tensors, view), optimizer, HostRecorder(table_of(tensors, view), bucket=40))
