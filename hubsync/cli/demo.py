"""`hubsync demo`: train, sync and compare on one machine, in minutes."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hubsync.errors import ConfigError

from . import options

if TYPE_CHECKING:
    from hubsync.demo.run import Demo

STEPS = 80
QUICK_STEPS = 20

HELP = "train a tiny model with TRL and sync a real vLLM server, bit for bit"
DESCRIPTION = """\
Start a local Hub and a real vLLM server, train a tiny Qwen3 with TRL's GRPOTrainer, sync the server through a bucket
after every optimizer step, and compare it with a fresh server at the end. Exit code 0: both are equal, bit for bit.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps (default: {STEPS})")
    parser.add_argument(
        "--quick", action="store_true", help=f"only {QUICK_STEPS} steps, too few for the reward to rise clearly"
    )
    parser.add_argument("--bucket", metavar="ADDRESS", help=f"use {options.ADDRESS}, instead of a local Hub")
    parser.add_argument(
        "--server",
        metavar="URL",
        help="use a running vLLM server of WORKDIR/base; the first run makes that model and prints how to serve it",
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="directory for all files, which stay there (default: a temporary directory)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to FILE")


def run(args: argparse.Namespace) -> int:
    from hubsync.demo.local import local_bucket

    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # so that child processes are ended
    steps = _checked_steps(args)
    with ExitStack() as stack:
        workdir = args.workdir or Path(stack.enter_context(TemporaryDirectory(prefix="hubsync-demo-")))
        workdir.mkdir(parents=True, exist_ok=True)
        if args.json is not None:
            args.json.touch()  # fails now rather than at the end
        bucket = args.bucket or stack.enter_context(local_bucket(workdir / "hub"))
        result = _demo()(workdir.absolute(), steps, bucket, args.server).run()
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["exact"] else 1


def _checked_steps(args: argparse.Namespace) -> int:
    """Number of steps. ConfigError if options do not fit together."""
    steps: int = (QUICK_STEPS if args.quick else STEPS) if args.steps is None else args.steps
    if steps < 1:
        raise ConfigError(f"--steps must be at least 1, not {steps}")
    if args.server and not args.bucket:
        raise ConfigError("--server needs --bucket: the address that the server was started with (HUBSYNC_BUCKET)")
    if args.server and not args.workdir:
        raise ConfigError("--server needs --workdir: the directory with the starting policy that the server serves")
    return steps


def _demo() -> type[Demo]:
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # TRL only generates over HTTP here
    try:
        from hubsync.demo.run import Demo
    except ImportError as error:
        raise ConfigError(
            f"the demo needs TRL and vLLM ({error}). Install hubsync with them, from a clone: pip install '.[trl,vllm]'"
        ) from None
    return Demo
