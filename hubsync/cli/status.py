"""`hubsync status`: what one server serves."""

from __future__ import annotations

import argparse
import json

from . import options

HELP = "print what a server serves, and its state"
DESCRIPTION = """\
Print the state of one server: its version, what it has staged, when its weights were verified, the seconds of its last
phases, and its error. The first question of a fresh server also makes it look for its position in the run. Exit code 0:
it serves a version of the run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", required=True, metavar="URL", help="the server, such as http://127.0.0.1:8000")
    options.add_api_key(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from hubsync.replicas.engines import connect
    from hubsync.replicas.replica import Replica

    from .watching import ANSWER_S, look_at

    server = connect(args.server, args.api_key, timeout=ANSWER_S)
    try:
        seen = look_at(Replica(server))
    finally:
        server.close()
    if seen.status is None and seen.error is not None and not args.json:
        raise seen.error
    document = seen.to_json()
    if args.json:
        print(json.dumps(document))
    else:
        for name, value in document.items():
            if name != "lag":
                print(f"{name:14} {_shown(value)}")
    return 0 if seen.version is not None else 1


def _shown(value: object) -> str:
    if isinstance(value, dict) and "message" in value:
        return f"{value['type']}: {value['message']}"
    if isinstance(value, dict):
        return ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in value.items()) or "-"
    return "-" if value is None else str(value)
