"""`python -m tests.fuzz deltas`: mutated delta parts; `... documents`: manifests, heads, run.json, headers.

`deltas` compiles the decoder with numba's bounds checks: a read or write outside of an array is an error. `documents`
is guided by coverage where the package `atheris` is installed (`make fuzz` does that); else its mutations are random.
Both print executions, rejections and peak memory, and end with 1 if anything else came out. An input that failed is
kept in `build/fuzz`; `--input FILE` reads it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

RUNS, SECONDS = 300_000, 600.0
KEEP = Path("build/fuzz")
_BOUND_BYTES = 500_000  # size of the parts whose memory is measured


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["deltas", "documents"])
    parser.add_argument("--runs", type=int, default=RUNS, help="executions (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="stop after this time (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="continue at execution N")
    parser.add_argument("--input", type=Path, metavar="FILE", help="read this input once")
    parser.add_argument("--random", action="store_true", help="documents: do not use atheris")
    args = parser.parse_args(argv)
    if args.target == "deltas":
        _check_bounds()
        from . import deltas as target
    elif args.input is None and not args.random and find_spec("atheris") is not None:
        from .guided import run

        return run(args.runs, args.seconds, args.seed, KEEP)
    else:
        from . import documents as target
    if args.input is not None:
        target.read(args.input.read_bytes())
        print("accepted")
        return 0
    return _run(target, args)


def _check_bounds() -> None:
    """Let numba check bounds. Kept code does not say whether it checks them, so it is kept elsewhere."""
    assert "numba" not in sys.modules, "too late for NUMBA_BOUNDSCHECK"
    os.environ["NUMBA_BOUNDSCHECK"] = "1"
    os.environ["NUMBA_CACHE_DIR"] = str((KEEP / "checked-code").absolute())


def _run(target: ModuleType, args: argparse.Namespace) -> int:
    from .session import Session

    target.warm_up()
    session = Session(target.read, target.REJECTIONS, KEEP)
    session.run(target.make, seed=args.seed, first=args.first, runs=args.runs, seconds=args.seconds)
    print(f"{args.target}: {session.summary()}")
    within = not hasattr(target, "worst_memory") or _is_within(*target.worst_memory(_BOUND_BYTES))
    return 1 if session.failures or not within else 0


def _is_within(name: str, ratio: float) -> bool:
    from tests.support.worst_parts import stated_bound

    print(f"worst part of {_BOUND_BYTES:,} bytes: {name}, peak memory {ratio:.0f} bytes for a byte of {stated_bound()}")
    return ratio < stated_bound()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="hubsync-fuzz-") as directory:
        os.environ.setdefault("HUBSYNC_CACHE", directory)
        sys.exit(main())
