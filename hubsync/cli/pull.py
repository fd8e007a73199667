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
    from hubsync.format.checkpoint import Checkpoint
    from hubsync.format.manifest import Run

_INDEX = "model.safetensors.index.json"
_MOST_EMBEDDINGS = 4  # tensors with the shape of an embedding; of other shapes, a model has many, and none is tied

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
        side_files = _side_files(reader, args.base)
        left_out = _write_checkpoint(out, view, reader.run(), side_files, base)
    print(f"wrote {view.position} to {args.out}")
    if left_out:
        print(f"{left_out} tensors that are not part of the run are those of the base model")
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
    found = reader.side_files()
    model = base or Path(str(reader.run().base.model))
    if not found and model.is_dir():
        found = sorted(model.iterdir())
    return [path for path in found if path.name in SIDE_FILES - {_INDEX}]


def _write_checkpoint(out: Path, view: View, run: Run, side_files: list[Path], base: Checkpoint | None) -> int:
    """Write to a temporary directory first, and rename it, so that `out` is complete once it exists.

    Returns:
        number of tensors that only the base has.
    """
    from hubsync.format.parts import write_adapter, write_anchor

    parent = out.parent
    parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{out.name}-"))
    left_out = 0
    try:
        for path in side_files:
            shutil.copyfile(path, staging / path.name)
        if run.adapter is None:
            write_anchor(staging, view.table, view.tensors)
            left_out = _write_left_out(staging, view, base)
        else:
            write_adapter(staging, run, view.tensors)
        staging.chmod(0o755)
        staging.replace(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return left_out


def _write_left_out(directory: Path, view: View, base: Checkpoint | None) -> int:
    """Add the base's tensors that are not in the run, such as MTP heads: a file for each of its files that has some.

    A tensor that equals one of the run in the base is a copy of it (tied embeddings), and gets its new values.
    """
    import json

    import torch

    from hubsync.format.parts import write_anchor_file

    files: dict[Path, list[str]] = {}
    for name, path in ({} if base is None else base.left_out()).items():
        files.setdefault(path, []).append(name)
    added: dict[str, str] = {}
    for number, names in enumerate(files.values(), 1):
        tensors = {}
        for name in names:
            assert base is not None
            own = base.as_stored(name)
            of_shape = [spec.name for spec in view.table if spec.shape == tuple(own.shape) and spec.name in base]
            tied = of_shape if len(of_shape) <= _MOST_EMBEDDINGS else []
            twin = next((other for other in tied if torch.equal(base.as_stored(other), own)), None)
            tensors[name] = own if twin is None else view.tensors[twin].clone()
        write_anchor_file(directory / f"model-base-{number:05d}.safetensors", tensors)
        added |= dict.fromkeys(names, f"model-base-{number:05d}.safetensors")
    index = directory / _INDEX
    if added and index.exists():  # without an index vLLM loads all files
        document = json.loads(index.read_text())
        document["weight_map"] |= added
        index.write_text(json.dumps(document, indent=2) + "\n")
    return len(added)
