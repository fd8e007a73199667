"""`hubsync hub`: a Hugging Face Hub with real buckets on this machine, for development and tests."""

from __future__ import annotations

import argparse
import signal
import threading
from typing import Any

from hubsync.errors import ConfigError
from hubsync.localhub import LocalHub

_DEFAULT_PORT = 8418
DESCRIPTION = """\
Serve a Hugging Face Hub with real buckets from a directory. For development and tests only: it listens on
127.0.0.1, and keeps everything that is uploaded. Set the two variables it prints wherever huggingface_hub,
hubsync or vLLM run.
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("hub", help="run a local Hub with buckets, for development", description=DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Register the arguments that `run` reads."""
    parser.add_argument(
        "--root", required=True, metavar="DIR", help="directory that holds everything; continued if it exists"
    )
    parser.add_argument(
        "--port", type=int, default=_DEFAULT_PORT, help="port on 127.0.0.1, 0 for a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--token", action="append", metavar="TOKEN", help="accept only this token (repeatable; default: any)"
    )
    parser.add_argument(
        "--read-only-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="accept this token for reading (repeatable)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted or terminated."""
    if not args.root.strip():
        raise ConfigError("--root must name a directory, such as ./hub")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with LocalHub(args.root, args.port, args.token, args.read_only_token) as hub:
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={(args.token or ['hf_local'])[0]}", flush=True)
        stopped.wait()
    return 0
