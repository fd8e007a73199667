"""`hubsync keygen`: a key that signs a run. And the options of commands that read and write signed runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hubsync.errors import ConfigError
from hubsync.format.keys import PUBLIC_KEY_VARIABLE, SIGNING_KEY_VARIABLE, PublicKey, SigningKey
from hubsync.format.manifest import Run

DESCRIPTION = """\
Make a key for one run. The trainer signs with the file; whoever is given the public key, which is printed, refuses
what was not signed with it.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "keygen", help="make a key that signs what a trainer publishes", description=DESCRIPTION
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="new file for the secret key; only its owner can read it"
    )
    parser.set_defaults(run=make_key)


def make_key(args: argparse.Namespace) -> int:
    key = SigningKey.generate()
    key.save(args.file)
    public = key.public.hex
    print(f"secret key  {args.file}\n  trainer:  SyncConfig(signing_key={str(args.file)!r}), or {SIGNING_KEY_VARIABLE}")
    print(f"public key  {public}\n  replicas: {PUBLIC_KEY_VARIABLE}={public}")
    return 0


def add_public_key(parser: argparse.ArgumentParser) -> None:
    """The option `--public-key`."""
    parser.add_argument(
        "--public-key",
        metavar="KEY",
        default=os.environ.get(PUBLIC_KEY_VARIABLE),
        help=f"refuse what this key has not signed: 64 hex digits, or a file (default: {PUBLIC_KEY_VARIABLE})",
    )


def public_key(args: argparse.Namespace) -> PublicKey | None:
    """What `--public-key` says."""
    return None if args.public_key is None else PublicKey.load(args.public_key)


def add_signing_key(parser: argparse.ArgumentParser) -> None:
    """The option `--signing-key`."""
    parser.add_argument(
        "--signing-key",
        metavar="FILE",
        default=os.environ.get(SIGNING_KEY_VARIABLE),
        help=f"key that the run is signed with, made by `hubsync keygen` (default: {SIGNING_KEY_VARIABLE})",
    )


def signing_key(args: argparse.Namespace) -> SigningKey | None:
    """What `--signing-key` says."""
    return None if args.signing_key is None else SigningKey.load(args.signing_key)


def require_signing_key(args: argparse.Namespace, run: Run) -> None:
    """ConfigError if the run is signed and there is no key: what is written without one would be refused."""
    if run.public_key is not None and args.signing_key is None:
        raise ConfigError("this run is signed: name the file of its key with --signing-key")
