"""`hubsync verify`: download a run, replay it, and check every hash and digest; or the weights that a server serves."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

from hubsync.progress import Bar, progress, say

from . import options

if TYPE_CHECKING:
    from hubsync.chain import ChainReader
    from hubsync.chain.replay import View
    from hubsync.format.manifest import Manifest, Position

HELP = "download a run, replay it, and check every hash and digest; or the weights of a server"
DESCRIPTION = """\
Download every delta and anchor of a run, replay them, and check all hashes and digests. Exit code 0: everything that
can still be replayed is right. 1: damage, or something that needs --base to be replayed.

With --server URL instead: have every worker of that server recompute the digest of the weights that it serves, while it
generates. Exit code 0: they are the version's, bit for bit. 1: they are not, or were not and the server has rebuilt
them, or that cannot be known.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser, optional=True)
    parser.add_argument("--server", metavar="URL", help="verify what this server serves, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time the server may take (default: %(default)g)",
    )
    options.add_api_key(parser)
    options.add_json(parser)
    options.add_base(parser, "needed to replay deltas before the first anchor")
    options.add_read_access(parser)


def run(args: argparse.Namespace) -> int:
    from hubsync.errors import ConfigError

    if (args.address is None) == (args.server is None):
        raise ConfigError("give the ADDRESS of a run, or a server with --server URL, and not both")
    return _verify_run(args) if args.server is None else _verify_server(args)


def _verify_server(args: argparse.Namespace) -> int:
    from hubsync.replicas.engines import connect
    from hubsync.replicas.replica import Replica
    from hubsync.replicas.server import checked_seconds

    server = connect(args.server, args.api_key)
    try:
        status = Replica(server).verify(checked_seconds("--timeout", args.timeout))
    finally:
        server.close()
    if args.json:
        assert status.position is not None  # `verify` raises otherwise
        ranks = [{"rank": rank["rank"], **rank["verification"]} for rank in status.ranks]
        print(json.dumps({"server": server.url, **vars(status.position), "ranks": ranks}))
        return 0
    for rank in status.ranks:
        looks = rank["verification"]
        seconds = rank["metrics"].get("verify_s", 0.0)
        print(
            f"rank {rank['rank']}: right, verified {looks['passes']} times, last {looks['age_s']:.1f} s ago in "
            f"{seconds:.3f} s; again in {100 * looks['share']:g} % of idle time"
        )
    print(f"{server.url} serves {status.position}, bit for bit")
    return 0


def _verify_run(args: argparse.Namespace) -> int:
    from hubsync.chain.replay import View

    from .access import base_checkpoint, reading, with_merged

    with reading(args) as reader:
        manifests, origin, model = with_merged(reader), reader.run().origin, reader.run().base.model
        base = base_checkpoint(args, reader)
        begin = None if base is None else View(reader.run().table, base, origin)
        left = _replay_all(reader, manifests, begin, quiet=args.json)
        reached = _reached(manifests, origin)
        cut = [manifest for manifest in left if manifest.parent not in reached]
        for manifest in left:
            reader.fetch(manifest)
            why = "the version it applies to has been deleted" if manifest in cut else "replaying it needs --base"
            if not args.json:
                print(f"unproven {manifest.kind:6} {manifest.position}: files intact; {why}")
    if args.json:
        print(json.dumps(_document(manifests, left, cut)))
        return 0 if left == cut else 1
    checked = len(manifests) - len(left)
    print(f"{checked} of {len(manifests)} replayed bit for bit, {len(manifests)} with intact files")
    if left == cut:
        return 0
    print(f"to replay the others, give a local copy of {model or 'the base model'} with --base DIR")
    return 1


def _document(manifests: list[Manifest], left: list[Manifest], cut: list[Manifest]) -> dict[str, Any]:
    """Of each manifest whether it was replayed. The files of all are intact; damage is an error."""

    def result(manifest: Manifest) -> str:
        if manifest not in left:
            return "replayed"
        return "parent deleted" if manifest in cut else "needs base"

    return {
        "replayed": len(manifests) - len(left),
        "manifests": [
            {"version": m.version, "digest": m.position.digest, "kind": m.kind, "result": result(m)} for m in manifests
        ],
    }


def _replay_all(reader: ChainReader, manifests: list[Manifest], view: View | None, *, quiet: bool) -> list[Manifest]:
    """Replay the chain from `view`, or from the first anchor; returns the manifests that could not be replayed."""
    with progress("replaying", len(manifests), " manifests") as shown:
        return _replay_shown(reader, manifests, view, quiet, shown)


def _replay_shown(
    reader: ChainReader, manifests: list[Manifest], view: View | None, quiet: bool, shown: Bar
) -> list[Manifest]:
    left: list[Manifest] = []
    for _, group in groupby(manifests, lambda manifest: manifest.version):
        unproven = []
        for manifest in group:
            after = _verify(reader, manifest, view, quiet)
            view = after or view
            if after is None:
                unproven.append(manifest)
            shown.add()
        # If the version before is gone, an anchor of this version or a merged delta to it may prove it backwards.
        left += [manifest for manifest in unproven if _verify(reader, manifest, view, quiet) is None]
    return left


def _verify(reader: ChainReader, manifest: Manifest, view: View | None, quiet: bool) -> View | None:
    """The view at `manifest`, replayed and compared; None if that is not possible from `view`."""
    verify = _verify_anchor if manifest.kind == "anchor" else _verify_delta
    after = verify(reader, manifest, view)
    if after is not None and not quiet:
        say(f"ok       {manifest.kind:6} {manifest.position}")
    return after


def _verify_anchor(reader: ChainReader, manifest: Manifest, view: View | None) -> View:
    from hubsync.chain.replay import View
    from hubsync.format.parts import open_anchor

    anchor = View(reader.run().table, open_anchor(reader.fetch(manifest), reader.run().table), manifest.position)
    if view is None or view.position != manifest.position:
        return anchor
    view.verify()
    return view


def _verify_delta(reader: ChainReader, manifest: Manifest, view: View | None) -> View | None:
    """Apply the delta to its parent; from its own version, undo it and apply it again, which checks both digests."""
    from hubsync.chain import Step

    if view is not None and view.position == manifest.parent:
        view.apply(reader.patch(manifest, view.bits), Step(manifest))
        return view
    if view is None or view.position != manifest.position or not manifest.encoding.invertible:
        return None
    patch = reader.patch(manifest)
    view.apply(patch, Step(manifest, inverse=True))
    view.apply(patch, Step(manifest))
    return view


def _reached(manifests: list[Manifest], origin: Position) -> set[Position]:
    """Positions that a chain of deltas connects to version 0, hence replayable with a copy of the base model."""
    reached = {origin}
    for manifest in manifests:
        if manifest.parent in reached:
            reached.add(manifest.position)
    return reached
