"""A trial run of two versions: a checkpoint, and the same with a random 1 % of its elements changed."""

from __future__ import annotations

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
from hubsync.format.checkpoint import Checkpoint, Patched, header, is_checkpoint, kept_dtypes
from hubsync.format.digest import digest_view
from hubsync.format.manifest import Position, Run
from hubsync.format.parts import Transition, write_anchor, write_delta
from hubsync.format.patch import Patch, TensorDelta
from hubsync.format.table import WIDTHS, TensorSpec, TensorTable
from hubsync.kernels.bits import advance, bits_of, difference

FRACTION = 0.01
_SMALL_STEP = 3


_SERVED = "BF16"  # what float32 checkpoints are served in, unless `SyncConfig.view_dtype` says otherwise


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


def make_trial(base: Path, workdir: Path, seed: int = 0) -> Trial:
    """Write the run and the patched checkpoint to `workdir`. ConfigError if `base` is no safetensors checkpoint."""
    table = _table_of(base)
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
        if file.is_file() and not file.name.startswith("model") and file.suffix != ".safetensors":
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


def make_random_checkpoint(source: Path, directory: Path) -> Path:
    """Write a checkpoint with random weights to `directory`, for a `config.json` or a directory with one."""
    import transformers

    config_dir = source if source.is_dir() else source.parent
    try:
        config = transformers.AutoConfig.from_pretrained(config_dir)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"transformers cannot build a causal language model from {source}: {error}") from None
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, norms and biases are constant and would hide a swap
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype) * 0.02)
    model.save_pretrained(directory)
    return directory


def _table_of(directory: Path) -> TensorTable:
    """All tensors of a checkpoint, in the order of their names, in the dtypes that a run of it publishes by default."""
    if not is_checkpoint(directory):
        raise ConfigError(
            f"{directory} holds no safetensors checkpoint: download the model first "
            "(hf download MODEL --local-dir DIR), or use --random with a directory that holds a config.json"
        )
    found = header(directory)
    for name, (_, dtype) in found.items():
        if dtype not in WIDTHS:
            raise ConfigError(f"{name} has dtype {dtype}, which hubsync does not support (nor quantized checkpoints)")
    kept = kept_dtypes(found)
    return TensorTable(
        [
            TensorSpec(name, shape, dtype if name in kept or dtype != "F32" else _SERVED)
            for name, (shape, dtype) in sorted(found.items())
        ]
    )
