"""`hubsync ls`: list the versions of a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from hubsync.format.manifest import Manifest, Position, Run

HELP = "list the versions of a run"
DESCRIPTION = """\
List the versions of a run, one manifest a line: deltas, anchors (whole models), and after each version the merged
deltas that end there. The first line has totals of the whole run, and the version that replicas are to serve.
"""
_HEADINGS = ("version", "kind", "parent", "changed", "of all", "size", "bits/change", "step", "created", "", "name")
_KINDS = {"delta": "deltas", "merged": "merged deltas", "anchor": "anchors"}
_LEFT = {"kind", "created", "", "name"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    parser.add_argument("--limit", type=options.at_least(1), metavar="N", help="only the newest N versions")
    options.add_json(parser)
    options.add_read_access(parser)


def run(args: argparse.Namespace) -> int:
    from .access import reading, with_merged

    with reading(args) as reader:
        run, served, manifests = reader.run(), reader.served(), with_merged(reader)
    totals = _totals(manifests)
    if args.limit is not None:
        newest = set(sorted({manifest.version for manifest in manifests})[-args.limit :])
        manifests = [manifest for manifest in manifests if manifest.version in newest]
    if args.json:
        print(json.dumps(_document(run, served, manifests, totals)))
        return 0
    print(f"{_summary(run)}; {_shown(totals)}; served: version {served.version}")
    for line in _aligned([_HEADINGS, *(_row(manifest, run.table.numel, served) for manifest in manifests)]):
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


def _totals(manifests: Sequence[Manifest]) -> dict[str, dict[str, int]]:
    """Number and bytes, by kind."""
    totals = {kind: {"count": 0, "bytes": 0} for kind in _KINDS}
    for manifest in manifests:
        totals[manifest.kind]["count"] += 1
        totals[manifest.kind]["bytes"] += manifest.nbytes
    return totals


def _shown(totals: dict[str, dict[str, int]]) -> str:
    parts = (f"{total['count']} {_KINDS[kind]} {_size(total['bytes'])}" for kind, total in totals.items())
    return f"{', '.join(parts)}, {_size(sum(total['bytes'] for total in totals.values()))} in all"


def _document(
    run: Run, served: Position, manifests: Sequence[Manifest], totals: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """What is printed, unrounded; sizes in bytes, times with their zone."""
    return {
        "run": run.run_id,
        "tensors": len(run.table),
        "elements": run.table.numel,
        "dense_bytes": run.table.nbytes,
        "base": vars(run.base),
        "served": {"version": served.version, "digest": served.digest},
        "totals": totals,
        "manifests": [
            {
                "version": manifest.version,
                "digest": manifest.position.digest,
                "kind": manifest.kind,
                "parent": manifest.parent.version if manifest.parent else None,
                "changed": manifest.changed if manifest.kind != "anchor" else None,
                "bytes": manifest.nbytes,
                "step": manifest.step,
                "created": _time(manifest.created),
                "served": manifest.position == served,
                "name": manifest.name,
            }
            for manifest in manifests
        ],
    }


def _time(seconds: float) -> str:
    """In this machine's zone, which is stated."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def _row(manifest: Manifest, numel: int, served: Position) -> list[str]:
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
        _time(manifest.created),
        "served" if manifest.position == served else "",
        manifest.name or "",
    ]


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
