"""Run a `hubsync` command in this process, with its errors as exceptions."""

from __future__ import annotations

from hubsync.cli import commands
from hubsync.cli.main import make_parser


def hubsync(*words: object) -> int:
    """Exit code of `hubsync WORDS`. Errors that `main` would print are raised."""
    args = make_parser(commands.built_in()).parse_args([str(word) for word in words])
    return args.run(args)
