"""Cost of cutting tensors into chunks in a compact delta: bits per change for several minimum chunk sizes.

python -m benchmarks.chunks --trace DIR --steps 10-18
python -m benchmarks.chunks                     a generated synthetic pair
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hubsync.format.codec import Encoded, Grid, encode
from hubsync.format.patch import Patch

from .codec import bits_view, patch_of
from .floors import floors
from .measuring import timed
from .snapshots import Pair, add_arguments, chosen

CUTS: dict[str, Callable[[int, int], Grid]] = {
    "rows of about 2^20 elements": Grid.contiguous,
    **{f"tiles of at least 2^{n}": partial(Grid.tiles, smallest=1 << n) for n in range(19, 11, -1)},
}


def _encode(pairs: Sequence[Pair], patches: Sequence[Patch], cut: Callable[[int, int], Grid]) -> list[Encoded]:
    return [
        encode(pair.table, patch, bits_view(pair, pair.old), grid_of=cut)
        for pair, patch in zip(pairs, patches, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chunks", description=__doc__.split("\n")[0])
    add_arguments(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = Table("cut")
    for heading in ("chunks", "bits/change", "rows' share", "x floor", "encode s"):
        table.add_column(heading, justify="right")
    pairs = list(chosen(parser, options))
    changes = sum(int(np.count_nonzero(pair.old != pair.new)) for pair in pairs)
    floor = sum(floors(pair).conditional * np.count_nonzero(pair.old != pair.new) for pair in pairs) / changes
    patches = [patch_of(pair) for pair in pairs]
    _encode(pairs[:1], patches[:1], Grid.tiles)  # compiles
    for name, cut in CUTS.items():
        coded, seconds = timed(_encode, pairs, patches, cut)
        count = sum(cut(*pairs[0].table[index].matrix).count for index in patches[0])
        bits, rows = (8 * sum(sizes) / changes for sizes in ([c.nbytes for c in coded], [len(c.chunks) for c in coded]))
        table.add_row(name, str(count), f"{bits:.3f}", f"{rows:.3f}", f"{bits / floor:.4f}", f"{seconds:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
