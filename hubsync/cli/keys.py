"""`hubsync keygen`: a key that signs a run. And the options of commands that read and write signed runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hubsync.keys import PUBLIC_KEY_VARIABLE, SIGNING_KEY_VARIABLE, PublicKey, SigningKey


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("keygen", help="make a key that signs what a trainer publishes")
    parser.add_argument("file", type=Path, help="new file for the secret key; only its owner can read it")
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
    return PublicKey.load(args.public_key) if args.public_key else None


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
    return SigningKey.load(args.signing_key) if args.signing_key else None
