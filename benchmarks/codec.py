"""Size and speed of delta formats on pairs of bf16 snapshots; benchmarks/README.md says what each row is.

    python -m benchmarks.codec                                   a synthetic pair, made here
    python -m benchmarks.codec --old A.safetensors --new B.safetensors
    python -m benchmarks.codec --trace DIR --steps 10-18         base.safetensors and step-NN.safetensors

One thread, thread CPU time, best of a few; every row is decoded and compared before it is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import torch
import zstandard
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from hubsync.bits import advance, bits_of, find_changes
from hubsync.manifest import Position
from hubsync.parts import read_delta, write_delta
from hubsync.patch import TensorDelta
from hubsync.table import TensorSpec, TensorTable

P = ParamSpec("P")
T = TypeVar("T")


# --- pairs of snapshots -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two snapshots: every tensor of `table`, one after the other, as flat uint16 patterns."""

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


def file_pair(old: Path, new: Path) -> Pair:
    """Two safetensors files with the same bf16 tensors."""
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


def _table_of(path: Path) -> TensorTable:
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return TensorTable([TensorSpec(n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()])


def _flat(path: Path, names: Sequence[str]) -> np.ndarray:
    with safe_open(path, "pt") as file:
        tensors = [file.get_tensor(name) for name in names]
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        raise SystemExit(f"{path} holds tensors that are not bf16")
    return np.concatenate([bits_of(tensor) for tensor in tensors])


# --- formats ------------------------------------------------------------------------------------------


class Format(ABC):
    """A delta format: old and new snapshot -> bytes, and bytes applied to the old snapshot in place."""

    name: str

    @abstractmethod
    def encode(self, pair: Pair) -> bytes: ...

    @abstractmethod
    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        """Turn `weights`, a copy of the old snapshot, into the new one. Of `pair` only the shapes may be used."""


class Raw(Format):
    name = "raw int32 + bf16"

    def encode(self, pair: Pair) -> bytes:
        indices, _ = find_changes(pair.old, pair.new)
        return indices.astype(np.int32).tobytes() + pair.new[indices].tobytes()

    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        n = len(data) // 6
        weights[np.frombuffer(data, np.int32, n)] = np.frombuffer(data, np.uint16, n, 4 * n)


class Gaps(Format):
    """uint16 gaps (65535 = the gap stands in a list of uint32), then the new values."""

    name = "gaps16 + bf16"

    def encode(self, pair: Pair) -> bytes:
        indices, _ = find_changes(pair.old, pair.new)
        gaps = np.diff(indices, prepend=-1) - 1
        long = gaps[gaps >= 0xFFFF].astype(np.uint32)
        counts = np.array([len(indices), len(long)], np.uint32)
        short = np.minimum(gaps, 0xFFFF).astype(np.uint16)
        return b"".join([counts.tobytes(), long.tobytes(), short.tobytes(), pair.new[indices].tobytes()])

    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        n, n_long = map(int, np.frombuffer(data, np.uint32, 2))
        gaps = np.frombuffer(data, np.uint16, n, 8 + 4 * n_long).astype(np.int64)
        gaps[gaps == 0xFFFF] = np.frombuffer(data, np.uint32, n_long, 8)
        weights[np.cumsum(gaps + 1) - 1] = np.frombuffer(data, np.uint16, n, 8 + 4 * n_long + 2 * n)


class GapsZstd(Gaps):
    name = "gaps16 + bf16 + zstd-1"

    def encode(self, pair: Pair) -> bytes:
        return zstandard.ZstdCompressor(level=1).compress(super().encode(pair))

    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        super().apply(zstandard.ZstdDecompressor().decompress(data), weights, pair)


class DenseXor(Format):
    name = "dense XOR + zstd-1"

    def encode(self, pair: Pair) -> bytes:
        return zstandard.ZstdCompressor(level=1).compress(memoryview(pair.old ^ pair.new).cast("B"))

    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        weights ^= np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint16)


class Hubsync(Format):
    name = "hubsync-fast"

    def encode(self, pair: Pair) -> bytes:
        patch = {}
        for index, at in enumerate(pair.slices):
            delta = TensorDelta(*find_changes(pair.old[at], pair.new[at]))
            if len(delta):
                patch[index] = delta
        parent, position = Position(17, "0" * 32), Position(18, "1" * 32)
        return write_delta(pair.table, patch, run_id="0" * 32, parent=parent, position=position)

    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        for index, delta in read_delta(data, pair.table, None).items():
            tensor = weights[pair.slices[index]]
            tensor[delta.indices] = advance(tensor[delta.indices], delta.diffs)


FORMATS: list[Format] = [Raw(), Gaps(), GapsZstd(), DenseXor(), Hubsync()]


# --- measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One format on one pair. Speeds are GB of one dense bf16 snapshot per second of CPU time on one core."""

    pair: str
    codec: str
    changed: int
    total: int
    bits_per_change: float
    encode_gbps: float
    decode_gbps: float
    memcpy_gbps: float


def measure(pair: Pair, repeats: int) -> list[Row]:
    """Every format on one pair, with the speed of a plain copy of the snapshot measured beside them."""
    changed, gigabytes = int(np.count_nonzero(pair.old != pair.new)), pair.old.nbytes / 1e9
    if not changed:
        raise SystemExit(f"{pair.name}: nothing changed, so there are no bits per change")
    weights = np.empty_like(pair.old)
    rows = []
    for form in FORMATS:
        data, encode_seconds = _best(repeats, form.encode, pair)
        copy_seconds, apply_seconds = [], []
        for _ in range(repeats + 1):  # the first round compiles and warms up
            copy_seconds.append(_timed(np.copyto, weights, pair.old)[1])
            apply_seconds.append(_timed(form.apply, data, weights, pair)[1])
            if not np.array_equal(weights, pair.new):
                raise SystemExit(f"{form.name}: {pair.name} did not round-trip")
        rows.append(
            Row(
                pair=pair.name,
                codec=form.name,
                changed=changed,
                total=len(pair.old),
                bits_per_change=8 * len(data) / changed,
                encode_gbps=gigabytes / encode_seconds,
                decode_gbps=gigabytes / min(apply_seconds),
                memcpy_gbps=gigabytes / min(copy_seconds),
            )
        )
    return rows


def _best(repeats: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """The result and the least CPU seconds of `repeats` calls, after one that compiles and warms up."""
    work(*args, **kwargs)
    runs = [_timed(work, *args, **kwargs) for _ in range(repeats)]
    return runs[-1][0], min(seconds for _, seconds in runs)


def _timed(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    start = time.thread_time()
    result = work(*args, **kwargs)
    return result, time.thread_time() - start


def _show(rows: Sequence[Row]) -> None:
    console = Console()
    for pair, group in groupby(rows, key=lambda row: row.pair):
        table = Table("codec")
        for heading in ("bits/change", "encode", "decode", "memcpy"):
            table.add_column(heading, justify="right")
        for row in group:
            speeds = (row.encode_gbps, row.decode_gbps, row.memcpy_gbps)
            table.add_row(row.codec, f"{row.bits_per_change:.2f}", *(f"{speed:.2f}" for speed in speeds))
        console.print(f"{pair}: {row.changed} of {row.total} elements changed ({row.changed / row.total:.2%})")
        console.print(table)
    console.print("Speeds are GB of dense bf16 weights per second of CPU time on one core.")


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        steps = int(first), int(last or first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a step or a range like 10-18") from None
    if not 1 <= steps[0] <= steps[1]:
        raise argparse.ArgumentTypeError("steps count from 1, and a range ascends")
    return steps


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec", description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path, help="directory with base.safetensors and step-NN.safetensors")
    parser.add_argument("--steps", type=_steps, default=(10, 18), help="steps of the trace, default 10-18")
    parser.add_argument("--old", type=Path, help="a safetensors file of bf16 tensors ...")
    parser.add_argument("--new", type=Path, help="... and the same tensors some steps later")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the best counts, default 5")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    options = parser.parse_args(arguments)
    if (options.old is None) != (options.new is None):
        parser.error("--old and --new go together")
    if options.trace and options.old:
        parser.error("give either --trace or --old and --new")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")

    if options.trace:
        pairs: Iterator[Pair] = trace_pairs(options.trace, *options.steps)
    elif options.old:
        pairs = iter([file_pair(options.old, options.new)])
    else:
        pairs = iter([synthetic_pair()])
    rows = [row for pair in pairs for row in measure(pair, options.repeats)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _show(rows)


if __name__ == "__main__":
    main()
