"""`hubsync repair`: find manifests that nobody can read, and take them out of the way."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection
from typing import Any

from hubsync.bucket import Bucket, open_bucket
from hubsync.chain import ChainReader, Layout
from hubsync.chain.index import ChainIndex, read_head
from hubsync.errors import FormatError, UnknownFormat
from hubsync.format.manifest import Head, Run

from .keys import add_signing_key, require_signing_key, signing_key

DESCRIPTION = """\
Read every manifest of a run, and name those that are damaged, not signed with its key, or of another run. One of these
stops whoever has to read it. With --delete it is as if they had never been committed (the newest one is restored from
its copy in the head, if that is in order): the next publisher goes on from the newest version that is left, and who
needs a version that is missing goes on from an anchor (`engine.anchor()`).
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "repair", help="find and delete manifests that are unreadable", description=DESCRIPTION
    )
    parser.add_argument("address", metavar="ADDRESS", help="hf://buckets/NAMESPACE/NAME/RUN, or a directory")
    parser.add_argument("--delete", action="store_true", help="delete them; else they are only named")
    parser.add_argument("--token", help="Hugging Face token (default: HF_TOKEN, or that of `hf auth login`)")
    add_signing_key(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if all manifests are readable now."""
    bucket = open_bucket(args.address, token=args.token, key=signing_key(args))
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
        run = ChainReader(bucket, cache).run()
    require_signing_key(args, run)
    unreadable = _unreadable(bucket, run)
    for error in unreadable.values():
        print(f"unreadable {error}")
    if not unreadable:
        print("all manifests are readable")
        return 0
    if not args.delete:
        print(f"{len(unreadable)} unreadable: delete them with --delete")
        return 1
    if (restored := _restored(bucket, run, unreadable)) is not None:
        print(f"restored {restored} from the copy in the head")
        del unreadable[restored]
    bucket.delete(list(unreadable))
    print(f"{len(unreadable)} deleted")
    return 0


def _restored(bucket: Bucket, run: Run, unreadable: Collection[str]) -> str | None:
    """Write the newest manifest anew, of which the head holds a copy; its name, if it was unreadable."""
    data = read_head(bucket)
    try:
        copy = None if data is None else Head.loads(data).manifest
    except FormatError:
        return None
    if copy is None or copy.run_id != run.run_id or Layout.manifest(copy) not in unreadable:
        return None
    bucket.commit(Layout.manifest(copy), copy.dumps())
    return Layout.manifest(copy)


def _unreadable(bucket: Bucket, run: Run) -> dict[str, FormatError]:
    """Looked at twice: what a damaged download made unreadable stays. So does what a newer hubsync has written."""
    found = [_look(bucket, run) for _ in range(2)]
    newer = next((error for error in found[1].values() if isinstance(error, UnknownFormat)), None)
    if newer is not None:
        raise newer
    return {path: error for path, error in found[1].items() if path in found[0]}


def _look(bucket: Bucket, run: Run) -> dict[str, FormatError]:
    index = ChainIndex(bucket, run)
    index.survey()
    return index.unreadable()
