"""`hubsync gc`: delete what a run does not need any more."""

from __future__ import annotations

import argparse
import re
import tempfile
from typing import Any

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.chain.retention import Collector, Garbage, Policy

from .keys import add_signing_key, require_signing_key, signing_key

DESCRIPTION = """\
Delete versions that are not kept, and what writers that died have left. Kept are the newest version, the one to
serve, and those asked for here, each with a way to it. What is not needed is noted first, and deleted by a run that
still finds it so after the grace period, by the clock of the storage.
"""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("gc", help="delete what a run does not need any more", description=DESCRIPTION)
    parser.add_argument("address", metavar="ADDRESS", help="hf://buckets/NAMESPACE/NAME/RUN, or a directory")
    parser.add_argument("--token", help="Hugging Face token (default: HF_TOKEN, or that of `hf auth login`)")
    parser.add_argument("--keep-last", type=_count, required=True, metavar="N", help="keep the newest N versions")
    parser.add_argument(
        "--keep-every", type=_count, default=0, metavar="M", help="keep versions whose number is a multiple of M"
    )
    parser.add_argument(
        "--ttl", type=_seconds, metavar="TIME", help="versions expire after this time, such as 90m, 12h or 7d"
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=3600.0,
        metavar="TIME",
        help="how long something must have been unneeded before it is deleted (default: 1h)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    add_signing_key(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Collect once and say what was deleted, what has to wait, and why."""
    bucket = open_bucket(args.address, token=args.token, key=signing_key(args))
    policy = Policy(args.keep_last, args.keep_every, args.ttl, args.grace)
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
        reader = ChainReader(bucket, cache)
        require_signing_key(args, reader.run())
        collector = Collector(bucket, reader, policy)
        garbage = collector.look() if args.dry_run else collector.collect()
    done = "would delete" if args.dry_run else "deleted"
    for found in garbage:
        word = done if found.wait == 0 else "unneeded"
        print(f"{word} {found.what} ({found.nbytes:,} bytes): {found.why}{_wait(found)}")
    ripe = [found for found in garbage if found.wait == 0]
    print(f"{done} {sum(found.nbytes for found in ripe):,} bytes; {len(garbage) - len(ripe)} more wait for their grace")
    return 0


def _wait(found: Garbage) -> str:
    return f"; may be deleted in {found.wait / 60:.0f} min" if found.wait else ""


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of versions, not {text}")
    return int(text)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m, 12h or 7d, not {text}")
    return float(match[1]) * _UNITS[match[2] or "s"]
