"""What hubsync costs on GPUs, and what other ways cost there. benchmarks/README.md explains the rows.

    python -m benchmarks.gpu                             all parts, Qwen3-4B's shapes (20 minutes on an H200)
    python -m benchmarks.gpu --size 8b --only trainer server --json 8b.json
    python -m benchmarks.gpu --size 8b --only join --json 8b.json    adds a part to the file, and prints all of it
    python -m benchmarks.gpu --size tiny                 a test of the benchmark; runs on CPUs too

Weights are random. With two GPUs the server has one of its own.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

from hubsync.format.encoding import Encoding

from .device import release
from .models import SIZES
from .rows import Results, Row


def parts(options: argparse.Namespace) -> dict[str, Callable[[], Iterator[Row]]]:
    """Part -> its rows, in the order in which they are measured."""
    from . import join, kernels, peers, server, stage, trainer

    size = SIZES[options.size]
    return {
        "kernels": lambda: kernels.measure(size, options.repeats),
        "trainer": lambda: trainer.measure(size, options.repeats),
        "stage": lambda: stage.measure(size, options.repeats, Encoding.FAST),
        "stage-compact": lambda: stage.measure(size, options.repeats, Encoding.COMPACT),
        "server": lambda: server.measure(size, options.syncs, options.streams),
        "peers": lambda: peers.measure(size, options.syncs, options.streams),
        "join": lambda: join.measure(size, from_anchor=False),
        "join-anchor": lambda: join.measure(size, from_anchor=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="4b", help="of the model (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="kernels, trainer, stage, stage-compact, server, ...")
    parser.add_argument("--json", type=Path, help="keep results in this file, and those that it has")
    parser.add_argument("--repeats", type=int, default=8, help="of what one process does (default: %(default)s)")
    parser.add_argument("--syncs", type=int, default=6, help="with a server, of each kind (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=32, help="token streams (default: %(default)s)")
    options = parser.parse_args()
    known = parts(options)
    wanted = options.only or list(known)
    if unknown := set(wanted) - set(known):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results = Results(options.size, options.json)
    for part in wanted:
        results.run(part, known[part]())
        gc.collect()
        release()
    print(f"\n{results.markdown()}")
    if results.failed:
        raise SystemExit(f"failed: {', '.join(results.failed)}")


if __name__ == "__main__":
    main()
