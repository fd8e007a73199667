"""`hubsync ls`, `show`, `verify` and `pull`: what a run holds, whether it is whole, and a version as a checkpoint."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, Plan, Step
from hubsync.chain.replay import View, replay
from hubsync.errors import ConfigError, NoPath
from hubsync.format.checkpoint import Checkpoint
from hubsync.format.manifest import MAX_VERSION, SIDE_FILES, Manifest, Position, Run
from hubsync.format.parts import open_anchor, write_adapter, write_anchor

from .keys import add_public_key, public_key

_ADDRESS = "hf://buckets/NAMESPACE/NAME/RUN, or a directory"


def add_parser(subparsers: Any) -> None:
    ls = _command(subparsers, "ls", list_versions, "list the versions of a run")
    ls.add_argument("--limit", type=_count, metavar="N", help="only the newest N versions")

    show = _command(subparsers, "show", show_version, "print the manifest of a version")
    show.add_argument("version", type=_version, metavar="N", help="number of the version, as `hubsync ls` lists it")

    verify = _command(subparsers, "verify", verify_run, "download a run, replay it, and check every hash and digest")
    _add_base(verify)

    pull = _command(subparsers, "pull", pull_version, "write a version as a checkpoint that vllm and transformers load")
    pull.add_argument("out", type=Path, metavar="DIR", help="directory to write; it must not exist, or be empty")
    pull.add_argument("--version", type=_version, metavar="N", help="default: the newest")
    pull.add_argument(
        "--max-head-age",
        type=float,
        metavar="S",
        help="refuse a run whose head was written longer ago than that (default: no limit)",
    )
    _add_base(pull)


def list_versions(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        reader = _reader(args, stack)
        run, manifests = reader.run(), _with_merged(reader)
    if args.limit is not None:
        newest = sorted({manifest.version for manifest in manifests})[-args.limit :]
        manifests = [manifest for manifest in manifests if manifest.version in newest]
    base = "an anchor in the bucket" if run.base.model is None else run.base.model
    if run.base.revision is not None:
        base += f"@{run.base.revision[:12]}"
    console = Console(markup=False, emoji=False, highlight=False)  # a name is text, whatever it looks like
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: leave the lines whole
    console.print(f"run {run.run_id}: {len(run.table)} tensors, {_size(run.table.nbytes)} dense, version 0 is {base}")
    table = Table(box=None, pad_edge=False)
    for heading in ("version", "kind", "parent", "changed", "of all", "size", "bits/change", "step"):
        table.add_column(heading, justify="left" if heading == "kind" else "right", no_wrap=True)
    for heading in ("created", "name"):
        table.add_column(heading, no_wrap=True)
    for manifest in manifests:
        table.add_row(*_row(manifest, run.table.numel))
    console.print(table)
    return 0


def show_version(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        reader = _reader(args, stack)
        if args.version == 0 and not any(manifest.version == 0 for manifest in reader.manifests()):
            run = reader.run()
            document: dict[str, Any] = {"position": {"version": 0, "digest": run.digest}, "base": vars(run.base)}
        else:
            document = reader.manifest(args.version).to_json()
    print(json.dumps(document, indent=1))
    return 0


def verify_run(args: argparse.Namespace) -> int:
    """Replay the current chain from where it can begin, with every anchor on it; say what could not be checked."""
    with ExitStack() as stack:
        reader = _reader(args, stack)
        manifests = _with_merged(reader)
        base = _base(args, reader)
        view = None if base is None else View(reader.run().table, base, reader.run().origin)
        left: list[Manifest] = []
        for _, group in groupby(manifests, lambda manifest: manifest.version):
            unproven = []
            for manifest in group:
                after = _verify(reader, manifest, view)
                view = after or view
                if after is None:
                    unproven.append(manifest)
            # Where the version before is gone, an anchor of this one, or a merged delta to it, may prove it backwards.
            left += [manifest for manifest in unproven if _verify(reader, manifest, view) is None]
        reached = _reached(manifests, reader.run().origin)
        cut = [manifest for manifest in left if manifest.parent not in reached]
        for manifest in left:
            reader.fetch(manifest)
            why = "what it applies to has been deleted" if manifest in cut else "needs --base to be replayed"
            print(f"unproven {manifest.kind:6} {manifest.position}: files intact, {why}")
    checked = len(manifests) - len(left)
    print(f"{checked} of {len(manifests)} replayed bit for bit, {len(manifests)} with intact files")
    return 0 if left == cut else 1


def pull_version(args: argparse.Namespace) -> int:
    out = args.out.resolve()  # "new/.." is no place to write to before there is a "new"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{args.out} is not empty: choose another directory")
    with ExitStack() as stack:
        reader = _reader(args, stack, args.max_head_age)
        base = _base(args, reader)
        view = reader.carry_out(lambda: _plan(reader, args.version, base), lambda plan: replay(reader, plan, base))
        _write_checkpoint(out, view, reader.run(), _side_files(reader, args.base))
    print(f"wrote {view.position} to {args.out}")
    return 0


# --- parts of the commands --------------------------------------------------------------------------


def _command(subparsers: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=summary, description=summary.capitalize() + ".")
    parser.add_argument("address", metavar="ADDRESS", help=_ADDRESS)
    parser.add_argument("--token", help="Hugging Face token (default: HF_TOKEN, or that of `hf auth login`)")
    add_public_key(parser)
    parser.set_defaults(run=run)
    return parser


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, metavar="DIR", help="local copy of the run's base model (version 0)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of versions, at least 1, not {text}")
    return int(text)


def _version(text: str) -> int:
    version = int(text) if text.isdecimal() else -1
    if not 0 <= version <= MAX_VERSION:
        raise argparse.ArgumentTypeError(f"a version is a number from 0 to {MAX_VERSION}, not {text}")
    return version


def _reader(args: argparse.Namespace, stack: ExitStack, max_head_age: float | None = None) -> ChainReader:
    cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="hubsync-"))
    bucket = open_bucket(args.address, token=args.token, key=public_key(args))
    return ChainReader(bucket, cache, max_head_age=max_head_age)


def _plan(reader: ChainReader, version: int | None, base: Mapping[str, torch.Tensor] | None) -> Plan:
    try:
        return reader.plan(None, version, base_available=base is not None)
    except NoPath:
        if base is None and reader.plan(None, version, base_available=True).base:
            raise NoPath(
                f"the base checkpoint is not at hand: name a local copy of {reader.run().base.model} with --base DIR"
            ) from None
        raise


def _base(args: argparse.Namespace, reader: ChainReader) -> Mapping[str, torch.Tensor] | None:
    """The tensors of version 0: those of `--base`, else of the run's base model where it is a directory here."""
    model = reader.run().base.model
    directory = args.base or (Path(model) if model is not None and Path(model).is_dir() else None)
    if directory is None:
        return None
    checkpoint = Checkpoint(directory, reader.run().table)
    checkpoint.check()
    return checkpoint


def _verify(reader: ChainReader, manifest: Manifest, view: View | None) -> View | None:
    """The view at `manifest`, replayed and compared; None if that is not possible from `view`."""
    after = (
        _verify_anchor(reader, manifest, view) if manifest.kind == "anchor" else _verify_delta(reader, manifest, view)
    )
    if after is not None:
        print(f"ok       {manifest.kind:6} {manifest.position}")
    return after


def _verify_anchor(reader: ChainReader, manifest: Manifest, view: View | None) -> View:
    anchor = View(reader.run().table, open_anchor(reader.fetch(manifest), reader.run().table), manifest.position)
    if view is None or view.position != manifest.position:
        return anchor
    view.verify()
    return view


def _verify_delta(reader: ChainReader, manifest: Manifest, view: View | None) -> View | None:
    """From its start to its end; or from its end back and forth again, as both have digests."""
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
    """Where deltas lead from version 0, for who has a copy of the base model."""
    reached = {origin}
    for manifest in manifests:
        if manifest.parent in reached:
            reached.add(manifest.position)
    return reached


def _side_files(reader: ChainReader, base: Path | None) -> list[Path]:
    """Config, tokenizer and so on, from the newest anchor or the base checkpoint."""
    anchors = [manifest for manifest in reader.manifests() if manifest.kind == "anchor"]
    if anchors:
        paths = reader.fetch(anchors[-1])
    else:
        model = base or Path(str(reader.run().base.model))
        paths = sorted(model.iterdir()) if model.is_dir() else []
    return [path for path in paths if path.name in SIDE_FILES - {"model.safetensors.index.json"}]


def _write_checkpoint(out: Path, view: View, run: Run, side_files: list[Path]) -> None:
    """Beside `out` first, so that `out` is complete once it exists."""
    parent = out.parent
    parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{out.name}-"))
    try:
        for path in side_files:
            shutil.copyfile(path, staging / path.name)
        if run.adapter is None:
            write_anchor(staging, view.table, view.tensors)
        else:
            write_adapter(staging, run, view.tensors)
        staging.chmod(0o755)
        staging.replace(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _with_merged(reader: ChainReader) -> list[Manifest]:
    """The current chain, and after each version the merged deltas that lead to it."""
    manifests = reader.manifests()
    merged = reader.spans(manifests)
    rank = {"delta": 0, "merged": 1, "anchor": 2}
    return sorted([*manifests, *merged], key=lambda m: (m.version, rank[m.kind], -m.parent.version if m.parent else 0))


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
