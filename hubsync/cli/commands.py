"""The table of commands: built-in ones, and those that installed packages add.

A command is a module with the four names of `Command`. An installed package adds one through an entry point, whose name
is the command's name:

    [project.entry-points."hubsync.commands"]
    greet = "my_package.greet"

Command modules import heavy packages (torch, rich, anything that imports them) inside `run`, because `hubsync --help`
imports every module of this table.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol, cast

GROUP = "hubsync.commands"

# In the order of `hubsync --help`.
BUILT_IN = {
    "demo": "hubsync.cli.demo",
    "doctor": "hubsync.cli.doctor",
    "follow": "hubsync.cli.follow",
    "status": "hubsync.cli.status",
    "watch": "hubsync.cli.watch",
    "report": "hubsync.cli.report",
    "ls": "hubsync.cli.ls",
    "show": "hubsync.cli.show",
    "verify": "hubsync.cli.verify",
    "pull": "hubsync.cli.pull",
    "serve": "hubsync.cli.serve",
    "compact": "hubsync.cli.compact",
    "gc": "hubsync.cli.gc",
    "repair": "hubsync.cli.repair",
    "keygen": "hubsync.cli.keygen",
    "hub": "hubsync.cli.hub",
    "size": "hubsync.cli.size",
}


class Command(Protocol):
    """Contract of a command module."""

    HELP: str
    """One line for `hubsync --help`: lower case, no full stop."""

    DESCRIPTION: str
    """A few sentences for `hubsync NAME --help`."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments; `hubsync.cli.options` has those that commands share."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command and return its exit code. HubsyncError and OSError become one line on stderr and code 1."""


def built_in() -> dict[str, Command]:
    """The commands of this package."""
    return {name: cast(Command, import_module(module)) for name, module in BUILT_IN.items()}


def installed() -> dict[str, Command]:
    """Commands of other installed packages. One that cannot be imported is left out, with a warning on stderr."""
    found: dict[str, Command] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in BUILT_IN:
            _warn(f"ignoring the command {entry.name!r} of {entry.value}: hubsync has a command of that name")
            continue
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # whatever a foreign module raises
            _warn(f"the command {entry.name!r} cannot be loaded from {entry.value}: {error}")
    return found


def _warn(message: str) -> None:
    print(f"hubsync: {message}", file=sys.stderr)
