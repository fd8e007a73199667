"""A small policy, and its weights as servers lay them out. Nothing is learnt: every bit is known."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hubsync.kernels.bits import bits_of

Tensors = dict[str, torch.Tensor]

# Name -> shape and dtype in training; the view has one dtype. `proj` takes several chunks of a delta.
POLICY: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "embed": ((37, 8), torch.float32),
    "q": ((8, 8), torch.bfloat16),
    "kv": ((4, 8), torch.float32),
    "down": ((8, 24), torch.float16),
    "norm": ((8,), torch.float32),
    "scale": ((), torch.float32),
    "experts": ((4, 6, 10), torch.bfloat16),
}
WIDE = {"proj": ((520, 512), torch.float32)}

WAYS = ("another optimizer", "data", "numpy", "replaced", "rounded")
"""Ways to write weights outside of the steps that an engine observes."""

_VOCABULARY = 64  # rows of the served embedding: padded


class Policy(torch.nn.Module):
    """The model that the publisher trains: parameters by checkpoint name.

    Args:
        tensors: initial weights.
        sane: whether weights stay such that a model can compute with them.
    """

    def __init__(self, tensors: Tensors, *, sane: bool = False):
        super().__init__()
        self._sane = sane
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module: torch.nn.Module = self
            for step in path:
                if step not in module._modules:
                    module.add_module(step, torch.nn.Module())
                module = module.get_submodule(step)
            module.register_parameter(last, torch.nn.Parameter(tensor))

    @classmethod
    def small(cls, wide: bool) -> Policy:
        """Several dtypes and shapes, which servers lay out differently."""
        generator = torch.Generator().manual_seed(0)
        shapes = POLICY | WIDE if wide else POLICY
        return cls({name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in shapes.items()})

    @classmethod
    def of_checkpoint(cls, directory: Path) -> Policy:
        """The weights of a model that vLLM can serve, in float32."""
        tensors = load_file(directory / "model.safetensors")
        return cls({name: tensor.float() for name, tensor in tensors.items()}, sane=True)

    def view(self, dtype: torch.dtype) -> Tensors:
        """The published view of these weights."""
        return {name: tensor.detach().to(dtype, copy=True) for name, tensor in self.named_parameters()}

    def change(self, seed: int, number: int, optimizer: torch.optim.SGD | None = None, way: str = "step") -> None:
        """Move to another state, a function of both numbers: a training step, one bit, all weights, noise, nothing.

        Args:
            optimizer: makes the change if given (its learning rate is 1), as exactly as arithmetic allows.
            way: "step", or one of `WAYS`, which no hook of `optimizer` observes.
        """
        if optimizer is None and way == "step":
            self._change(seed, number)
            return
        if way == "rounded":
            self._round(seed, number)
            return
        goal = copy.deepcopy(self)
        goal._change(seed, number)
        if way == "another optimizer":
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        if way in ("step", "another optimizer"):
            assert optimizer is not None
            for parameter, wanted in zip(self.parameters(), goal.parameters(), strict=True):
                parameter.grad = parameter.detach() - wanted.detach()
            optimizer.step()
            return
        for parameter, wanted in zip(self.parameters(), goal.parameters(), strict=True):
            if way == "data":
                parameter.data.copy_(wanted.data)
            elif way == "numpy":
                bits_of(parameter.detach())[:] = bits_of(wanted.detach())
            else:
                parameter.data = wanted.data.clone()

    @torch.no_grad()
    def _round(self, seed: int, number: int) -> None:
        """Add to each weight and subtract the same again, as merging an adapter and unmerging it does."""
        generator = np.random.default_rng((seed, number))
        for tensor in self.parameters():
            added = torch.from_numpy(np.asarray(generator.normal(0, 0.3, tuple(tensor.shape)))).to(tensor.dtype)
            tensor.data += added
            tensor.data -= added

    @torch.no_grad()
    def _change(self, seed: int, number: int) -> None:
        generator = np.random.default_rng((seed, number))
        how = generator.choice(["step", "step", "step", "bit", "step" if self._sane else "noise", "all", "nothing"])
        chosen_one = str(generator.choice(sorted(name for name, _ in self.named_parameters())))
        for name, tensor in self.named_parameters():
            bits = bits_of(tensor.detach())
            if how == "bit" and name == chosen_one:
                bits[generator.integers(len(bits))] ^= 1
            elif how == "noise":  # NaN payloads, infinities and both zeros: no model survives them, but every bit must
                noisy = generator.random(len(bits)) < 0.05
                noise = generator.integers(0, 1 << (8 * bits.itemsize), noisy.sum(), dtype=np.uint64)
                bits[noisy] = noise.astype(bits.dtype)
            elif how in ("step", "all"):
                shape, density = tuple(tensor.shape), 1.0 if how == "all" else 0.05
                chosen = torch.from_numpy(np.asarray(generator.random(shape) < density))
                step = torch.from_numpy(np.asarray(generator.normal(0, 0.02, shape)))
                tensor.copy_(torch.where(chosen, tensor + step.to(tensor.dtype), tensor))


def fingerprint(bits: np.ndarray) -> bytes:
    """Hash of a tensor's bits in checkpoint order, short enough to send."""
    return hashlib.blake2b(bits.tobytes(), digest_size=16).digest()


class Shard(torch.nn.Module):
    """One rank of a server: sliced, fused, padded and transposed as real servers do."""

    def __init__(self, rank: int, ranks: int, dtype: torch.dtype, wide: bool):
        super().__init__()
        self.rank, self.ranks = rank, ranks
        shapes: dict[str, tuple[int, ...]] = {
            "embed": (_VOCABULARY // ranks, 8),
            "qkv": (8 // ranks + 4, 8),
            "down": (24 // ranks, 8),
            "norm": (8,),
            "scale": (1,),
            "experts": (4, 6 // ranks, 10),
        }
        if wide:
            shapes["proj"] = (520, 512 // ranks)
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            match name:
                case "embed":
                    target = self._data("embed")
                    rows = tensor[self.rank * len(target) : (self.rank + 1) * len(target)]
                    target[: len(rows)].copy_(rows)
                    target[len(rows) :].fill_(0)
                case "q":
                    self._data("qkv")[:-4].copy_(self._slice(tensor, 0))
                case "kv":
                    self._data("qkv")[-4:].copy_(tensor)
                case "down":
                    self._data("down").copy_(self._slice(tensor, 1).t())
                case "scale":
                    self._data("scale").copy_(tensor.reshape(1))
                case "experts" | "proj":
                    self._data(name).copy_(self._slice(tensor, 1))
                case _:
                    self._data(name).copy_(tensor)

    def memory(self) -> dict[str, bytes]:
        """Every byte of every parameter."""
        return {name: bits_of(tensor.detach()).tobytes() for name, tensor in self.named_parameters()}

    def flip(self, seed: int) -> str:
        """Flip one bit of a weight, and return where."""
        chance = random.Random(seed)
        bits = bits_of(self._data("down"))
        place, bit = chance.randrange(len(bits)), chance.randrange(8 * bits.itemsize)
        bits[place] ^= bits.dtype.type(1 << bit)
        return f"bit {bit} of element {place} of down"

    def _data(self, name: str) -> torch.Tensor:
        return self.get_parameter(name).data

    def _slice(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        size = tensor.shape[dim] // self.ranks
        return tensor.narrow(dim, self.rank * size, size)


def served(tensors: Mapping[str, torch.Tensor], ranks: int) -> list[Shard]:
    """The shards of a server that has just loaded a view."""
    dtype = tensors["embed"].dtype
    shards = [Shard(rank, ranks, dtype, "proj" in tensors) for rank in range(ranks)]
    for shard in shards:
        shard.load_weights(tensors.items())
    return shards


class States:
    """Every state of the trainer, written to disk before it is published: its weights, and their view."""

    def __init__(self, directory: Path):
        self._directory = directory

    def save(self, number: int, policy: Policy, dtype: torch.dtype) -> None:
        weights = {f"weights.{name}": tensor.detach() for name, tensor in policy.named_parameters()}
        view = {f"view.{name}": tensor for name, tensor in policy.view(dtype).items()}
        staged = self._directory / f"{number}.part"
        save_file(weights | view, staged)
        staged.rename(self._path(number))

    def numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._directory.glob("*.safetensors"))

    def view(self, number: int) -> Tensors:
        return self._part(number, "view.")

    def load(self, number: int, policy: Policy) -> None:
        """Resume training at a state."""
        for name, tensor in self._part(number, "weights.").items():
            policy.get_parameter(name).data.copy_(tensor)

    def _part(self, number: int, prefix: str) -> Tensors:
        found = load_file(self._path(number))
        return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}

    def _path(self, number: int) -> Path:
        return self._directory / f"{number}.safetensors"
