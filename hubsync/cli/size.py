"""`hubsync size`: how large the deltas of a model are, and how long they take."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubsync.errors import ConfigError

from . import options

if TYPE_CHECKING:
    import torch

    from hubsync.format.encoding import Encoding

    from .sizing import DeltaSize, SyncTimes, WeightShares

    Deltas = Mapping[str, Mapping[Encoding, DeltaSize]]

HELP = "compute the size of deltas, and the seconds of a sync"
DESCRIPTION = """\
Compute how many weights a step changes, how large the delta is, and how long trainer and server take for it with one
H200 each. Nothing is measured here: the formulas and rates are in docs/sizing.md.
"""

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_SAMPLE = 1 << 18  # elements read of each tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="directory of safetensors files, or a number of parameters such as 600M or 8B"
    )
    parser.add_argument("--lr", type=float, default=1e-6, metavar="RATE", help="learning rate (default: %(default)g)")
    parser.add_argument(
        "--link",
        type=link,
        default="1Gb/s",
        metavar="SPEED",
        help="of each host to the Hub, such as 100Mb/s (default: %(default)s)",
    )
    parser.add_argument(
        "--round-trip",
        type=float,
        default=0.05,
        metavar="SECONDS",
        help="for a request to the Hub (default: %(default)g, an assumption)",
    )
    options.add_json(parser)


def link(text: str) -> float:
    """Bits per second of a text such as "1Gb/s", "100 Mbit/s" or "125MB/s" (bytes)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(b|bit|B)(?:/s|ps)", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a speed such as 1Gb/s, 100Mb/s or 125MB/s, not {text}")
    return float(found[1]) * _PREFIXES[found[2].lower()] * (8 if found[3] == "B" else 1)


def run(args: argparse.Namespace) -> int:
    from rich.filesize import decimal

    from hubsync.format.encoding import Encoding

    from . import sizing

    if not args.lr > 0 or args.round_trip < 0:
        raise ConfigError("--lr must be above 0, and --round-trip not below")
    weights = _weights(args.model)
    columns = {"first step": args.lr * sizing.FIRST, "later steps": args.lr * sizing.SETTLED}
    rows = {
        name: {encoding: sizing.delta(weights, update, encoding) for encoding in (Encoding.FAST, Encoding.COMPACT)}
        for name, update in columns.items()
    }
    seconds = {
        name: sizing.times(weights.parameters, deltas[Encoding.FAST], args.link, args.round_trip)
        for name, deltas in rows.items()
    }
    if args.json:
        print(json.dumps(_document(weights, rows, seconds)))
        return 0
    print(f"{weights.parameters:,} parameters, {decimal(2 * weights.parameters)} in bf16; learning rate {args.lr:g}\n")
    for line in _lines(rows, seconds, args):
        print("".join(f"{cell:>22}" if column else f"{cell:28}" for column, cell in enumerate(line)))
    return 0


def _weights(model: str) -> WeightShares:
    from . import sizing

    count = re.fullmatch(r"(\d+(?:\.\d+)?)([kMBTG]?)", model)
    if Path(model).is_dir():
        return _checkpoint(Path(model))
    if count is None or float(count[1]) == 0:
        raise ConfigError(
            f"{model} is neither a directory nor a number of parameters such as 8B: give the number, or download the "
            "model first (`hf download MODEL --local-dir DIR`)"
        )
    return sizing.normal_weights(round(float(count[1]) * _PREFIXES[count[2].lower()]))


def _checkpoint(directory: Path) -> WeightShares:
    """Counts all parameters, and exponents among the first elements of each tensor."""
    import torch
    from safetensors import SafetensorError, safe_open

    from hubsync.format.checkpoint import shards_of

    from . import sizing

    parameters, counts = 0, torch.zeros(sizing.EXPONENTS, dtype=torch.float64)
    for path in shards_of(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    numel, sample = _sample(file.get_slice(name))
                    if sample.is_floating_point() and numel:
                        exponents = (sample.to(torch.bfloat16).view(torch.int16).flatten().int() >> 7) & 0xFF
                        counts += torch.bincount(exponents, minlength=sizing.EXPONENTS) * (numel / sample.numel())
                        parameters += numel
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as a safetensors file: {error}") from None
    if not parameters:
        raise ConfigError(
            f"{directory} has no weights in safetensors files: download the model, or give its parameters"
        )
    return sizing.WeightShares(parameters, (counts / parameters).tolist())


def _sample(tensor: Any) -> tuple[int, torch.Tensor]:
    """Number of elements of a tensor in a file, and its first rows."""
    shape = tensor.get_shape()
    numel = math.prod(shape)
    rows = max(1, _SAMPLE * shape[0] // max(1, numel)) if shape else None
    return numel, tensor[:rows] if shape else tensor[...]


def _document(weights: WeightShares, deltas: Deltas, seconds: Mapping[str, SyncTimes]) -> dict[str, Any]:
    steps = {
        name: {str(encoding): asdict(delta) for encoding, delta in deltas[name].items()}
        | {"seconds": seconds[name].to_json()}
        for name in deltas
    }
    return {"parameters": weights.parameters, **steps}


def _lines(deltas: Deltas, seconds: Mapping[str, SyncTimes], args: argparse.Namespace) -> Iterator[list[str]]:
    from hubsync.format.encoding import Encoding

    fast = [by_encoding[Encoding.FAST] for by_encoding in deltas.values()]
    compact = [by_encoding[Encoding.COMPACT] for by_encoding in deltas.values()]
    times = list(seconds.values())
    yield ["", *deltas]
    yield ["changed", *(f"{100 * delta.changed:.2f} %" for delta in fast)]
    yield ["delta, fast", *(_delta(delta) for delta in fast)]
    yield ["delta, compact", *(_delta(delta) for delta in compact)]
    yield ["upload and download", *(f"{time.transfer:.2f} s" for time in times)]
    yield [f"requests, {1e3 * args.round_trip:g} ms each", *(f"{time.requests:.2f} s" for time in times)]
    yield ["trainer and server", *(f"{time.compute:.2f} s" for time in times)]
    yield ["publish to committed", *(f"{time.total:.2f} s" for time in times)]
    yield ["all weights, same link", *(f"{time.whole:.2f} s" for time in times)]
    yield ["all weights faster above", *(f"{time.crossing / 1e9:.2g} Gb/s" for time in times)]


def _delta(delta: DeltaSize) -> str:
    from rich.filesize import decimal

    return f"{decimal(delta.nbytes)} ({delta.bits:.1f} bits)"
