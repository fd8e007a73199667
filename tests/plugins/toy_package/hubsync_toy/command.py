"""`hubsync newest ADDRESS`."""

from __future__ import annotations

import argparse

from hubsync.cli import options

HELP = "print the newest version of a run"
DESCRIPTION = "Print the number of the newest version of a run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    options.add_read_access(parser)


def run(args: argparse.Namespace) -> int:
    from hubsync.cli.access import reading

    with reading(args) as reader:
        print(reader.newest().version)
    return 0
