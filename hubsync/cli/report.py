"""`hubsync report`: a run as one self-contained HTML page."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from hubsync.errors import ConfigError

from . import options

HELP = "draw a run as one HTML page"
DESCRIPTION = """\
Write one HTML page, which needs no network and no server, with figures of a run: changed share and payload of each
version, where weights change, a timeline of phases, versions and lag of replicas, and what is stored. With the
trainer's log also staleness and reward. It changes nothing. Of parts it reads what lies before their payload, 64 MB at
most, and some parts whole, 32 MB at most. Needs the package plotly: pip install 'hubsync-rl[report]'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page to write")
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="the trainer's log: trainer_state.json, or rows of log_history as JSON lines",
    )
    parser.add_argument(
        "--events",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="output of `hubsync follow --json`; give it once for each follower",
    )
    parser.add_argument(
        "--server", action="append", default=[], metavar="URL", help="a server to ask for its status; once for each"
    )
    options.add_api_key(parser)
    options.add_read_access(parser)


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("plotly") is None:
        raise ConfigError(
            "the report needs the package plotly: pip install 'hubsync-rl[report]', or pip install plotly"
        )
    import tempfile
    from contextlib import ExitStack

    from hubsync.bucket import open_bucket
    from hubsync.chain import ChainReader
    from hubsync.replicas.engines import connect, schemes
    from hubsync.replicas.replica import Replica
    from hubsync.replicas.server import checked_urls
    from hubsync.report.gather import gather
    from hubsync.report.page import page
    from hubsync.report.records import read_events, read_log

    from .access import public_key
    from .watching import ANSWER_S

    log = None if args.log is None else read_log(args.log)
    events = [event for path in args.events for event in read_events(path)]
    with ExitStack() as stack:
        bucket = open_bucket(args.address, token=args.token, key=public_key(args))
        reader = ChainReader(bucket, stack.enter_context(tempfile.TemporaryDirectory(prefix="hubsync-")))
        plain = bucket if args.public_key is None else open_bucket(args.address, token=args.token)
        replicas = []
        for url in checked_urls(args.server, schemes()) if args.server else []:
            server = connect(url, args.api_key, timeout=ANSWER_S)
            stack.callback(server.close)
            replicas.append(Replica(server))
        gathered = gather(bucket, reader, plain=plain, replicas=replicas, log=log, events=events)
    text = page(gathered)
    try:
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {args.output}: {error}") from None
    print(f"{args.output}: {len(text) / 1e6:.1f} MB, run {gathered.run.run_id}, newest {gathered.newest}")
    return 0
