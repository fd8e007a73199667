"""`hubsync show`: print the manifest of one version."""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import options

HELP = "print the manifest of a version"
DESCRIPTION = "Print the manifest of a version as JSON; of version 0, where the run starts, its digest and base model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    parser.add_argument("version", type=options.version, metavar="VERSION", help="a number that `hubsync ls` lists")
    options.add_json(parser, "print the JSON object on one line")
    options.add_read_access(parser)


def run(args: argparse.Namespace) -> int:
    from .access import reading

    with reading(args) as reader:
        if args.version == 0 and not any(manifest.version == 0 for manifest in reader.manifests()):
            run = reader.run()
            document: dict[str, Any] = {"position": {"version": 0, "digest": run.digest}, "base": vars(run.base)}
        else:
            document = reader.manifest(args.version).to_json()
    print(json.dumps(document, indent=None if args.json else 1))
    return 0
