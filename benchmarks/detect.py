"""Cost of detecting exactly which weights a step has changed. benchmarks/README.md explains the rows.

    python -m benchmarks.detect                          104 M parameters in float32, one thread
    python -m benchmarks.detect --parameters 20000000 --json
    python -m benchmarks.detect --dtype bfloat16         parameters in the served dtype
    python -m benchmarks.gpu --only trainer              on a GPU: steps, publish calls, encoding, uploads

Each row has a separate model. Every round makes one optimizer step of each model in rotating order, so that noise of
the machine affects all rows equally. Rows report medians. All models start equal and get equal gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hubsync.format.table import TensorTable
from hubsync.kernels.bits import bits_of
from hubsync.publish.detect.changes import TensorDigests
from hubsync.publish.detect.sliced import Sliced
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view.cast import cast
from hubsync.publish.view.live import table_of

from .apply import peak, reset_peak, resident
from .measuring import timed

RATE = 1e-6
_LIBC = ctypes.CDLL(None)
Changed = dict[int, np.ndarray]
"""Table index -> flat indices of the elements that changed."""


@dataclass(frozen=True)
class Row:
    """One detector.

    Attributes:
        seconds: median of an optimizer step including detection.
        overhead_fraction: extra time relative to the bare step, median over rounds.
        persistent_bytes_per_param: memory held between steps, without the changes themselves.
        peak_extra_bytes: peak growth of the process's memory in a step, including the changes.
        recall: detected true changes over all changes; None without detection.
        precision: true changes over detected ones; None without detection.
    """

    detector: str
    seconds: float
    overhead_fraction: float
    persistent_bytes_per_param: float
    peak_extra_bytes: int
    recall: float | None
    precision: float | None


class Contender:
    """A separate model trained with fused AdamW, without detection. The view is bfloat16."""

    name = "none"
    persistent_bytes = 0

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        self.live: dict[str, torch.Tensor] = {
            f"w{number}": torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
            for number, shape in enumerate(shapes)
        }
        self.optimizer = torch.optim.AdamW(list(self.live.values()), lr=RATE, fused=True)
        self.table: TensorTable = table_of(self.live, torch.bfloat16)

    def step(self) -> Changed | None:
        self.optimizer.step()
        return None

    def view(self) -> list[torch.Tensor]:
        return [tensor.detach().to(torch.bfloat16, copy=True).view(-1) for tensor in self.live.values()]


class ProofOnly(Contender):
    """What proving costs, and nothing else: the digest of every live tensor, as each publish recomputes it."""

    name = "proof only"

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype):
        super().__init__(shapes, dtype)
        self._digests = TensorDigests(self.table)

    def step(self) -> None:
        self.optimizer.step()
        for index, tensor in enumerate(self.live.values()):
            self._digests.of(index, cast(tensor, torch.bfloat16))


class InSlices(Contender):
    name = "sliced"

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype):
        super().__init__(shapes, dtype)
        self._detector = Sliced(self.live, self.table, self.optimizer)

    def step(self) -> Changed:
        self.optimizer.step()
        detected = self._detector.detect()
        self._detector.advance(detected)
        return {index: change.indices for index, change in detected.changes.items()}


class FromSnapshot(Contender):
    name = "snapshot"

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype):
        super().__init__(shapes, dtype)
        self._detector = Snapshot(self.live, self.table)
        self.persistent_bytes = self.table.nbytes

    def step(self) -> Changed:
        self.optimizer.step()
        detected = self._detector.detect()
        self._detector.advance(detected)
        return {index: change.indices for index, change in detected.changes.items()}


class FullClone(Contender):
    """As in drafts for TRL: clone the view in the served dtype before and after the step, and compare the clones."""

    name = "full-clone"

    def step(self) -> Changed:
        before = self.view()
        self.optimizer.step()
        after = self.view()
        return {
            index: (old != new).nonzero().flatten().numpy()
            for index, (old, new) in enumerate(zip(before, after, strict=True))
        }


CONTENDERS: list[Callable[[list[tuple[int, ...]], torch.dtype], Contender]] = [
    Contender,
    ProofOnly,
    InSlices,
    FromSnapshot,
    FullClone,
]


def shapes_of(parameters: int) -> list[tuple[int, ...]]:
    """Shapes of a small language model: an embedding, and as many layers as reach the number of parameters."""
    layer: list[tuple[int, ...]] = [(1024, 1024)] * 2 + [(512, 1024)] * 2 + [(3072, 1024)] * 3 + [(1024,)] * 2
    embedding = (max(1024, parameters // 8192), 1024)
    rest = parameters - embedding[0] * embedding[1]
    return [embedding, *layer * max(1, round(rest / sum(int(np.prod(shape)) for shape in layer)))]


def measure(parameters: int, rounds: int, dtype: torch.dtype) -> list[Row]:
    shapes = shapes_of(parameters)
    contenders = [make(shapes, dtype) for make in CONTENDERS]
    generator = torch.Generator().manual_seed(1)
    gradients = [(torch.randn(shape, generator=generator) * 1e-3).to(dtype) for shape in shapes]
    for contender in contenders:
        for tensor, gradient in zip(contender.live.values(), gradients, strict=True):
            tensor.grad = gradient  # shared: a step only reads it
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    peaks: dict[str, list[int]] = {contender.name: [] for contender in contenders}
    counts = {contender.name: np.zeros(3, np.int64) for contender in contenders}  # true and found, true, found
    for number in range(-2, rounds):  # the first two compile and fill the optimizer's state
        for gradient in gradients:
            gradient.mul_(-1) if number % 3 == 0 else gradient.mul_(1.1)
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            checked = number == rounds - 1  # a dense comparison, not timed
            before = contender.view() if checked else []
            _LIBC.malloc_trim(0)  # otherwise memory freed by the last step would hide new growth
            reset_peak()
            memory = resident()
            found, seconds = timed(contender.step)
            most = peak() - memory
            if number >= 0:
                times[contender.name].append(seconds)
                peaks[contender.name].append(most)
            if checked and found is not None:
                counts[contender.name] += _compared(before, contender.view(), found)
    total = contenders[0].table.numel
    rows = []
    for contender in contenders:
        name = contender.name
        both, true, claimed = counts[name].tolist()
        ratios = [mine / bare for mine, bare in zip(times[name], times["none"], strict=True)]
        rows.append(
            Row(
                name,
                statistics.median(times[name]),
                statistics.median(ratios) - 1,
                contender.persistent_bytes / total,
                max(peaks[name]),
                both / true if true else None,
                both / claimed if claimed else None,
            )
        )
    return rows


def _compared(before: list[torch.Tensor], after: list[torch.Tensor], found: Changed) -> np.ndarray:
    counts = np.zeros(3, np.int64)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        true = np.flatnonzero(bits_of(old) != bits_of(new))
        claimed = found.get(index, true[:0])
        counts += [len(np.intersect1d(true, claimed)), len(true), len(claimed)]
    return counts


def print_table(rows: list[Row]) -> None:
    table = Table(
        "detector", "step", "overhead", "persistent B/param", "peak extra", "recall", "precision", title="AdamW, fused"
    )
    for row in rows:
        table.add_row(
            row.detector,
            f"{1e3 * row.seconds:.0f} ms",
            f"{100 * row.overhead_fraction:.0f} %",
            f"{row.persistent_bytes_per_param:.2f}",
            f"{row.peak_extra_bytes / 1e6:.0f} MB",
            *("" if value is None else f"{value:.6f}" for value in (row.recall, row.precision)),
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=104_000_000)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the parameters")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.parameters, arguments.rounds, getattr(torch, arguments.dtype))
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
