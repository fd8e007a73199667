"""Detection by comparison with a copy of the last durable view.

Changes are found by comparing bits, never by reading gradients or optimizer states. So they are right whatever moved
the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hubsync.format.digest import Digest, digest_torch, tensor_seed
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import TORCH_DTYPES
from hubsync.publish.view.cast import integers
from hubsync.publish.view.live import require_same_table
from hubsync.publish.view.shards import Shard, local_part, require_held
from hubsync.publish.view.strided import ElementRun, element_runs, row_of

from .changes import Change, Detected, compare, split_by_tensor

_NUMPY_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}  # by bytes; torch lacks wider unsigned ones


class Snapshot:
    """A copy of the last durable view in the served dtype, and its digest. With several ranks, each holds its part.

    No method writes to the model. Only `advance` writes to the snapshot. No method is a collective.

    Args:
        tensors: the live tensors, from `published_tensors`.
        table: their table.
        device: "model" holds the copy of each tensor on the tensor's device, "cpu" holds all copies in main memory.
        shards: table index -> the elements of the tensor that this process owns; default is all.
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
        self._runs = element_runs(self._live, self.shards)
        self._copies = [self._cast(start, run).clone() for start, run in self._runs]
        self._held = _parts(self._copies, [run for _, run in self._runs])
        self.digest = self._recomputed()

    def follow(self, tensors: dict[str, torch.Tensor]) -> None:
        """Watch these live tensors from now on. ConfigError unless they have the names and shapes of the table."""
        require_same_table(self.table, tensors)
        for spec, shard in zip(self.table, self.shards, strict=True):
            require_held(spec.name, tensors[spec.name], shard.box)
        self._live = [tensors[spec.name] for spec in self.table]

    def detect(self) -> Detected:
        """Compare the live tensors with the snapshot. Needs memory for one cast run of elements, and O(changes)."""
        changes: dict[int, Change] = {}
        for (start, run), copy in zip(self._runs, self._copies, strict=True):
            change = compare(copy, self._cast(start, run).to(copy.device))  # a model may move to another device
            changes |= split_by_tensor(run, change)
        return Detected(self.table, changes, self.digest, self.shards)

    def advance(self, detected: Detected) -> None:
        """Move the snapshot to the view after `detected`: it is durable."""
        for index, change in detected.changes.items():
            held = integers(self._held[index])
            at = torch.from_numpy(change.indices).to(held.device)
            held[at] = torch.from_numpy(change.new.view(_NUMPY_INTEGERS[change.new.itemsize])).to(held.device)
        self.digest = detected.digest

    def audit(self) -> None:
        """Nothing to do: every detection compares all weights."""

    def close(self) -> None:
        """Nothing to do: there are no hooks."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The snapshot by name, in checkpoint shapes, if this process owns all. Not copies: do not write to them."""
        return {spec.name: held.view(spec.shape) for spec, held in zip(self.table, self._held, strict=True)}

    def part(self, index: int) -> torch.Tensor:
        """The elements of one tensor that this process owns, flat. Not a copy: do not write to it."""
        return self._held[index]

    def _cast(self, start: int, run: ElementRun) -> torch.Tensor:
        """The published view of a run of a live tensor's elements, flat. It may share the live tensor's memory."""
        first, size = run.indices[0], int(run.stops[-1])
        owned = local_part(row_of(self._live[first])[0])
        if size < owned.numel():  # else cast in its shape: torch rounds the NaN of a scalar differently in another
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


def _parts(copies: Sequence[torch.Tensor], runs: Sequence[ElementRun]) -> list[torch.Tensor]:
    """Copies of runs as views for each tensor in them, by table index."""
    parts = {}
    for copy, run in zip(copies, runs, strict=True):
        for index, start, stop in zip(run.indices, run.starts, run.stops, strict=True):
            parts[index] = copy[start:stop]
    return [parts[index] for index in sorted(parts)]
