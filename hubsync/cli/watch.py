"""`hubsync watch`: a run and its servers, live in a terminal."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from . import options

if TYPE_CHECKING:
    from hubsync.replicas.status_objects import Reported

    from .watching import Watch

_DRAW_S = 0.5

HELP = "show a run and its servers, live"
DESCRIPTION = """\
Show the newest and the served version of a run, and of each server its state, version, lag behind the served version,
verification, last phases and error, until interrupted. Servers that it cannot reach are shown if their followers run
with --report-status. It changes nothing, except that a fresh server is asked for its status and then looks for its
position in the run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    parser.add_argument(
        "--server", action="append", default=[], metavar="URL", help="a server; give it once for each of them"
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="longest time between two reads of the run; servers are asked every second (default: %(default)g)",
    )
    parser.add_argument("--once", action="store_true", help="look once, print, and exit")
    options.add_json(parser, "with --once: print one JSON object")
    options.add_api_key(parser)
    options.add_read_access(parser)


def run(args: argparse.Namespace) -> int:
    import tempfile

    from hubsync.bucket import open_bucket
    from hubsync.chain import ChainReader
    from hubsync.errors import ConfigError
    from hubsync.replicas.engines import connect, schemes
    from hubsync.replicas.replica import Replica
    from hubsync.replicas.server import checked_seconds, checked_urls

    from .access import public_key
    from .watching import ANSWER_S, Watch

    if args.json and not args.once:
        raise ConfigError("--json prints one look: give --once too (`hubsync follow --json` prints every commit)")
    urls = checked_urls(args.server, schemes()) if args.server else []
    replicas = [Replica(connect(url, args.api_key, timeout=ANSWER_S)) for url in urls]
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:

        def reader() -> ChainReader:
            return ChainReader(open_bucket(args.address, token=args.token, key=public_key(args)), cache)

        watch = Watch(reader, replicas, interval=checked_seconds("--interval", args.interval), reported=_reported(args))
        try:
            return _once(watch, args) if args.once else _live(watch, args.address)
        finally:
            for replica in replicas:
                replica.server.close()


def _reported(args: argparse.Namespace) -> Callable[[], list[Reported]]:
    """Reads what followers say of their servers. Those objects are not signed, also in a signed run."""
    from hubsync.bucket import Bucket, open_bucket
    from hubsync.replicas.status_objects import read_reported

    opened: list[Bucket] = []

    def read() -> list[Reported]:
        if not opened:
            opened.append(open_bucket(args.address, token=args.token))
        return read_reported(opened[0])

    return read


def _once(watch: Watch, args: argparse.Namespace) -> int:
    from rich.console import Console

    from .watching import drawn

    watch.look()
    run = watch.run
    if args.json:
        positions = {
            name: None if position is None else {"version": position.version, "digest": position.digest}
            for name, position in (("newest", run.newest), ("served", run.served))
        }
        error = None if run.error is None else {"type": type(run.error).__name__, "message": str(run.error)}
        servers = [seen.to_json(run.served) for seen in watch.servers]
        now = time.time()
        reported = [
            {**asdict(seen), "age_s": None if seen.written is None else now - seen.written} for seen in watch.reported
        ]
        print(json.dumps({**positions, "error": error, "servers": servers, "reported": reported}))
    else:
        Console(highlight=False).print(drawn(args.address, run, watch.servers, watch.reported))
    healthy = run.error is None and all(seen.error is None for seen in watch.servers)
    return 0 if healthy else 1


def _live(watch: Watch, address: str) -> int:
    from rich.live import Live

    from .watching import drawn

    pause = threading.Event()
    try:
        with watch.looking(), Live(drawn(address, watch.run, []), auto_refresh=False) as live:
            while not pause.wait(_DRAW_S):
                live.update(drawn(address, watch.run, watch.servers, watch.reported), refresh=True)
    except KeyboardInterrupt:
        pass
    return 0
