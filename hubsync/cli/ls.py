"""`hubsync ls`: list the versions of a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from . import options

if TYPE_CHECKING:
    from hubsync.format.manifest import Manifest, Run

HELP = "list the versions of a run"
DESCRIPTION = """\
List the versions of a run, one manifest a line: deltas, anchors (whole models), and after each version the merged
deltas that end there.
"""
_HEADINGS = ("version", "kind", "parent", "changed", "of all", "size", "bits/change", "step", "created", "name")
_LEFT = {"kind", "created", "name"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    parser.add_argument("--limit", type=options.at_least(1), metavar="N", help="only the newest N versions")
    options.add_read_access(parser)


def run(args: argparse.Namespace) -> int:
    from .access import reading, with_merged

    with reading(args) as reader:
        run, manifests = reader.run(), with_merged(reader)
    if args.limit is not None:
        newest = set(sorted({manifest.version for manifest in manifests})[-args.limit :])
        manifests = [manifest for manifest in manifests if manifest.version in newest]
    print(_summary(run))
    for line in _aligned([_HEADINGS, *(_row(manifest, run.table.numel) for manifest in manifests)]):
        print(line)
    return 0


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines of columns. Not with rich: it takes half a minute for 10,000 versions."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if heading in _LEFT else cell.rjust(width)
            for heading, width, cell in zip(_HEADINGS, widths, row, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _summary(run: Run) -> str:
    base = "an anchor in the bucket" if run.base.model is None else run.base.model
    if run.base.revision is not None:
        base += f"@{run.base.revision[:12]}"
    return f"run {run.run_id}: {len(run.table)} tensors, {_size(run.table.nbytes)} dense, version 0 is {base}"


def _row(manifest: Manifest, numel: int) -> list[str]:
    is_delta = manifest.kind != "anchor"
    return [
        str(manifest.version),
        manifest.kind,
        str(manifest.parent.version) if manifest.parent else "-",
        f"{manifest.changed:,}" if is_delta else "-",
        f"{100 * manifest.changed / max(1, numel):.3f}%" if is_delta else "-",
        _size(manifest.nbytes),
        f"{8 * manifest.nbytes / manifest.changed:.2f}" if manifest.changed else "-",
        "-" if manifest.step is None else str(manifest.step),
        datetime.fromtimestamp(manifest.created).strftime("%Y-%m-%d %H:%M:%S"),
        manifest.name or "",
    ]


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
