"""`hubsync keygen`: make a key that signs a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from hubsync.format.keys import PUBLIC_KEY_VARIABLE, SIGNING_KEY_VARIABLE, SigningKey

HELP = "make a key that signs what a trainer publishes"
DESCRIPTION = """\
Make a key for one run. The trainer signs with the secret key in FILE. Clients with the public key, which is printed,
reject documents that are not signed with it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="new file for the secret key, readable by its owner only"
    )


def run(args: argparse.Namespace) -> int:
    key = SigningKey.generate()
    key.save(args.file)
    public = key.public.hex
    print(f"secret key  {args.file}\n  trainer:  SyncConfig(signing_key={str(args.file)!r}), or {SIGNING_KEY_VARIABLE}")
    print(f"public key  {public}\n  replicas: {PUBLIC_KEY_VARIABLE}={public}")
    return 0
