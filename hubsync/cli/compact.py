"""`hubsync compact`: write merged deltas for a run, once or continuously."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

from hubsync.chain.spans import MAX_SPAN
from hubsync.errors import BucketUnavailable, ConfigError
from hubsync.progress import progress, say

from . import options

if TYPE_CHECKING:
    from hubsync.chain import Compactor

HELP = "merge the deltas of a run"
DESCRIPTION = """\
Merge deltas over 2, 4, 8 and more versions, so that a server that is far behind downloads few of them. Run it on any
machine, next to the trainer or elsewhere. It can be stopped at any time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    options.add_base(parser, "needed to merge compact deltas")
    parser.add_argument(
        "--max-span",
        type=int,
        default=MAX_SPAN,
        metavar="N",
        help="most versions that one merged delta spans; its changes are held in memory (default: %(default)s)",
    )
    parser.add_argument("--watch", action="store_true", help="continue with each new version until interrupted")
    parser.add_argument(
        "--interval",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="with --watch: longest time between two polls (default: %(default)g)",
    )
    options.add_json(parser, "print one JSON object per line")
    options.add_write_access(parser)


def run(args: argparse.Namespace) -> int:
    from hubsync.chain import Compactor
    from hubsync.replicas.server import checked_seconds

    from .access import base_checkpoint, writing

    checked_seconds("--interval", args.interval)
    if args.max_span < 2:
        raise ConfigError(f"--max-span must be at least 2 versions, not {args.max_span}")
    with writing(args) as (bucket, reader):
        base = None if args.base is None else base_checkpoint(args, reader)
        compactor = Compactor(bucket, reader, base, args.max_span)
        _compact(compactor, as_json=args.json)
        done = reader.newest()
        if not args.watch:
            return 0
        with reader.changes() as changes:
            while True:
                changes.wait(args.interval)
                try:
                    if reader.newest() != done:
                        _compact(compactor, as_json=args.json)
                        done = reader.newest()
                except BucketUnavailable as error:
                    print(f"{error}; next try in {args.interval:g} s", file=sys.stderr)
                    time.sleep(args.interval)


def _compact(compactor: Compactor, *, as_json: bool) -> None:
    made = 0
    with progress("merging", None, " merged deltas") as shown:
        for merged in compactor.run():
            made += 1
            shown.add()
            assert merged.parent is not None  # the parser guarantees it
            if as_json:
                event = {"event": "merged", "from": merged.parent.version, "to": merged.version, "bytes": merged.nbytes}
                print(json.dumps(event), flush=True)
                continue
            say(f"merged versions {merged.parent.version}..{merged.version}: {merged.nbytes:,} bytes")
    if as_json:
        print(json.dumps({"event": "done", "merged": made, "skipped": compactor.skipped}), flush=True)
        return
    if compactor.skipped:
        print(f"spans of compact deltas skipped: {compactor.skipped}; give a copy of the base model with --base DIR")
    print(f"merged deltas written: {made}" if made else "nothing to merge", flush=True)
