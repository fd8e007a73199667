"""`hubsync hub`: run a local Hugging Face Hub with buckets, for development and tests."""

from __future__ import annotations

import argparse
import signal
import threading

from hubsync.errors import ConfigError

_DEFAULT_PORT = 8418

HELP = "run a local Hub with buckets, for development"
DESCRIPTION = """\
Serve a Hugging Face Hub with real buckets from a directory, for development and tests. It listens on 127.0.0.1 only and
keeps everything that is uploaded. Set the two environment variables that it prints for every process that uses
huggingface_hub, hubsync or vLLM.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", required=True, metavar="DIR", help="directory that holds everything; an existing Hub is continued"
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
    """Serve until SIGINT or SIGTERM."""
    from hubsync.localhub import LocalHub

    if not args.root.strip():
        raise ConfigError("--root must name a directory, such as ./hub")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with LocalHub(args.root, args.port, args.token, args.read_only_token) as hub:
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={(args.token or ['hf_local'])[0]}", flush=True)
        stopped.wait()
    return 0
