"""`hubsync serve`: set the version that replicas serve."""

from __future__ import annotations

import argparse

from . import options

NEWEST = "newest"

HELP = "set which version of a run replicas serve"
DESCRIPTION = """\
Make all replicas of a run serve an older version (a rollback), or the newest one again. Nothing is deleted. A running
trainer goes on, and the next version that it publishes is served, unless it is published with serve=False.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    parser.add_argument(
        "version", type=_version, metavar="VERSION", help=f"a number that `hubsync ls` lists, or {NEWEST}"
    )
    parser.add_argument(
        "--fence", action="store_true", help="also stop the trainer: its next publish fails with an error"
    )
    options.add_write_access(parser)


def run(args: argparse.Namespace) -> int:
    from hubsync.chain import ChainWriter
    from hubsync.chain.serving import serve

    from .access import writing

    with writing(args) as (bucket, reader):
        if args.version is not None and args.version > 0:
            reader.manifest(args.version)  # a version that does not exist must not fence the trainer
        if args.fence:
            ChainWriter.resume(bucket, reader.run().table, signs=args.signing_key is not None)
        position = serve(bucket, reader, args.version)
    print(f"replicas are to serve {position}")
    return 0


def _version(text: str) -> int | None:
    """Parse a version; None is the newest."""
    if text == NEWEST:
        return None
    try:
        return options.version(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected {NEWEST}, or a version from 0 to {options.MAX_VERSION}, not {text}"
        ) from None
