"""`hubsync repair`: find unreadable manifests, and delete them."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import TYPE_CHECKING

from hubsync.errors import FormatError, UnknownFormat
from hubsync.format.manifest import Head

from . import options

if TYPE_CHECKING:
    from hubsync.bucket import Bucket
    from hubsync.format.manifest import Run

HELP = "find unreadable manifests, and delete them"
DESCRIPTION = """\
Read every manifest of a run, and list those that are damaged, not signed with the run's key, or of another run. One of
them stops every reader that needs it. --delete removes them, as if they had never been committed; the newest manifest
is restored from the copy in the head, if that copy is readable. The next publisher continues from the newest version
that is left. Replicas that need a missing version continue from an anchor (`engine.anchor()` uploads one).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    parser.add_argument("--delete", action="store_true", help="delete them (default: only list them)")
    options.add_write_access(parser)


def run(args: argparse.Namespace) -> int:
    from .access import writing

    with writing(args) as (bucket, reader):
        run = reader.run()
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
    """Write the head's copy of the newest manifest if that one is unreadable; returns its path."""
    from hubsync.chain import Layout
    from hubsync.chain.head import read_head

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
    """Manifests that are unreadable in two reads, so that a damaged download deletes nothing.

    Raises:
        UnknownFormat: a newer hubsync wrote one of them.
    """
    first, second = _read_all(bucket, run), _read_all(bucket, run)
    newer = next((error for error in second.values() if isinstance(error, UnknownFormat)), None)
    if newer is not None:
        raise newer
    return {path: error for path, error in second.items() if path in first}


def _read_all(bucket: Bucket, run: Run) -> dict[str, FormatError]:
    from hubsync.chain.index import ChainIndex

    index = ChainIndex(bucket, run)
    index.survey()
    return index.unreadable()
