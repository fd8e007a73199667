"""Mean updates of a training, found from the share of bf16 weights that each step changed. docs/sizing.md uses them.

    python -m benchmarks.sizing --trace DIR --steps 1-18 --lr 1e-6
    python -m benchmarks.sizing --old A --new B --lr 1e-6            # two checkpoints, one step apart

`r` is the mean update divided by the learning rate for which the formula of `hubsync size` gives the measured share.
The last columns are that formula's shares for the same `r` at other learning rates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from hubsync.cli.sizing import EXPONENTS, WeightShares, changed_share

from .snapshots import Pair, add_arguments, chosen


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        changed: measured share of the weights whose bf16 pattern changed.
        r: mean update divided by the learning rate.
        thrice, tenfold: computed shares at 3 and 10 times the learning rate.
    """

    pair: str
    changed: float
    r: float
    thrice: float
    tenfold: float


def measure(pair: Pair, rate: float) -> Row:
    counts = np.bincount((pair.old >> 7) & 0xFF, minlength=EXPONENTS)
    weights = WeightShares(len(pair.old), (counts / len(pair.old)).tolist())
    changed = float(np.mean(pair.old != pair.new))
    update = _update(weights, changed)
    return Row(pair.name, changed, update / rate, *(changed_share(weights, factor * update) for factor in (3, 10)))


def _update(weights: WeightShares, changed: float) -> float:
    """The mean update that changes this share of the weights, by bisection of its logarithm."""
    low, high = -60.0, 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if changed_share(weights, 2.0**middle) > changed else (middle, high)
    return float(2.0**low)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--lr", type=float, default=1e-6, help="learning rate of the steps (default: %(default)g)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    options = parser.parse_args(arguments)
    rows = [measure(pair, options.lr) for pair in chosen(parser, options)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table(title=f"Learning rate {options.lr:g}")
    for heading in ("", "changed", "r", f"at {3 * options.lr:g}", f"at {10 * options.lr:g}"):
        table.add_column(heading, justify="right")
    for row in rows:
        shares = [f"{100 * share:.2f} %" for share in (row.changed, row.thrice, row.tenfold)]
        table.add_row(row.pair, shares[0], f"{row.r:.2f}", *shares[1:])
    Console().print(table)


if __name__ == "__main__":
    main()
