"""Speed of passes over whole weights on a GPU (Triton) or a CPU (numba), and of whole parts, relative to a copy.

python -m benchmarks.kernels                 # the GPU if there is one, else the CPU
python -m benchmarks.kernels --device cpu --threads 2
python -m benchmarks.gpu --only kernels      # the passes of a publish, each over all tensors at once
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hubsync import kernels
from hubsync.format.codec import decode, encode
from hubsync.format.codec.encode import Encoded
from hubsync.format.digest import digest_change, digest_torch
from hubsync.format.patch import TensorDelta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import bits_of, find_changes
from hubsync.kernels.classes import CLASSES, ClassMap

_SIDE = 2048
_LOWEST = 107  # exponent of the lowest class: weights of about 0.02 lie in the 16 classes from it upwards
_SHARE = 0.012


@dataclass(frozen=True)
class Row:
    """One pass.

    Attributes:
        gbps: dense bf16 bytes of one snapshot per second, in 1e9; median over runs.
       of_copy: `gbps` divided by that of a copy on the device.
    """

    name: str
    gbps: float
    of_copy: float


@dataclass(frozen=True)
class Weights:
    """A synthetic model before and after a step, on one device."""

    table: TensorTable
    old: dict[str, torch.Tensor]
    new: dict[str, torch.Tensor]
    patch: dict[int, TensorDelta]

    @classmethod
    def made(cls, tensors: int, device: torch.device) -> Weights:
        rng = torch.Generator().manual_seed(0)
        table = TensorTable([TensorSpec(f"layers.{i}.weight", (_SIDE, _SIDE), "BF16") for i in range(tensors)])
        old, new = {}, {}
        patch: dict[int, TensorDelta] = {}
        for index, spec in enumerate(table):
            before = (torch.randn(_SIDE, _SIDE, generator=rng) * 0.02).bfloat16()
            moved = torch.rand(_SIDE, _SIDE, generator=rng) < _SHARE
            after = (before.view(torch.int16) + moved).view(torch.bfloat16)
            patch[index] = TensorDelta(*find_changes(bits_of(before), bits_of(after)))
            old[spec.name], new[spec.name] = before.to(device), after.to(device)
        return cls(table, old, new, patch)


def measure(weights: Weights, device: torch.device, repeats: int) -> list[Row]:
    """Time each pass over all tensors one by one, as trainer and server run them."""
    table, classes = weights.table, ClassMap.of("BF16", _LOWEST)
    olds = [weights.old[spec.name].view(torch.int16).view(-1) for spec in table]
    news = [weights.new[spec.name].view(torch.int16).view(-1) for spec in table]
    spare = [torch.empty_like(old) for old in olds]  # one shared buffer would stay in a cache
    bits: list[kernels.Bits] = [old if device.type == "cuda" else old.numpy().view(np.uint16) for old in olds]
    positions = [delta.indices.astype(np.int32) for delta in weights.patch.values()]
    ranked = [kernels.rank(b, p, classes) for b, p in zip(bits, positions, strict=True)]
    order = [np.argsort(class_of, kind="stable") for _, class_of, _ in ranked]
    counts = [np.bincount(class_of, minlength=CLASSES) for _, class_of, _ in ranked]
    view = ViewBits(table, weights.old)

    def compare() -> None:
        for old, new in zip(olds, news, strict=True):
            if device.type == "cuda":
                kernels.gpu_kernels().changes(old, new)
            else:
                find_changes(old.numpy().view(np.uint16), new.numpy().view(np.uint16))

    def place() -> None:
        for b, (_, _, ranks), at, count, delta in zip(bits, ranked, order, counts, weights.patch.values(), strict=True):
            kernels.count(b, classes).place(ranks[at], delta.diffs[at], count)

    def update() -> None:
        for index, delta in weights.patch.items():
            after = delta.diffs.view(np.uint16)
            digest_change(index, delta.indices, after, after)

    passes: list[tuple[str, Callable[[], object]]] = [
        ("copy", lambda: [a.copy_(b) for a, b in zip(spare, olds, strict=True)]),
        ("compare and list", compare),
        ("digest, whole", lambda: [digest_torch(1, old) for old in olds]),
        ("digest, updated from a delta", update),
        ("rank in classes", lambda: [kernels.rank(b, p, classes) for b, p in zip(bits, positions, strict=True)]),
        ("count and place", place),
    ]
    if device.type == "cuda":
        at = [torch.from_numpy(delta.indices).to(device) for delta in weights.patch.values()]
        scatter = kernels.gpu_kernels().scatter
        passes.append(("scatter", lambda: [scatter(o, a, o[a]) for o, a in zip(olds, at, strict=True)]))
    for level, known in (("fast", None), ("compact", view)):
        part = encode(table, weights.patch, known)
        codes = 1 if known is None else CLASSES
        passes.append((f"encode, {level}", partial(encode, table, weights.patch, known)))
        passes.append((f"decode, {level}", partial(decode, table, *_arrays(part), codes, known)))
    return _rows(passes, table.nbytes / 1e9, device, repeats)


def _arrays(part: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return part.tensors, part.books, part.chunks, part.payload


def _rows(
    passes: Sequence[tuple[str, Callable[[], object]]], gigabytes: float, device: torch.device, repeats: int
) -> list[Row]:
    speeds = {name: gigabytes / _seconds(work, device, repeats) for name, work in passes}
    return [Row(name, speed, speed / speeds["copy"]) for name, speed in speeds.items()]


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    work()  # compiles
    runs = []
    for _ in range(repeats):
        _finish(device)
        started = time.perf_counter()
        work()
        _finish(device)
        runs.append(time.perf_counter() - started)
    return float(np.median(runs))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--tensors", type=int, default=16, help=f"number of tensors of {_SIDE} x {_SIDE} elements, default 16"
    )
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads, default 1")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    weights = Weights.made(options.tensors, device)
    rows = measure(weights, device, options.repeats)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} threads"
    table = Table("pass", title=f"{name}; {weights.table.numel / 1e6:.0f} M bf16 elements, {_SHARE:.1%} changed")
    for heading in ("GB/s", "of a copy"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.name, f"{row.gbps:.2f}", f"{row.of_copy:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
