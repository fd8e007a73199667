"""Bytes and seconds to bring a replica several versions ahead.

Compares one merged delta, the chain of single deltas, and the cheapest path through the compactor's merged deltas.

    python -m benchmarks.spans --trace DIR
    python -m benchmarks.spans                     a generated synthetic run

Synthetic steps extend a trace that is shorter than a span: fp32 masters within the rounding of its last snapshot,
moved by momentum-like updates of about the density of the trace's last steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hubsync.chain.compaction import MAX_SPAN
from hubsync.chain.spans import due
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Manifest, Position
from hubsync.format.parts import Transition, read_delta, write_delta
from hubsync.format.patch import Patch, compose
from hubsync.format.view_bits import Advanced
from hubsync.kernels.bits import bits_of

from .codec import apply_patch, bits_view, patch_of
from .measuring import timed
from .snapshots import Pair, synthetic_pair, trace_pairs

SPANS = (1, 4, 16, 64)
_MOMENTUM = 0.9

Span = tuple[int, int]  # versions: from, to


def _steps(trace: Path | None, count: int) -> Iterator[Pair]:
    """`count` pairs, each starting at the end of the previous one."""
    last = 0
    if trace is None:
        pair = synthetic_pair()
    else:
        last = min(count, len(list(trace.glob("step-*.safetensors"))))
        for pair in trace_pairs(trace, 1, last):
            yield pair
        pair = replace(pair, old=pair.new, new=pair.new)
    yield from _made(pair, count - last)


def _made(pair: Pair, count: int, update: float = 3e-7) -> Iterator[Pair]:
    rng = np.random.default_rng(0)
    weights = (pair.old.astype(np.uint32) << 16).view(np.float32)
    spacing = np.spacing(weights) * np.float32(1 << 16)  # of bf16
    master = weights + spacing * (rng.random(len(weights), np.float32) - np.float32(0.5)) * np.float32(0.98)
    momentum = np.zeros_like(master)
    old = pair.old
    for number in range(count):
        momentum *= np.float32(_MOMENTUM)
        momentum += rng.standard_normal(len(master), np.float32) * np.float32(update * (1 - _MOMENTUM**2) ** 0.5)
        master += momentum
        new = bits_of(torch.from_numpy(master).bfloat16())
        yield Pair(f"made {number}", pair.table, old, new)
        old = new


def _part(pair: Pair, encoding: Encoding) -> bytes:
    part = write_delta(
        pair.table,
        patch_of(pair),
        Transition("0" * 32, Position(0, "0" * 32), Position(1, "1" * 32)),
        encoding=encoding,
        old=bits_view(pair, pair.old),
    )
    return bytes(part)


def _follow(parts: Sequence[bytes], pair: Pair, weights: np.ndarray, encoding: Encoding) -> None:
    """Decode all parts, compose them and apply the result once, as a replica does."""
    old = bits_view(pair, weights)
    if encoding.needs_base:
        patch: Patch = {}
        for part in parts:
            patch = compose(patch, read_delta(part, pair.table, None, Advanced(pair.table, old, patch)))
    else:
        patch = reduce(compose, (read_delta(part, pair.table, None) for part in parts))
    apply_patch(weights, patch, pair)


class Bytes:
    """Size of the merged delta (fast encoding) from any version to any later one, measured on first use."""

    def __init__(self, pairs: Sequence[Pair]):
        self._table = pairs[0].table
        self._views = [pairs[0].old, *(pair.new for pair in pairs)]
        self._known: dict[Span, int] = {}

    def __getitem__(self, span: Span) -> int:
        if span not in self._known:
            first, last = span
            pair = Pair(f"{first} to {last}", self._table, self._views[first], self._views[last])
            self._known[span] = len(_part(pair, Encoding.FAST))
        return self._known[span]

    def of(self, spans: Iterable[Span]) -> int:
        return sum(self[span] for span in spans)


def _spans(newest: int, overlapping: bool) -> list[Span]:
    """Merged deltas kept while `newest` is the newest version."""
    made = [(span[0].version - 1, span[-1].version) for span in due(_chain(newest), MAX_SPAN)]
    return [(first, last) for first, last in made if overlapping or first % (last - first) == 0]


def _chain(newest: int) -> list[Manifest]:
    """Manifests with the fields that a compactor reads: versions and their parents."""
    blank = Manifest("delta", "", "", "", Position(0, ""), None, None, (), 0, 0.0)
    versions = range(1, newest + 1)
    return [replace(blank, position=Position(v, ""), parent=Position(v - 1, "")) for v in versions]


def _paths(newest: int, spans: Sequence[Span], nbytes: Bytes) -> list[tuple[int, int]]:
    """Bytes and objects of the cheapest path to the newest version, from each version before it."""
    paths = [(0, 0)] * (newest + 1)
    for first in range(newest - 1, -1, -1):
        ends = [first + 1, *(last for start, last in spans if start == first)]
        paths[first] = min((nbytes[first, last] + paths[last][0], paths[last][1] + 1) for last in ends)
    return paths[:-1]


def _policies(pairs: Sequence[Pair]) -> Table:
    """Cost and savings of merged deltas, for all k up to the number of steps, with each version as the newest."""
    nbytes, count = Bytes(pairs), len(pairs)
    singles = nbytes.of((first, first + 1) for first in range(count))
    title = f"k versions behind, k = 2 to {count}: bytes relative to the best single merged delta"
    table = Table(title=title)
    for heading in ("merged deltas", "worst", "at", "mean", "most objects", "k with > 2 log2 k", "kept", "uploaded"):
        table.add_column(heading, justify="right")
    policies: dict[str, Callable[[int], list[Span]]] = {
        "none": lambda newest: [],
        "aligned": lambda newest: _spans(newest, overlapping=False),
        "default": lambda newest: _spans(newest, overlapping=True),
    }
    for name, spans in policies.items():
        ratios: list[tuple[float, int, int]] = []
        for newest in range(2, count + 1):
            paths = _paths(newest, spans(newest), nbytes)[: newest - 1]
            ratios += [(path / nbytes[first, newest], newest - first, n) for first, (path, n) in enumerate(paths)]
        worst, behind, _ = max(ratios)
        made = {span for newest in range(1, count + 1) for span in spans(newest)}
        table.add_row(
            name, f"{worst:.2f}", f"k = {behind}", f"{np.mean([ratio for ratio, _, _ in ratios]):.2f}",
            str(max(n for _, _, n in ratios)), str(sum(n > 2 * np.log2(k) for _, k, n in ratios)),
            f"{nbytes.of(spans(count)) / singles:.1f}", f"{nbytes.of(made) / singles:.1f}",
        )  # fmt: skip
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spans", description=__doc__.split("\n\n")[0])
    parser.add_argument("--trace", type=Path, help="directory with base.safetensors and step-NN.safetensors")
    parser.add_argument(
        "--spans", type=int, nargs="+", default=SPANS, help="numbers of versions to merge, default 1 4 16 64"
    )
    parser.add_argument("--behind", type=int, default=18, help="largest number of versions behind, default 18")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    Console(width=120).print(_policies(list(_steps(options.trace, options.behind))))
    print("'kept' and 'uploaded': bytes of merged deltas relative to all single deltas; 'kept' if retention runs.\n")
    Console(width=120).print(_single_and_merged(options.trace, options.spans))
    print(
        "Spans begin at the first step. 'merged s' and 'chain s': CPU seconds of one core to decode, compose and "
        "apply; 'merge s': to encode the merged delta once."
    )


def _single_and_merged(trace: Path | None, spans: Sequence[int]) -> Table:
    encodings = (Encoding.FAST, Encoding.COMPACT)
    singles: dict[Encoding, list[bytes]] = {encoding: [] for encoding in encodings}
    table = Table("span")
    for heading in (
        "encoding",
        "merged kB",
        "chain kB",
        "of chain",
        "merge s",
        "merged s",
        "chain s",
        "merged b/change",
    ):
        table.add_column(heading, justify="right")
    start: np.ndarray | None = None
    for number, pair in enumerate(_steps(trace, max(spans)), 1):
        start = pair.old if start is None else start
        for encoding in encodings:
            singles[encoding].append(_part(pair, encoding))
        if number not in spans:
            continue
        whole = Pair(f"{number} versions", pair.table, start, pair.new)
        for encoding in encodings:
            merged, merge_s = timed(_part, whole, encoding)
            seconds = []
            for parts in ([merged], singles[encoding]):
                best = np.inf
                for _ in range(2):
                    weights = start.copy()
                    best = min(best, timed(_follow, parts, whole, weights, encoding)[1])
                    if not np.array_equal(weights, whole.new):
                        raise SystemExit(f"{encoding}, {number} versions: did not round-trip")
                seconds.append(best)
            chain = sum(map(len, singles[encoding]))
            bits = 8 * len(merged) / np.count_nonzero(whole.old != whole.new)
            table.add_row(
                str(number), encoding.value, f"{len(merged) / 1e3:.0f}", f"{chain / 1e3:.0f}",
                f"{len(merged) / chain:.2f}", f"{merge_s:.3f}", f"{seconds[0]:.3f}", f"{seconds[1]:.3f}", f"{bits:.2f}",
            )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
