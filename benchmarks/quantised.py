"""How much of an fp8 checkpoint changes in a step, beside its bf16 original.

    python -m benchmarks.quantised                                   synthetic steps of several sizes
    python -m benchmarks.quantised --trace DIR --steps 10-18         base.safetensors and step-NN.safetensors
    python -m benchmarks.quantised --old A --new B                   two checkpoints

Matrices are quantised before and after a step in blocks of 128 x 128, e4m3 codes with one float32 scale a block, by the
arithmetic with which transformers saves an fp8 checkpoint (`Fp8Quantize` in its `finegrained_fp8.py`; tested against
it). `powers of two` is its ue8m0 format. Matrices whose sides are no multiple of 128 and vectors stay bf16, as there.
Embeddings are quantised too, unlike there: synthetic ones are a part of the elements like any other.

Both deltas are written by hubsync's codec, and read back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position
from hubsync.format.parts import Transition, read_delta, write_delta
from hubsync.format.patch import Patch, TensorDelta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import bits_of, dtype_code, find_changes

from .codec import tensors_of
from .snapshots import Pair, add_arguments, chosen, synthetic_pair

BLOCK = 128
SCALE = "_scale_inv"
LARGEST = torch.finfo(torch.float8_e4m3fn).max
UPDATES = (3e-8, 1e-7, 3e-7, 1e-6)

Tensors = dict[str, torch.Tensor]


def quantise(weight: torch.Tensor, *, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in blocks.

    Args:
        weight: [rows, cols], both multiples of `BLOCK`.
        power_of_two: scales are rounded up to powers of two. They are kept as float32 here.

    Returns:
        e4m3 codes, [rows, cols], and float32 scales, [rows / BLOCK, cols / BLOCK]; weight = code * scale.
    """
    rows, cols = weight.shape
    tiles = weight.float().reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
    largest = tiles.abs().amax(dim=(1, 3))
    factors = torch.where(largest > 0, LARGEST / torch.where(largest > 0, largest, 1.0), 1.0)
    scales = 1.0 / factors
    if power_of_two:
        scales = torch.pow(2.0, torch.ceil(torch.log2(scales.clamp(min=torch.finfo(torch.float32).tiny))))
        factors = 1.0 / scales
    codes = (tiles * factors[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.reshape(rows, cols), scales


def has_blocks(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a bf16 checkpoint is quantised, or a tensor of an fp8 checkpoint is codes."""
    return tensor.ndim == 2 and not any(side % BLOCK for side in tensor.shape)


def quantised(tensors: Tensors, *, power_of_two: bool = False) -> Tensors:
    """The fp8 checkpoint of a bf16 one."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if has_blocks(tensor):
            result[name], result[f"{name}{SCALE}"] = quantise(tensor, power_of_two=power_of_two)
        else:
            result[name] = tensor
    return result


@dataclass(frozen=True)
class Row:
    """One checkpoint format on one pair. Shares are of the elements of the matrices that fp8 quantises.

    Attributes:
        changed: share of the elements that change.
        by_scale: share of the elements that change in blocks whose scale moves.
        scales: share of the scales that change.
        bits: of the delta, for each element that changes, scales counted as elements.
        bytes: of the delta.
        of_dense: bytes of the delta by those of the whole checkpoint in this format.
    """

    pair: str
    format: str
    encoding: str
    changed: float
    by_scale: float
    scales: float
    bits: float
    bytes: int
    of_dense: float


def measure(pair: Pair, encoding: Encoding) -> Iterator[Row]:
    old, new = tensors_of(pair, pair.old), tensors_of(pair, pair.new)
    yield _row(pair.name, "bf16", encoding, old, new)
    for label, power_of_two in (("fp8, float32 scales", False), ("fp8, powers of two", True)):
        yield _row(
            pair.name,
            label,
            encoding,
            quantised(old, power_of_two=power_of_two),
            quantised(new, power_of_two=power_of_two),
        )


def _row(pair: str, label: str, encoding: Encoding, old: Tensors, new: Tensors) -> Row:
    table = TensorTable([TensorSpec(name, tuple(t.shape), dtype_code(t.dtype)) for name, t in old.items()])
    patch: Patch = {}
    for index, name in enumerate(old):
        delta = TensorDelta(*find_changes(bits_of(old[name]), bits_of(new[name])))
        if len(delta):
            patch[index] = delta
    at = Transition("0" * 32, Position(17, "0" * 32), Position(18, "1" * 32))
    part = bytes(write_delta(table, patch, at, encoding=encoding, old=ViewBits(table, old)))
    if read_delta(part, table, None, ViewBits(table, old)) != patch:
        raise SystemExit(f"{pair}, {label}: the delta reads back differently")
    changes = sum(map(len, patch.values()))
    return Row(
        pair, label, str(encoding), *_shares(old, new), 8 * len(part) / changes, len(part), len(part) / table.nbytes
    )


def _shares(old: Tensors, new: Tensors) -> tuple[float, float, float]:
    """`Row.changed`, `by_scale` and `scales`."""
    elements = changed = by_scale = moved = scales = 0
    for name, tensor in old.items():
        if not has_blocks(tensor) or name.endswith(SCALE):
            continue
        different = torch.from_numpy(bits_of(tensor) != bits_of(new[name])).view(tensor.shape)
        elements, changed = elements + tensor.numel(), changed + int(different.sum())
        if (before := old.get(f"{name}{SCALE}")) is not None:
            moves = before != new[f"{name}{SCALE}"]
            by_scale += int((different & moves.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)).sum())
            moved, scales = moved + int(moves.sum()), scales + moves.numel()
    return changed / elements, by_scale / elements, moved / scales if scales else 0.0


def _show(rows: Sequence[Row]) -> None:
    table = Table("pair", "checkpoint", "changed", "where a scale moved", "scales", "bits/change", "kB", "of dense")
    for row in rows:
        shares = [f"{row.changed:.3%}", f"{row.by_scale:.3%}", f"{row.scales:.1%}"]
        if row.format == "bf16":
            shares[1:] = ["", ""]
        table.add_row(row.pair, row.format, *shares, f"{row.bits:.2f}", f"{row.bytes / 1e3:.1f}", f"{row.of_dense:.3%}")
    Console(width=130).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--encoding", type=Encoding, choices=list(Encoding), default=Encoding.FAST)
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    options = parser.parse_args(arguments)
    pairs: Iterator[Pair] = chosen(parser, options)
    if options.trace is None and options.old is None:
        pairs = (replace(synthetic_pair(update=update), name=f"updates of {update:.0e}") for update in UPDATES)
    rows = [row for pair in pairs for row in measure(pair, options.encoding)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _show(rows)


if __name__ == "__main__":
    main()
