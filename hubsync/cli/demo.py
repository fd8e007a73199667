"""`hubsync demo`: the whole thing at once, on one machine, in minutes."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hubsync.demo.local import local_bucket
from hubsync.errors import ConfigError

if TYPE_CHECKING:
    from hubsync.demo.run import Demo

STEPS = 80
QUICK_STEPS = 20


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="train a tiny model with TRL while a real vLLM server follows it, and check that it does, bit for bit",
        description="Starts a local Hub and a real vLLM server, trains a tiny Qwen3 with TRL's GRPOTrainer, syncs the "
        "server after every optimizer step through a bucket, and in the end compares it with a fresh server.",
    )
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default {STEPS})")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_STEPS} steps: too few to see it learn")
    parser.add_argument(
        "--bucket",
        metavar="ADDRESS",
        help="hf://buckets/NAMESPACE/NAME/RUN, or a directory, to use in place of a local Hub",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="a running vLLM server of WORKDIR/base to use; the first call makes that model and prints how to serve it",
    )
    parser.add_argument(
        "--workdir", type=Path, help="where everything goes, and stays (default: a temporary directory)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # so that child processes are ended
    steps = (QUICK_STEPS if args.quick else STEPS) if args.steps is None else args.steps
    if steps < 1:
        raise ConfigError(f"--steps must be at least 1, not {steps}")
    if args.server and not args.bucket:
        raise ConfigError("--server needs --bucket: the address that the server was started with (HUBSYNC_BUCKET)")
    if args.server and not args.workdir:
        raise ConfigError(
            "--server needs --workdir: the directory that keeps the starting policy, which the server serves"
        )
    with ExitStack() as stack:
        workdir = args.workdir or Path(stack.enter_context(TemporaryDirectory(prefix="hubsync-demo-")))
        workdir.mkdir(parents=True, exist_ok=True)
        if args.json is not None:
            args.json.touch()  # what cannot be written is better known now than in the end
        bucket = args.bucket or stack.enter_context(local_bucket(workdir / "hub"))
        result = _demo()(workdir.absolute(), steps, bucket, args.server).run()
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["exact"] else 1


def _demo() -> type[Demo]:
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # it only generates over HTTP here
    try:
        from hubsync.demo.run import Demo
    except ImportError as error:
        raise ConfigError(
            f"the demo needs TRL and vLLM ({error}): install hubsync with them, from a clone: pip install '.[trl,vllm]'"
        ) from None
    return Demo
