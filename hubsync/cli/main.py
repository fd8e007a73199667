"""The `hubsync` command. Each subcommand is a module with `add_parser(subparsers)`, which sets `run(args) -> int`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hubsync import __version__
from hubsync.errors import HubsyncError

from . import compact, demo, doctor, follow, gc, hub, inspect, keys, repair, serve

COMMANDS = (demo, doctor, follow, hub, inspect, serve, compact, gc, repair, keys)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns its exit code: 0 success, 1 a failure that was explained, 2 wrong usage."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except HubsyncError as error:
        print(f"hubsync: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `hubsync ls ADDRESS | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 1
    except OSError as error:  # of a path that the user gave: a full disk, no permission, a file for a directory
        print(f"hubsync: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hubsync",
        description="The weights of a running vLLM server follow a trainer, through a bucket, bit for bit.",
    )
    parser.add_argument("--version", action="version", version=f"hubsync {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
