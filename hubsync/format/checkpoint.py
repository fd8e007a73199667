"""Whole views as lazy mappings: a checkpoint directory, and a view with a patch applied."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hubsync.errors import ConfigError, FormatError
from hubsync.kernels.bits import TORCH_DTYPES, bits_of

from .patch import Patch, TensorValues, changes_of
from .table import WIDTHS, TensorTable

_INDEX = "model.safetensors.index.json"

Specs = Mapping[str, tuple[tuple[int, ...], str]]
"""Tensors of a checkpoint: name -> (shape, safetensors dtype code)."""


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a table from a local safetensors checkpoint, in the dtypes of the table. Opens one at a time.

    The checkpoint may hold more tensors than the table. Tensors of another dtype are rounded as the published view of
    version 0 is. `check` tests names and shapes; only the digest tells whether the tensors are version 0.

    ConfigError if the index or a file is damaged.
    """

    def __init__(self, directory: Path, table: TensorTable):
        self._directory = directory
        self._table = table
        self._files: dict[str, Path] = {}
        for path in shards_of(directory):
            try:
                with safe_open(path, framework="pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path} cannot be read as a safetensors file: {error}") from None

    def check(self) -> None:
        """Raise ConfigError unless every tensor of the table is present in its shape. Reads headers only."""
        if not self._directory.is_dir():
            raise ConfigError(f"{self._directory} is not a directory: download the checkpoint, as with `hf download`")
        for spec in self._table:
            if spec.name not in self._files:
                raise ConfigError(
                    f"{self._directory} does not have {spec.name}: it is not the base checkpoint of this run"
                )
            with safe_open(self._files[spec.name], framework="pt") as file:
                shape = tuple(file.get_slice(spec.name).get_shape())
            if shape != spec.shape:
                raise ConfigError(
                    f"{self._directory} has {spec.name} with shape {list(shape)} instead of {list(spec.shape)}: "
                    "it is not the base checkpoint of this run"
                )

    def left_out(self) -> dict[str, Path]:
        """Tensors that the table does not have, and their files: what transformers does not load, such as MTP heads."""
        return {name: path for name, path in self._files.items() if name not in self._table}

    def as_stored(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint in its own dtype, also one that is not in the table."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._table:
            raise KeyError(name)
        tensor = self.as_stored(name)
        return tensor.to(TORCH_DTYPES[self._table[self._table.index_of(name)].dtype])

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self._table if spec.name in self._files)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def header(directory: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors dtype code) of every tensor of a checkpoint. ConfigError if a file is damaged."""
    found = {}
    for path in shards_of(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    view = file.get_slice(name)
                    found[name] = tuple(view.get_shape()), str(view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as a safetensors file: {error}") from None
    return found


def kept_dtypes(specs: Specs) -> dict[str, str]:
    """The tensors of a checkpoint that have another floating point dtype than most of its elements.

    Checkpoints keep router biases, `A_log` and some norms in float32 beside bfloat16, and so do models that serve them.
    A published view keeps the dtypes of these tensors, and has its own dtype for all others.
    """
    counts: dict[str, int] = defaultdict(int)
    for shape, dtype in specs.values():
        if dtype in WIDTHS:
            counts[dtype] += math.prod(shape)
    usual = max(counts, key=lambda dtype: counts[dtype], default=None)
    return {name: dtype for name, (_, dtype) in specs.items() if dtype in WIDTHS and dtype != usual}


class Patched(Mapping[str, torch.Tensor]):
    """A view with a patch applied, lazily for each tensor."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], table: TensorTable, patch: Patch):
        self._tensors = tensors
        self._table = table
        self._patch = patch

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        delta = self._patch.get(self._table.index_of(name))
        if delta is None:
            return tensor
        patched = tensor.contiguous().clone()
        bits = bits_of(patched)
        needed = len(delta) if isinstance(delta, TensorValues) else int(delta.indices[-1]) + 1
        if needed > len(bits):
            raise FormatError(f"{name} has {len(bits)} elements in the checkpoint, too few for its delta")
        indices, _, after = changes_of(delta, bits)
        bits[indices] = after
        return patched

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory holds safetensors weights."""
    return directory.is_dir() and bool(shards_of(directory))


def shards_of(directory: Path) -> list[Path]:
    """The weight files of the checkpoint: those of its index, if any. Some directories hold the weights twice."""
    index = directory / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [directory / Path(name).name for name in names]
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index} is not the index of a checkpoint ({type(error).__name__}: {error})") from None
    return sorted(directory.glob("*.safetensors"))
