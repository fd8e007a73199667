"""A trial run of two versions: a checkpoint, and the same with a random 1 % of its elements changed."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hubsync.bucket import open_bucket
from hubsync.chain import ChainWriter
from hubsync.errors import ConfigError
from hubsync.format.checkpoint import Checkpoint, Patched, header, is_checkpoint
from hubsync.format.digest import digest_view
from hubsync.format.manifest import Position, Run
from hubsync.format.parts import Transition, write_anchor, write_delta
from hubsync.format.patch import Patch, TensorDelta
from hubsync.format.table import WIDTHS, TensorTable
from hubsync.kernels.bits import advance, bits_of, difference
from hubsync.publish.view.live import table_of
from hubsync.publish.view.stated import stated_by

from .random_model import is_side_file, require_processor

FRACTION = 0.01
_SMALL_STEP = 3


@dataclass(frozen=True)
class Trial:
    """A base checkpoint, a run that starts from it, and a checkpoint of the run's version 1.

    Attributes:
        base: directory of the checkpoint to examine.
        patched: directory of the same model at version 1.
        address: address of the run, a directory.
        target: version 1.
        table: all tensors of the checkpoint.
        changed: number of elements that differ.
    """

    base: Path
    patched: Path
    address: str
    target: Position
    table: TensorTable
    changed: int


def make_trial(base: Path, workdir: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Trial:
    """Write the run and the patched checkpoint to `workdir`.

    ConfigError if `base` is no safetensors checkpoint, or lacks files that vLLM needs.

    Args:
        dtype: dtype of the run, as `SyncConfig.view_dtype`.
    """
    table = _table_of(base, dtype)
    require_processor(base)
    tensors = Checkpoint(base, table)
    start = Position(0, digest_view(table, tensors).hex)
    patch = random_patch(table, tensors, seed)
    patched = Patched(tensors, table, patch)
    target = Position(1, digest_view(table, patched).hex)
    run_id = uuid.uuid4().hex
    address = str(workdir / "bucket")
    changed = sum(map(len, patch.values()))
    writer = ChainWriter.create(
        open_bucket(address, create=True), Run(run_id, table, start.digest, created=time.time())
    )
    part = write_delta(table, patch, Transition(run_id, start, target))
    writer.commit_delta([part], digest=target.digest, changed=changed)

    directory = workdir / "patched"
    directory.mkdir()
    for file in base.iterdir():
        if is_side_file(file):
            shutil.copy(file, directory)
    write_anchor(directory, table, patched)
    return Trial(base, directory, address, target, table, changed)


def random_patch(table: TensorTable, tensors: Mapping[str, torch.Tensor], seed: int) -> Patch:
    """Change 1 % of each tensor: half of it by small steps, half to any bit pattern, NaN and -0 included."""
    rng = np.random.default_rng(seed)
    patch: Patch = {}
    for index, spec in enumerate(table):
        if spec.numel == 0:
            continue
        chosen = np.sort(rng.choice(spec.numel, max(1, int(spec.numel * FRACTION)), replace=False))
        old = bits_of(tensors[spec.name].contiguous())[chosen]
        steps = rng.integers(1, _SMALL_STEP + 1, len(chosen)) * rng.choice([-1, 1], len(chosen))
        small = advance(old, steps.astype(f"i{old.itemsize}"))
        wild = rng.integers(0, 1 << spec.width, len(chosen), dtype=np.uint64).astype(old.dtype)
        new = np.where(rng.random(len(chosen)) < 0.5, small, wild)
        differs = new != old
        if differs.any():
            patch[index] = TensorDelta(chosen[differs], difference(old, new)[differs])
    return patch


def _table_of(directory: Path, dtype: torch.dtype) -> TensorTable:
    """All tensors of a checkpoint, in the order of their names, as a trainer that starts from it publishes them."""
    if not is_checkpoint(directory):
        raise ConfigError(
            f"{directory} holds no safetensors checkpoint: download the model first "
            "(hf download MODEL --local-dir DIR), or use --random with a directory that holds a config.json"
        )
    found = header(directory)
    for name, (_, code) in found.items():
        if code not in WIDTHS:
            raise ConfigError(f"{name} has dtype {code}, which hubsync does not support (nor quantized checkpoints)")
    tensors = {name: torch.empty(shape, device="meta") for name, (shape, _) in sorted(found.items())}
    return table_of(tensors, dtype, stated_by(found, _class_of(directory), tensors).kept)


def _class_of(directory: Path) -> type | None:
    """The class with which transformers loads a checkpoint; None if transformers has none."""
    try:
        names = json.loads((directory / "config.json").read_text()).get("architectures") or [""]
    except (OSError, ValueError):
        return None
    import transformers

    return getattr(transformers, names[0], None)
