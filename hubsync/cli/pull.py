"""`hubsync pull`: write a version as a checkpoint."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hubsync.errors import ConfigError, NoPath
from hubsync.format.manifest import SIDE_FILES

from . import options

if TYPE_CHECKING:
    import torch

    from hubsync.chain import ChainReader, Plan
    from hubsync.chain.replay import View
    from hubsync.format.manifest import Run

HELP = "write a version as a checkpoint that vLLM and transformers load"
DESCRIPTION = """\
Rebuild a version from the base model or an anchor, check its digest, and write it to a directory as a safetensors
checkpoint that `vllm serve` and `from_pretrained` load. The directory appears when it is complete.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser)
    parser.add_argument("out", type=Path, metavar="DIR", help="directory to write; it must not exist, or be empty")
    parser.add_argument("--version", type=options.version, metavar="VERSION", help="version to write (default: newest)")
    options.add_base(parser, "needed if no anchor precedes the version")
    options.add_max_head_age(parser)
    options.add_read_access(parser)


def run(args: argparse.Namespace) -> int:
    from hubsync.chain.replay import replay

    from .access import base_checkpoint, reading

    out = args.out.resolve()  # "new/.." cannot be created while "new" does not exist
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{args.out} is not empty: choose another directory")
    with reading(args, max_head_age=args.max_head_age) as reader:
        base = base_checkpoint(args, reader)
        view = reader.carry_out(lambda: _plan(reader, args.version, base), lambda plan: replay(reader, plan, base))
        _write_checkpoint(out, view, reader.run(), _side_files(reader, args.base))
    print(f"wrote {view.position} to {args.out}")
    return 0


def _plan(reader: ChainReader, version: int | None, base: Mapping[str, torch.Tensor] | None) -> Plan:
    try:
        return reader.plan(None, version, base_available=base is not None)
    except NoPath:
        if base is None and reader.plan(None, version, base_available=True).base:
            raise NoPath(
                f"the base model is not on this machine: give a local copy of {reader.run().base.model} with --base DIR"
            ) from None
        raise


def _side_files(reader: ChainReader, base: Path | None) -> list[Path]:
    """Config, tokenizer and so on, from the newest anchor or the base model."""
    anchors = [manifest for manifest in reader.manifests() if manifest.kind == "anchor"]
    if anchors:
        paths = reader.fetch(anchors[-1])
    else:
        model = base or Path(str(reader.run().base.model))
        paths = sorted(model.iterdir()) if model.is_dir() else []
    return [path for path in paths if path.name in SIDE_FILES - {"model.safetensors.index.json"}]


def _write_checkpoint(out: Path, view: View, run: Run, side_files: list[Path]) -> None:
    """Write to a temporary directory first, and rename it, so that `out` is complete once it exists."""
    from hubsync.format.parts import write_adapter, write_anchor

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
