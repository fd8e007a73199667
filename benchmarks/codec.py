"""Size and speed of delta formats on pairs of bf16 snapshots; benchmarks/README.md explains each row.

    python -m benchmarks.codec                                   a generated synthetic pair
    python -m benchmarks.codec --old A --new B                   two checkpoints: safetensors files or directories
    python -m benchmarks.codec --trace DIR --steps 10-18         base.safetensors and step-NN.safetensors

One thread, thread CPU time (wall time with --threads). Every row is decoded and compared before it is printed.
"""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

import numpy as np
import torch
import zstandard
from rich.console import Console
from rich.table import Table

from hubsync.format.digest import digest_change, digest_range
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position
from hubsync.format.parts import Transition, read_delta, write_delta
from hubsync.format.patch import Patch, TensorDelta, changes_of
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import advance, difference, find_changes

from .floors import floors
from .measuring import Spread, repeated, timed
from .snapshots import Pair, add_arguments, chosen, first_step_pair

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
    name = "TRL-like"

    def encode(self, pair: Pair) -> bytes:
        indices, _ = find_changes(pair.old, pair.new)
        return indices.astype(np.int32).tobytes() + pair.new[indices].tobytes()

    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        n = len(data) // 6
        weights[np.frombuffer(data, np.int32, n)] = np.frombuffer(data, np.uint16, n, 4 * n)


class Gaps(Format):
    """Gaps in one byte (255: listed as uint32), then one value per change; all through zstd level 1."""

    name = "PULSE-like"

    def encode(self, pair: Pair) -> bytes:
        indices, diffs = find_changes(pair.old, pair.new)
        gaps = np.diff(indices, prepend=-1) - 1
        long = gaps[gaps >= 255].astype(np.uint32)
        counts = np.array([len(indices), len(long)], np.uint32)
        short = np.minimum(gaps, 255).astype(np.uint8)
        streams = [counts.tobytes(), long.tobytes(), short.tobytes(), self.pack(pair.new[indices], diffs)]
        return zstandard.ZstdCompressor(level=1).compress(b"".join(streams))

    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        data = zstandard.ZstdDecompressor().decompress(data)
        n, n_long = map(int, np.frombuffer(data, np.uint32, 2))
        gaps = np.frombuffer(data, np.uint8, n, 8 + 4 * n_long).astype(np.int64)
        gaps[gaps == 255] = np.frombuffer(data, np.uint32, n_long, 8)
        at = np.cumsum(gaps + 1) - 1
        weights[at] = self.unpack(data[8 + 4 * n_long + n :], weights[at])

    def pack(self, new: np.ndarray, diffs: np.ndarray) -> bytes:
        return new.tobytes()

    def unpack(self, data: bytes, old: np.ndarray) -> np.ndarray:
        return np.frombuffer(data, np.uint16)


class GapsAndSteps(Gaps):
    name = "gap8 + ulp8 + zstd-1"

    def pack(self, new: np.ndarray, diffs: np.ndarray) -> bytes:
        steps = diffs.astype(np.int32)
        zigzag = (steps << 1) ^ (steps >> 31)
        return np.minimum(zigzag, 255).astype(np.uint8).tobytes() + diffs[zigzag >= 255].tobytes()

    def unpack(self, data: bytes, old: np.ndarray) -> np.ndarray:
        zigzag = np.frombuffer(data, np.uint8, len(old)).astype(np.int32)
        steps = ((zigzag >> 1) ^ -(zigzag & 1)).astype(np.int16)
        steps[zigzag == 255] = np.frombuffer(data, np.int16, offset=len(old))
        return advance(old, steps)


class DenseXor(Format):
    name = "XOR-like"

    def encode(self, pair: Pair) -> bytes:
        return zstandard.ZstdCompressor(level=1).compress(memoryview(pair.old ^ pair.new).cast("B"))

    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        weights ^= np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint16)


class Hubsync(Format):
    def __init__(self, encoding: Encoding):
        self.name = f"hubsync-{encoding}"
        self._encoding = encoding

    def encode(self, pair: Pair) -> bytes:
        parent, position = Position(17, "0" * 32), Position(18, "1" * 32)
        part = write_delta(
            pair.table,
            patch_of(pair),
            Transition("0" * 32, parent, position),
            encoding=self._encoding,
            old=bits_view(pair, pair.old),
        )
        return bytes(part)

    def apply(self, data: bytes, weights: np.ndarray, pair: Pair) -> None:
        apply_patch(weights, read_delta(data, pair.table, None, bits_view(pair, weights)), pair)


FORMATS: list[Format] = [Raw(), Gaps(), GapsAndSteps(), DenseXor(), Hubsync(Encoding.FAST), Hubsync(Encoding.COMPACT)]


def patch_of(pair: Pair) -> Patch:
    patch: Patch = {}
    for index, at in enumerate(pair.slices):
        delta = TensorDelta(*find_changes(pair.old[at], pair.new[at]))
        if len(delta):
            patch[index] = delta
    return patch


def apply_patch(weights: np.ndarray, patch: Patch, pair: Pair) -> None:
    for index, delta in patch.items():
        tensor = weights[pair.slices[index]]
        indices, _, after = changes_of(delta, tensor)
        tensor[indices] = after


def bits_view(pair: Pair, weights: np.ndarray) -> ViewBits:
    return ViewBits(pair.table, tensors_of(pair, weights))


def tensors_of(pair: Pair, weights: np.ndarray) -> dict[str, torch.Tensor]:
    """The tensors of a snapshot, shaped. They share its memory."""
    flat = torch.from_numpy(weights.view(np.int16)).view(torch.bfloat16)
    return {spec.name: flat[at].view(spec.shape) for spec, at in zip(pair.table, pair.slices, strict=True)}


# --- measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One format on one pair. Speeds are GB of one dense bf16 snapshot per second: the best run, and the spread.

    The floors are bits per changed element (`benchmarks.floors`); `ratio` is `bits_per_change`
    divided by the floor that the format could reach: the conditional one for hubsync-compact, else the unconditional.
    """

    pair: str
    codec: str
    changed: int
    total: int
    bits_per_change: float
    floor_unconditional: float
    floor_conditional: float
    ratio: float
    encode_gbps: float
    decode_gbps: float
    memcpy_gbps: float
    encode_spread: Spread
    decode_spread: Spread
    memcpy_spread: Spread


def measure(pair: Pair, repeats: int) -> list[Row]:
    """Measure every format on one pair, and a plain copy of the snapshot."""
    changed, gigabytes = int(np.count_nonzero(pair.old != pair.new)), pair.old.nbytes / 1e9
    if not changed:
        raise SystemExit(f"{pair.name}: nothing changed, so there are no bits per change")
    floor = floors(pair)
    weights = np.empty_like(pair.old)
    rows = []
    for form in FORMATS:
        data, encode_seconds = repeated(repeats, form.encode, pair)
        copy_seconds, apply_seconds = [], []
        for _ in range(repeats + 1):  # the first round compiles and warms up
            copy_seconds.append(timed(np.copyto, weights, pair.old)[1])
            apply_seconds.append(timed(form.apply, data, weights, pair)[1])
            if not np.array_equal(weights, pair.new):
                raise SystemExit(f"{form.name}: {pair.name} did not round-trip")
        encode, decode, memcpy = (
            Spread.of(gigabytes, seconds) for seconds in (encode_seconds, apply_seconds[1:], copy_seconds[1:])
        )
        bits = 8 * len(data) / changed
        rows.append(
            Row(
                pair=pair.name,
                codec=form.name,
                changed=changed,
                total=len(pair.old),
                bits_per_change=bits,
                floor_unconditional=floor.unconditional,
                floor_conditional=floor.conditional,
                ratio=bits / (floor.conditional if form.name == "hubsync-compact" else floor.unconditional),
                encode_gbps=encode.fastest,
                decode_gbps=decode.fastest,
                memcpy_gbps=memcpy.fastest,
                encode_spread=encode,
                decode_spread=decode,
                memcpy_spread=memcpy,
            )
        )
    return rows


def _show(rows: Sequence[Row]) -> None:
    console = Console(width=120)
    for pair, group in groupby(rows, key=lambda row: row.pair):
        own = list(group)
        table = Table("codec")
        for heading in ("bits/change", "x floor", "encode/copy", "decode/copy", "encode GB/s", "decode GB/s"):
            table.add_column(heading, justify="right")
        for row in own:
            ratios = (f"{speed / row.memcpy_gbps:.3f}" for speed in (row.encode_gbps, row.decode_gbps))
            speeds = (str(row.encode_spread), str(row.decode_spread))
            table.add_row(row.codec, f"{row.bits_per_change:.2f}", f"{row.ratio:.3f}", *ratios, *speeds)
        first = own[0]
        console.print(
            f"{pair}: {first.changed} of {first.total} elements changed ({first.changed / first.total:.2%}); floors "
            f"{first.floor_unconditional:.2f} bits, {first.floor_conditional:.2f} given the old exponent; "
            f"memcpy {first.memcpy_spread} GB/s"
        )
        console.print(table)
    console.print(
        "Speeds: GB of dense bf16 weights per second, slowest/median/best run; ratios are of the best runs. "
        "hubsync-compact is compared with the conditional floor (old exponent), the others with the unconditional one."
    )


def _show_passes(pair: Pair, repeats: int) -> None:
    """Measure finding changes and digests, the passes outside of the codec."""
    gigabytes = pair.old.nbytes / 1e9
    weights = np.empty_like(pair.old)
    _, copying = repeated(repeats, np.copyto, weights, pair.old)
    (indices, _), comparing = repeated(repeats, find_changes, pair.old, pair.new)
    _, comparing_equal = repeated(repeats, find_changes, pair.old, weights)
    _, digesting = repeated(repeats, digest_range, 1, pair.old)
    _, updating = repeated(repeats, digest_change, 1, indices, pair.old[indices], pair.new[indices])
    assert np.array_equal(difference(pair.old[indices], pair.new[indices]), find_changes(pair.old, pair.new)[1])
    table = Table("pass over a snapshot")
    for heading in ("GB/s", "/ memcpy"):
        table.add_column(heading, justify="right")
    for name, seconds in (
        ("memcpy", copying),
        ("compare", comparing),
        ("compare, nothing changed", comparing_equal),
        ("digest, whole", digesting),
    ):
        table.add_row(name, str(Spread.of(gigabytes, seconds)), f"{min(copying) / min(seconds):.2f}")
    Console(width=120).print(table)
    print(f"digest, updated from a delta: {len(indices) / min(updating) / 1e6:.0f} million changes per second")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--first-step", action="store_true", help="also the first step from each old snapshot")
    parser.add_argument("--repeats", type=int, default=5, help="number of runs; the best counts, default 5")
    parser.add_argument("--threads", type=int, default=1, help="number of threads, default 1")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    rows, last = [], None
    for pair in chosen(parser, options):
        for measured in [pair, first_step_pair(pair)] if options.first_step else [pair]:
            rows += measure(measured, options.repeats)
        last = pair
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    _show(rows)
    if last is not None:
        _show_passes(last, options.repeats)


if __name__ == "__main__":
    main()
