"""`hubsync serve`: which version replicas are to serve, said from outside of the trainer."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, ChainWriter
from hubsync.chain.serving import serve
from hubsync.format.manifest import MAX_VERSION

from .keys import add_signing_key, require_signing_key, signing_key

NEWEST = "newest"

DESCRIPTION = """\
Have everybody who follows a run serve an older version of it (a rollback), or the newest one again. Nothing is deleted,
and a trainer goes on where it is; the next version that it publishes is served again, unless it only saves it.
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("serve", help="set which version of a run is to be served", description=DESCRIPTION)
    parser.add_argument("address", metavar="ADDRESS", help="hf://buckets/NAMESPACE/NAME/RUN, or a directory")
    parser.add_argument(
        "version", type=_version, metavar="VERSION", help=f"a number that `hubsync ls` lists, or {NEWEST}"
    )
    parser.add_argument(
        "--fence",
        action="store_true",
        help="also stop the trainer from publishing: it ends with an error at its next version",
    )
    parser.add_argument("--token", help="Hugging Face token (default: HF_TOKEN, or that of `hf auth login`)")
    add_signing_key(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Give the word, and say what it means."""
    key = signing_key(args)
    bucket = open_bucket(args.address, token=args.token, key=key)
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
        reader = ChainReader(bucket, cache)
        require_signing_key(args, reader.run())
        if args.version is not None and args.version > 0:
            reader.manifest(args.version)  # what does not exist fences nobody
        if args.fence:
            ChainWriter.resume(bucket, reader.run().table, signs=key is not None)
        position = serve(bucket, reader, args.version)
    print(f"{position} is to be served")
    return 0


def _version(text: str) -> int | None:
    """None for the newest."""
    if text == NEWEST:
        return None
    version = int(text) if text.isdecimal() else -1
    if not 0 <= version <= MAX_VERSION:
        raise argparse.ArgumentTypeError(f"a version is a number from 0 to {MAX_VERSION}, or {NEWEST}, not {text}")
    return version
