"""The `hubsync` command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from hubsync import __version__, progress
from hubsync.errors import HubsyncError

from . import commands

DESCRIPTION = """\
Delta weight sync for RL training: a trainer publishes weight deltas to a Hugging Face bucket, and running vLLM servers
apply them in place, bit for bit.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code: 0 success, 1 an explained failure, 130 interrupted.

    argparse ends the process with code 2 on wrong usage.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    table = commands.built_in()
    if not words or words[0] not in table:  # so that another package cannot break or slow down a built-in command
        table |= commands.installed()
    parser = make_parser(table)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(words)
    if getattr(args, "json", False):
        progress.off()
    try:
        return args.run(args) or 0
    except HubsyncError as error:
        print(f"hubsync: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `hubsync ls ADDRESS | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
        return 1
    except OSError as error:  # of a path that the user gave: a full disk, no permission, a file for a directory
        print(f"hubsync: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def make_parser(table: Mapping[str, commands.Command]) -> argparse.ArgumentParser:
    """The parser of the whole command line; it sets `run` to the chosen command's."""
    parser = argparse.ArgumentParser(
        prog="hubsync",
        description=DESCRIPTION,
        epilog="`hubsync COMMAND --help` shows a command's options.",
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"hubsync {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in table.items():
        subparser = subparsers.add_parser(
            name, help=command.HELP, description=command.DESCRIPTION, formatter_class=_Formatter
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


class _Formatter(argparse.HelpFormatter):
    """Keeps each option on the line of its help, and lists the commands without a line for COMMAND above them."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if action.nargs == argparse.PARSER else text


if __name__ == "__main__":
    sys.exit(main())
