"""What is published, and what of it has changed.

The published view of a model is what a checkpoint of it would hold: its parameters and persistent floating point
buffers, each once, under its checkpoint name and in the parts that a checkpoint has of it, cast to the dtype that is
served. The snapshot is a copy of the view that was last made durable. Changes are found by comparing bits with it,
never by looking at gradients or optimizer states, so they are right whatever moved the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from hubsync import kernels
from hubsync.errors import ConfigError
from hubsync.format.digest import Digest, digest_change, digest_torch, tensor_seed
from hubsync.format.patch import Patch, TensorDelta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import TORCH_DTYPES, UNSIGNED, bits_of, difference, dtype_code, find_changes
from hubsync.publish.view.adapters import adapter_tensors, is_adapted
from hubsync.publish.view.conversion import Places, places_in, published
from hubsync.publish.view.deepspeed import Partition, is_partitioned
from hubsync.publish.view.shards import Shard, local_part, require_held
from hubsync.publish.view.strided import Stretch, row_of, stretches_of

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, activation checkpointing
_INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
_NUMPY_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}  # the same by bytes; torch lacks wider unsigned ones
_ANOTHER_MODEL = "a run is of one model: make a new engine with another prefix for this one"
_CHUNK = 1 << 26  # elements compared at a time on a device: bounds the mask, and `nonzero` has a limit


class LiveView:
    """Which tensors of a model are published, and where they lie in it.

    Raises:
        ConfigError: a model without weights, or one whose checkpoint has other tensors than parts of its own.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        found = live_tensors(model)
        if not found:
            raise ConfigError(f"{type(model).__name__} has no parameters to publish")
        self._places: Places = {}
        saving = None if is_adapted(model) else _what_saves(model)
        if saving is not None:
            prefix, inner = saving
            self._places = places_in(inner, found, prefix)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Published name -> the live parameter or buffer, or an `Excerpt` of one, as the model holds them now."""
        return published(live_tensors(self._model), self._places)


def published_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`LiveView.tensors`, once."""
    return LiveView(model).tensors()


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name without wrappers -> the live parameter or buffer, in the model's order; tied weights under their first name.

    Of a PEFT model these are the tensors of its adapter, under the names that they have in a checkpoint of that.
    Integer tensors are not weights and are left out. ConfigError for tensors that are sharded otherwise than as
    DTensors, or that no view holds.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in (adapter_tensors(model) if is_adapted(model) else _weights(model)).items():
        _require_whole(name, tensor)
        tensor = Partition(name, tensor) if is_partitioned(tensor) else tensor
        if tensor.is_complex():
            raise ConfigError(f"{name} is complex: only real weights can be published")
        if not tensor.is_floating_point():
            continue
        checkpoint_name = _checkpoint_name(name)
        if checkpoint_name in found:
            raise ConfigError(f"two tensors of the model have the checkpoint name {checkpoint_name}")
        found[checkpoint_name] = tensor
    return found


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def table_of(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> TensorTable:
    """The tensor table of a published view served in `dtype`."""
    code = dtype_code(dtype)
    return TensorTable([TensorSpec(name, tuple(tensor.shape), code) for name, tensor in tensors.items()])


@dataclass(frozen=True)
class Change:
    """The changed elements of one tensor: int64 ascending numbers among those that this process owns (flat indices, if
    it owns all of the tensor), and their old and new bit patterns."""

    indices: np.ndarray
    old: np.ndarray
    new: np.ndarray


class Detected:
    """What changed since the snapshot, on the CPU.

    Differences and digest are computed when they are first asked for: in the background, while training goes on.

    Args:
        table: the tensor table.
        changes: table index -> the tensor's changes; no empty ones.
        before: digest of the snapshot.
        shards: table index -> what this process owns of the tensor; default is all of each.
    """

    def __init__(
        self, table: TensorTable, changes: dict[int, Change], before: Digest, shards: Sequence[Shard] | None = None
    ):
        self._table = table
        self._shards = shards
        self.changes = changes
        self.before = before

    @property
    def changed(self) -> int:
        """Number of elements."""
        return sum(len(change.indices) for change in self.changes.values())

    @cached_property
    def patch(self) -> Patch:
        """In checkpoint coordinates."""
        return {
            index: TensorDelta(self._indices[index], difference(change.old, change.new))
            for index, change in self.changes.items()
        }

    @cached_property
    def digest(self) -> Digest:
        """Digest of what the changes lead to: of the view, or of the part of it that this process owns."""
        digest = self.before
        for index, change in self.changes.items():
            seed = tensor_seed(self._table[index].name)
            digest += digest_change(seed, self._indices[index], change.old, change.new)
        return digest

    @cached_property
    def _indices(self) -> dict[int, np.ndarray]:
        """Flat indices in the checkpoint's tensors."""
        if self._shards is None:
            return {index: change.indices for index, change in self.changes.items()}
        return {index: self._shards[index].globally(change.indices) for index, change in self.changes.items()}


class Detector(Protocol):
    """Who finds what has changed since the view of `digest`, which is the last durable one.

    Attributes:
        holds_old: whether `tensors` costs nothing, so that compact deltas can be encoded against them.
    """

    table: TensorTable
    digest: Digest
    holds_old: bool

    def follow(self, tensors: dict[str, torch.Tensor]) -> None: ...
    def detect(self) -> Detected: ...
    def advance(self, detected: Detected) -> None: ...
    def audit(self) -> None: ...
    def tensors(self) -> dict[str, torch.Tensor]: ...
    def close(self) -> None: ...


class Snapshot:
    """The last durable published view, held in the served dtype, and its digest; of several ranks each holds its part.

    Nothing here writes to the model, and only `advance` writes to the snapshot. Nothing here is a collective.

    Args:
        tensors: the live tensors, from `published_tensors`.
        table: their table.
        device: "model" holds each tensor's copy beside it, "cpu" all of them in main memory.
        shards: table index -> what this process owns of the tensor; default is all of each.
    """

    holds_old = True

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        table: TensorTable,
        device: str = "model",
        shards: Sequence[Shard] | None = None,
    ):
        self.table = table
        self.shards = [Shard.whole(spec.shape) for spec in table] if shards is None else shards
        self._live = [tensors[spec.name] for spec in table]
        self._on_cpu = device == "cpu"
        self._dtypes = [TORCH_DTYPES[spec.dtype] for spec in table]
        self._stretches = stretches_of(self._live, self.shards)
        self._copies = [self._view(start, stretch).clone() for start, stretch in self._stretches]
        self._held = _parts(self._copies, [stretch for _, stretch in self._stretches])
        self.digest = self._recomputed()

    def follow(self, tensors: dict[str, torch.Tensor]) -> None:
        """Look at these live tensors from now on: a module may replace its parameters and buffers by others.

        ConfigError unless they are of the same table.
        """
        require_same_table(self.table, tensors)
        for spec, shard in zip(self.table, self.shards, strict=True):
            require_held(spec.name, tensors[spec.name], shard.box)
        self._live = [tensors[spec.name] for spec in self.table]

    def detect(self) -> Detected:
        """Compare the live tensors with the snapshot. Needs memory for one cast live tensor and O(changes)."""
        changes: dict[int, Change] = {}
        for (start, stretch), copy in zip(self._stretches, self._copies, strict=True):
            change = _changes(copy, self._view(start, stretch).to(copy.device))  # a model may move to another device
            changes |= by_tensor(stretch, change)
        return Detected(self.table, changes, self.digest, self.shards)

    def advance(self, detected: Detected) -> None:
        """Move the snapshot to the view that `detected` leads to: it has become durable."""
        for index, change in detected.changes.items():
            held = integers(self._held[index])
            at = torch.from_numpy(change.indices).to(held.device)
            held[at] = torch.from_numpy(change.new.view(_NUMPY_INTEGERS[change.new.itemsize])).to(held.device)
        self.digest = detected.digest

    def audit(self) -> None:
        """Nothing to do: every detection looks at all weights."""

    def close(self) -> None:
        """Nothing to undo: nobody was hooked."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The snapshot by name, in checkpoint shapes, if this process owns all. Not copies: do not write to them."""
        return {spec.name: held.view(spec.shape) for spec, held in zip(self.table, self._held, strict=True)}

    def part(self, index: int) -> torch.Tensor:
        """What this process owns of one tensor, flat. Not a copy: do not write to it."""
        return self._held[index]

    def _view(self, start: int, stretch: Stretch) -> torch.Tensor:
        """The published view of a stretch of a live tensor, flat; it may share the live tensor's memory."""
        first, size = stretch.indices[0], int(stretch.stops[-1])
        owned = local_part(row_of(self._live[first])[0])
        if size < owned.numel():  # else cast in its shape: torch rounds the NaN of a scalar otherwise
            owned = owned.reshape(-1)[start : start + size]
        view = owned.to(self._dtypes[first])
        return (view.cpu() if self._on_cpu else view).contiguous().view(-1)

    def _recomputed(self) -> Digest:
        digest = Digest()
        for spec, held, shard in zip(self.table, self._held, self.shards, strict=True):
            seed, bits = tensor_seed(spec.name), integers(held)
            if shard.first is not None:
                digest += digest_torch(seed, bits, shard.first)
                continue
            for first, last, indices in shard.pieces():
                digest += digest_torch(seed, bits[first:last], indices=torch.from_numpy(indices).to(bits.device))
        return digest


def by_tensor(stretch: Stretch, change: Change) -> dict[int, Change]:
    """A change of a stretch of elements, as changes of the tensors that lie in it; no empty ones."""
    return {
        index: Change(
            change.indices[part] - start if start else change.indices[part], change.old[part], change.new[part]
        )
        for index, part, start in stretch.split(change.indices)
    }


def _parts(copies: Sequence[torch.Tensor], stretches: Sequence[Stretch]) -> list[torch.Tensor]:
    """Copies of stretches as those of the tensors that lie in them, by index."""
    parts = {}
    for copy, stretch in zip(copies, stretches, strict=True):
        for index, start, stop in zip(stretch.indices, stretch.starts, stretch.stops, strict=True):
            parts[index] = copy[start:stop]
    return [parts[index] for index in sorted(parts)]


def require_same_table(table: TensorTable, tensors: dict[str, torch.Tensor]) -> None:
    """ConfigError unless live tensors have the names and shapes of the table."""
    for name in sorted(tensors.keys() ^ {spec.name for spec in table}):
        raise ConfigError(f"the model {'now has' if name in tensors else 'no longer has'} {name}; {_ANOTHER_MODEL}")
    for spec in table:
        if tuple(tensors[spec.name].shape) != spec.shape:
            raise ConfigError(
                f"{spec.name} now has shape {list(tensors[spec.name].shape)} instead of {list(spec.shape)}; "
                + _ANOTHER_MODEL
            )


def _changes(old: torch.Tensor, new: torch.Tensor) -> Change:
    """The elements whose bits differ; only these leave a device."""
    if old.device.type != "cpu":
        return _changes_on_device(old, new)
    old_bits, new_bits = bits_of(old), bits_of(new)
    indices, _ = find_changes(old_bits, new_bits)
    return Change(indices, old_bits[indices], new_bits[indices])


def _changes_on_device(old: torch.Tensor, new: torch.Tensor) -> Change:
    """`_changes` for any device: in Triton, or torch operations."""
    if kernels.on_gpu(old):
        indices, before, after = kernels.gpu().changes(integers(old), integers(new))
        return Change(indices.cpu().numpy(), _unsigned(before), _unsigned(after))
    at = torch.cat(list(_unequal(integers(old), integers(new))))
    return Change(at.cpu().numpy(), _unsigned(integers(old)[at]), _unsigned(integers(new)[at]))


def _unequal(old: torch.Tensor, new: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, max(1, old.numel()), _CHUNK):
        stop = start + _CHUNK
        yield (old[start:stop] != new[start:stop]).nonzero().view(-1) + start


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor, as integers of its width. No copy."""
    return tensor.view(_INTEGERS[8 * tensor.element_size()])


def _unsigned(bits: torch.Tensor) -> np.ndarray:
    return bits.cpu().numpy().view(UNSIGNED[8 * bits.element_size()])


def _checkpoint_name(name: str) -> str:
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    while len(segments) > 1 and segments[0] == "module":  # DistributedDataParallel
        segments = segments[1:]
    return ".".join(segments)


def _what_saves(model: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """The transformers model in a model that wraps it, and the prefix that its names have there."""
    inner, path = model, ""
    while not hasattr(inner, "save_pretrained"):
        children = list(inner.named_children())
        if len(children) != 1:
            return None  # not a transformers model: what it holds is what it is called
        ((name, inner),) = children
        path += f"{name}."
    return _checkpoint_name(f"{path}name").removesuffix("name"), getattr(inner, "_orig_mod", inner)


def _require_whole(name: str, tensor: torch.Tensor) -> None:
    if "_fsdp_wrapped_module" in name or "_flat_param" in name:
        raise ConfigError(f"{name} is sharded by FSDP1, which is not supported: use FSDP2 (`fully_shard`)")
    if tensor.is_meta:
        raise ConfigError(f"{name} is on the meta device: load the weights before the engine is made")
