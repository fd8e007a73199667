"""`hubsync compact`: merged deltas for a run, once or as it grows."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, Compactor
from hubsync.chain.compaction import MAX_SPAN
from hubsync.errors import BucketUnavailable, ConfigError
from hubsync.format.checkpoint import Checkpoint
from hubsync.replicas.server import checked_seconds

from .keys import add_signing_key, require_signing_key, signing_key

DESCRIPTION = """\
Merge deltas over 2, 4, 8 and more versions, so that a server that is far behind downloads few of them. It may run
anywhere, beside the trainer, and be stopped at any time.
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("compact", help="merge the deltas of a run", description=DESCRIPTION)
    parser.add_argument("address", metavar="ADDRESS", help="hf://buckets/NAMESPACE/NAME/RUN, or a directory")
    parser.add_argument("--token", help="Hugging Face token (default: HF_TOKEN, or that of `hf auth login`)")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="local copy of the run's base model (version 0); needed to merge compact deltas",
    )
    parser.add_argument(
        "--max-span",
        type=int,
        default=MAX_SPAN,
        metavar="N",
        help="the most versions that one merged delta spans; its changes are held in memory (default: %(default)s)",
    )
    parser.add_argument("--watch", action="store_true", help="go on with each new version, until interrupted")
    parser.add_argument(
        "--interval",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="with --watch: how often to look (default: %(default)g)",
    )
    add_signing_key(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge what is due; with `--watch`, again whenever there is a new version."""
    checked_seconds("--interval", args.interval)
    if args.max_span < 2:
        raise ConfigError(f"--max-span must be at least 2 versions, not {args.max_span}")
    bucket = open_bucket(args.address, token=args.token, key=signing_key(args))
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
        reader = ChainReader(bucket, cache)
        require_signing_key(args, reader.run())
        base = None
        if args.base is not None:
            base = Checkpoint(args.base, reader.run().table)
            base.check()
        compactor = Compactor(bucket, reader, base, args.max_span)
        _compact(compactor)
        done = reader.newest()
        while args.watch:
            time.sleep(args.interval)
            try:
                if reader.newest() != done:
                    _compact(compactor)
                    done = reader.newest()
            except BucketUnavailable as error:
                print(f"trying again: {error}", file=sys.stderr)
    return 0


def _compact(compactor: Compactor) -> None:
    made = 0
    for merged in compactor.run():
        made += 1
        assert merged.parent is not None  # the parser guarantees it
        print(f"merged versions {merged.parent.version}..{merged.version}: {merged.nbytes:,} bytes", flush=True)
    if compactor.skipped:
        print(f"left out {compactor.skipped} spans of compact deltas: give a copy of the base model with --base DIR")
    print(f"{made} merged deltas made" if made else "nothing to merge", flush=True)
