"""Two worker ranks without vLLM: a model sharded like real ones, and a group whose ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hubsync.format.table import TensorSpec, TensorTable

from .toy import Tensors

SIZE = 2
TABLE = TensorTable(
    [
        TensorSpec("embed", (37, 8), "BF16"),
        TensorSpec("q", (8, 8), "BF16"),
        TensorSpec("kv", (4, 8), "BF16"),
        TensorSpec("down", (8, 24), "BF16"),
        TensorSpec("bias", (8,), "BF16"),
        TensorSpec("norm", (8,), "BF16"),
        TensorSpec("experts", (4, 6, 10), "BF16"),
        TensorSpec("last", (5, 3), "BF16"),
    ]
)


class Shard(nn.Module):
    """One rank's part of a model: row and column slices, a replicated key-value head and norm, a bias that only rank 0
    adds, experts that are split, and a layer that only the last rank has."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        shapes = {"embed": (24, 8), "qkv": (8, 8), "down": (8, 12), "bias": (8,), "norm": (8,), "experts": (4, 3, 10)}
        if rank == SIZE - 1:
            shapes["last"] = (5, 3)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        first = self.rank
        for name, tensor in weights:
            match name:
                case "embed":
                    rows = tensor[first * 24 : (first + 1) * 24]
                    self.embed.data[: len(rows)].copy_(rows)
                    self.embed.data[len(rows) :].fill_(0)
                case "q":
                    self.qkv.data[:4].copy_(tensor.narrow(0, 4 * first, 4))
                case "kv":
                    self.qkv.data[4:].copy_(tensor)
                case "down":
                    self.down.data.copy_(tensor.narrow(1, 12 * first, 12))
                case "bias":
                    if first:
                        tensor.zero_()
                    self.bias.data.copy_(tensor)
                case "norm":
                    self.norm.data.copy_(tensor)
                case "experts":
                    self.experts.data.copy_(tensor[:, 3 * first : 3 * first + 3])
                case "last" if first == SIZE - 1:
                    self.last.data.copy_(tensor)


class Meeting:
    """Barrier and mailbox of the rank threads."""

    def __init__(self, size: int = SIZE):
        self.size = size
        self.words: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def ranks(self) -> list[Seat]:
        return [Seat(self, rank) for rank in range(self.size)]


class Seat:
    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def gather(self, word: Any) -> list[Any]:
        self.meeting.words[self.rank] = word
        self.meeting.barrier.wait()
        words = list(self.meeting.words)
        self.meeting.barrier.wait()
        return words


def random_view(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.randint(-(1 << 15), 1 << 15, spec.shape, generator=generator, dtype=torch.int16).view(
            torch.bfloat16
        )
        for spec in TABLE
    }
