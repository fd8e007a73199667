"""Options that several commands share: address, access, keys, base model, versions."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from hubsync.format.keys import PUBLIC_KEY_VARIABLE, SIGNING_KEY_VARIABLE
from hubsync.format.manifest import MAX_VERSION

ADDRESS = "hf://buckets/NAMESPACE/NAME/RUN, or a directory"


def add_address(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The positional ADDRESS."""
    parser.add_argument("address", metavar="ADDRESS", nargs="?" if optional else None, help=f"the run: {ADDRESS}")


def add_read_access(parser: argparse.ArgumentParser) -> None:
    """`--token` and `--public-key`, of commands that only read."""
    _add_token(parser)
    parser.add_argument(
        "--public-key",
        metavar="KEY",
        default=os.environ.get(PUBLIC_KEY_VARIABLE),
        help=f"reject what this key has not signed: 64 hex digits, or a file (default: {PUBLIC_KEY_VARIABLE})",
    )


def add_write_access(parser: argparse.ArgumentParser) -> None:
    """`--token` and `--signing-key`, of commands that change a run."""
    _add_token(parser)
    parser.add_argument(
        "--signing-key",
        metavar="FILE",
        default=os.environ.get(SIGNING_KEY_VARIABLE),
        help=f"secret key of a signed run, made by `hubsync keygen` (default: {SIGNING_KEY_VARIABLE})",
    )


def _add_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token", help="Hugging Face token (default: HF_TOKEN, or that of `hf auth login`)")


def add_base(parser: argparse.ArgumentParser, purpose: str) -> None:
    """`--base`: where the run's base model lies. `purpose` says when it is needed."""
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help=f"local copy of the run's base model (version 0); {purpose}"
    )


def add_api_key(parser: argparse.ArgumentParser) -> None:
    """`--api-key` of servers."""
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("VLLM_API_KEY"),
        help="API key of the server, or token of the proxy in front of it (default: VLLM_API_KEY)",
    )


def add_json(parser: argparse.ArgumentParser, what: str = "print only one JSON object") -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help=what)


def add_max_head_age(parser: argparse.ArgumentParser) -> None:
    """`--max-head-age`: reject a run that has not been written to for that long."""
    parser.add_argument(
        "--max-head-age",
        type=float,
        metavar="SECONDS",
        help="reject a run whose head was written longer ago than that (default: no limit)",
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """Parser of a number of versions that is not below `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a number of versions, at least {minimum}, not {text}")
        return int(text)

    return parse


def version(text: str) -> int:
    """Parse the number of a version."""
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number <= MAX_VERSION:
        raise argparse.ArgumentTypeError(f"expected a version from 0 to {MAX_VERSION}, not {text}")
    return number
