"""Pairs of bf16 snapshots to measure: synthetic, from two checkpoints, or from a trace of sparse steps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from hubsync.format.checkpoint import is_checkpoint, shards_of
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import bits_of


@dataclass(frozen=True)
class Pair:
    """Two snapshots: all tensors of `table` concatenated, as flat uint16 patterns."""

    name: str
    table: TensorTable
    old: np.ndarray
    new: np.ndarray

    @cached_property
    def slices(self) -> list[slice]:
        ends = np.cumsum([spec.numel for spec in self.table]).tolist()
        return [slice(end - spec.numel, end) for spec, end in zip(self.table, ends, strict=True)]


def synthetic_pair(layers: int = 4, width: int = 1024, update: float = 3e-7) -> Pair:
    """fp32 master weights, N(0, 0.02^2), and one step of N(0, update^2) on all of them; both rounded to bf16."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (8 * width, width)}
    for layer in range(layers):
        shapes[f"layers.{layer}.norm.weight"] = (width,)
        shapes[f"layers.{layer}.attention.weight"] = (2 * width, width)
        shapes[f"layers.{layer}.mlp.weight"] = (2 * width, width)
    table = TensorTable([TensorSpec(name, shape, "BF16") for name, shape in shapes.items()])
    master = rng.standard_normal(table.numel, np.float32) * np.float32(0.02)
    moved = master + rng.standard_normal(table.numel, np.float32) * np.float32(update)
    old, new = (bits_of(torch.from_numpy(weights).bfloat16()) for weights in (master, moved))
    return Pair("synthetic", table, old, new)


def first_step_pair(pair: Pair, learning_rate: float = 1e-6) -> Pair:
    """Adam's first step from a bf16 checkpoint: fp32 masters made from `pair.old`, moved by the learning rate.

    Adam's first update is the learning rate times the sign of the gradient, up to its epsilon.
    """
    rng = np.random.default_rng(0)
    master = (pair.old.astype(np.uint32) << 16).view(np.float32)
    update = rng.choice([-1, 1], len(master)).astype(np.float32)
    update *= np.float32(learning_rate) * (1 - np.float32(1e-3) * rng.random(len(master), np.float32))
    return Pair("first step", pair.table, pair.old, bits_of(torch.from_numpy(master + update).bfloat16()))


def file_pair(old: Path, new: Path) -> Pair:
    """Two checkpoints with the same bf16 tensors, each a safetensors file or a directory of them."""
    table = _table_of(old)
    if _table_of(new).hash != table.hash:
        raise SystemExit(f"{old} and {new} do not hold the same tensors")
    names = [spec.name for spec in table]
    return Pair(f"{old.name} -> {new.name}", table, _flat(old, names), _flat(new, names))


def trace_pairs(directory: Path, first: int, last: int) -> Iterator[Pair]:
    """Steps `first .. last` of a trace: a base and, for each step, flat `indices` and the new `values` there."""
    with safe_open(directory / "step-01.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["tensors"])
    table = TensorTable([TensorSpec(name, tuple(shape), "BF16") for name, shape in shapes])
    old = _flat(directory / "base.safetensors", [spec.name for spec in table])
    for step in range(1, last + 1):
        new = old.copy()
        with safe_open(directory / f"step-{step:02d}.safetensors", "pt") as file:
            new[file.get_tensor("indices").numpy()] = bits_of(file.get_tensor("values"))
        if step >= first:
            yield Pair(f"step {step}", table, old, new)
        old = new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, help="directory with base.safetensors and step-NN.safetensors")
    parser.add_argument("--steps", type=_steps, default=(10, 18), help="steps of the trace, default 10-18")
    parser.add_argument("--old", type=Path, help="a checkpoint of bf16 tensors (safetensors file or directory) ...")
    parser.add_argument("--new", type=Path, help="... and the same tensors some steps later")


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Iterator[Pair]:
    """The pairs selected by the arguments."""
    if (options.old is None) != (options.new is None):
        parser.error("--old and --new go together")
    if options.trace and options.old:
        parser.error("give either --trace or --old and --new")
    if options.trace:
        yield from trace_pairs(options.trace, *options.steps)
    else:
        yield file_pair(options.old, options.new) if options.old else synthetic_pair()


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        steps = int(first), int(last or first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a step or a range like 10-18") from None
    if not 1 <= steps[0] <= steps[1]:
        raise argparse.ArgumentTypeError("steps count from 1, and a range ascends")
    return steps


def _table_of(path: Path) -> TensorTable:
    shapes: list[TensorSpec] = []
    for file in _files(path):
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes += [TensorSpec(n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()]
    return TensorTable(shapes)


def _flat(path: Path, names: Sequence[str]) -> np.ndarray:
    tensors: dict[str, torch.Tensor] = {}
    for file in _files(path):
        with safe_open(file, "pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    if any(tensors[name].dtype != torch.bfloat16 for name in names):
        raise SystemExit(f"{path} holds tensors that are not bf16")
    return np.concatenate([bits_of(tensors[name]) for name in names])


def _files(path: Path) -> list[Path]:
    if path.is_dir() and not is_checkpoint(path):
        raise SystemExit(f"{path} holds no safetensors checkpoint")
    return shards_of(path) if path.is_dir() else [path]
