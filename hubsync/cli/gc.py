"""`hubsync gc`: delete objects that a run no longer needs."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from hubsync.chain.retention import Garbage

HELP = "delete what a run no longer needs"
DESCRIPTION = """\
Delete versions that the policy does not keep, and leftovers of publishers that died. The newest version, the served
version and the versions selected here are kept, each with everything needed to rebuild it. The first call marks what is
unneeded. A later call deletes it, if it is still unneeded after the grace period, by the storage's clock.
"""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    parser.add_argument(
        "--keep-last", type=options.at_least(0), required=True, metavar="N", help="keep the newest N versions"
    )
    parser.add_argument(
        "--keep-every",
        type=options.at_least(0),
        default=0,
        metavar="M",
        help="keep versions whose number is a multiple of M",
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
    parser.add_argument("--dry-run", action="store_true", help="only print what would be deleted")
    options.add_json(parser)
    options.add_write_access(parser)


def run(args: argparse.Namespace) -> int:
    from hubsync.chain.retention import Collector, Policy

    from .access import writing

    policy = Policy(args.keep_last, args.keep_every, args.ttl, args.grace)
    with writing(args) as (bucket, reader):
        collector = Collector(bucket, reader, policy)
        garbage = collector.look() if args.dry_run else collector.collect()
    if args.json:
        print(json.dumps(_document(garbage, args.dry_run)))
        return 0
    done = "would delete" if args.dry_run else "deleted"
    for found in garbage:
        verb = done if found.wait == 0 else "unneeded"
        print(f"{verb} {found.what} ({found.nbytes:,} bytes): {found.why}{_wait(found)}")
    ripe = [found for found in garbage if found.wait == 0]
    waiting = len(garbage) - len(ripe)
    print(f"{done} {sum(found.nbytes for found in ripe):,} bytes; {waiting} more wait for their grace period")
    return 0


def _document(garbage: list[Garbage], dry_run: bool) -> dict[str, Any]:
    """What was found; what has waited for its grace period is deleted now, unless it is a dry run."""
    return {
        "dry_run": dry_run,
        "bytes": sum(found.nbytes for found in garbage if found.wait == 0),
        "waiting": sum(found.wait > 0 for found in garbage),
        "unneeded": [
            {"what": found.what, "bytes": found.nbytes, "why": found.why, "wait_s": found.wait} for found in garbage
        ],
    }


def _wait(found: Garbage) -> str:
    return f"; may be deleted in {found.wait / 60:.0f} min" if found.wait else ""


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m, 12h or 7d, not {text}")
    return float(match[1]) * _UNITS[match[2] or "s"]
