"""`hubsync keygen`: a key that signs a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hubsync.keys import PUBLIC_KEY_VARIABLE, SIGNING_KEY_VARIABLE, SigningKey


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
