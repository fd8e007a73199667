"""A published view on the CPU, rebuilt from a plan: what a replica does, without a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from hubsync.bits import TORCH_DTYPES, advance, bits_of
from hubsync.digest import digest_change, digest_view, tensor_seed
from hubsync.errors import ConfigError, NoPath, WrongParent
from hubsync.manifest import Manifest, Position
from hubsync.parts import open_anchor
from hubsync.patch import Patch
from hubsync.table import TensorTable

from .reader import ChainReader, Plan


class View:
    """Every tensor of a table, in its served dtype, and where that is in the chain.

    Attributes:
        tensors: name -> contiguous CPU tensor in checkpoint shape.
        position: version and digest; the digest is the one of the tensors, always.
    """

    def __init__(self, table: TensorTable, tensors: Mapping[str, torch.Tensor], position: Position):
        """Copies the tensors, casting them to the served dtypes. WrongParent if they do not have `position.digest`."""
        self.table = table
        self.tensors = {
            spec.name: tensors[spec.name].detach().to("cpu", TORCH_DTYPES[spec.dtype], copy=True).contiguous()
            for spec in table
        }
        self._digest = digest_view(table, self.tensors)
        self._move(position)

    def apply(self, patch: Patch, manifest: Manifest) -> None:
        """Go from a delta's parent to its position. WrongParent if it starts elsewhere or does not end there."""
        if manifest.parent != self.position:
            raise WrongParent(f"version {manifest.version} applies to {manifest.parent}, not to {self.position}")
        digest = self._digest
        for index, delta in patch.items():
            spec = self.table[index]
            bits = bits_of(self.tensors[spec.name])
            old = bits[delta.indices]
            new = advance(old, delta.diffs)
            bits[delta.indices] = new
            digest += digest_change(tensor_seed(spec.name), delta.indices, old, new)
        self._digest = digest
        self._move(manifest.position)

    def verify(self) -> None:
        """Recompute the digest from the tensors. WrongParent if it is not the one of `position`."""
        self._digest = digest_view(self.table, self.tensors)
        self._move(self.position)

    def _move(self, position: Position) -> None:
        if self._digest.hex != position.digest:
            raise WrongParent(f"the weights have digest {self._digest.hex}, but {position} has {position.digest}")
        self.position = position


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a table out of a local safetensors checkpoint, cast to the table's dtypes, one read at a time.

    Whether they are version 0 of a run is for the digest to say. ConfigError if the directory is none, or lacks a
    tensor, or has it in another shape.
    """

    def __init__(self, directory: Path, table: TensorTable):
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory: download the checkpoint, as with `hf download`")
        self._specs = {spec.name: spec for spec in table}
        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in self._specs.keys() & set(file.keys()):
                    self._files[name] = path
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        for spec in table:
            if spec.name not in shapes:
                raise ConfigError(f"{directory} does not have {spec.name}: it is not the base checkpoint of this run")
            if shapes[spec.name] != spec.shape:
                raise ConfigError(
                    f"{directory} has {spec.name} with shape {list(shapes[spec.name])} instead of {list(spec.shape)}: "
                    "it is not the base checkpoint of this run"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor.to(TORCH_DTYPES[self._specs[name].dtype])

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def replay(reader: ChainReader, plan: Plan, base: Mapping[str, torch.Tensor] | None = None) -> View:
    """Download what a plan says and rebuild the view it ends at, every step checked against its digest.

    Args:
        base: the tensors that the plan starts from, if not from an anchor: the base checkpoint's, or those of
            `plan.start`.

    Raises:
        NoPath: the plan needs `base`.
        WrongParent: the weights are not what the chain says they are.
        BucketError, FormatError: a part is missing, damaged or malformed.
    """
    run = reader.run()
    if plan.anchor is not None:
        view = View(run.table, open_anchor(reader.fetch(plan.anchor), run.table), plan.anchor.position)
    elif base is None:
        raise NoPath("this way starts from weights that are not in the bucket: the base checkpoint is needed")
    else:
        view = View(run.table, base, run.origin if plan.base else plan.start or run.origin)
    for manifest in plan.deltas:
        view.apply(reader.patch(manifest), manifest)
    view.verify()
    return view
