"""Detection by comparison with a copy of the last durable view.

Changes are found by comparing bits, never by reading gradients or optimizer states. So they are right whatever moved
the weights. The copy is proved too: its digest after the changes must be that of the live weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from hubsync.format.digest import Digest
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import TORCH_DTYPES, bits_of, integers_of
from hubsync.publish.view.cast import integers
from hubsync.publish.view.live import require_same_table
from hubsync.publish.view.shards import Shard, local_part, require_held
from hubsync.publish.view.strided import ElementRun, element_runs, row_of

from .changes import Change, Detected, TensorDigests, compare, in_order, split_by_tensor

logger = logging.getLogger(__name__)

DAMAGED = "the copy of %s that changes are detected against was written to: publishing its new values"


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
        self._shards = shards
        self._live = [tensors[spec.name] for spec in table]
        self._on_cpu = device == "cpu"
        self._dtypes = [TORCH_DTYPES[spec.dtype] for spec in table]
        self._runs = element_runs(self._live, self.shards, self._dtypes)
        self._copies = [self._cast(self._held_of(start, run), run).clone() for start, run in self._runs]
        self._held = _parts(self._copies, [run for _, run in self._runs])
        self._of = TensorDigests(table, shards)
        self.digests = [self._of.of(index, held) for index, held in enumerate(self._held)]

    @property
    def digest(self) -> Digest:
        return sum(self.digests, Digest())

    def begin(self) -> None:
        """Nothing: tensors are read one by one."""

    def follow(self, tensors: dict[str, torch.Tensor]) -> None:
        """Watch these live tensors from now on. ConfigError unless they have the names and shapes of the table."""
        require_same_table(self.table, tensors)
        for spec, shard in zip(self.table, self.shards, strict=True):
            require_held(spec.name, tensors[spec.name], shard.boxes)
        self._live = [tensors[spec.name] for spec in self.table]

    def detect(self) -> Detected:
        """Compare the live tensors with the snapshot. Needs memory for one cast run of elements, and O(changes)."""
        changes: dict[int, Change] = {}
        values: dict[int, np.ndarray] = {}
        after = list(self.digests)
        for (start, run), copy in zip(self._runs, self._copies, strict=True):
            live = self._captured(start, run, copy)
            found = split_by_tensor(run, compare(copy, live))
            for index, begin, end in zip(run.indices, run.starts, run.stops, strict=True):
                owned = live[begin:end]
                after[index] = self._of.of(index, owned)
                if after[index] == self._of.after(index, self.digests[index], found.get(index)):
                    continue
                logger.warning(DAMAGED, self.table[index].name)
                found.pop(index, None)
                values[index] = bits_of(owned.cpu())
            changes |= found
        return Detected(changes, values, self.digests, after, self._shards)

    def advance(self, detected: Detected) -> None:
        """Move the snapshot to the view after `detected`: it is durable."""
        for index, change in detected.changes.items():
            held = integers(self._held[index])
            held[torch.from_numpy(change.indices).to(held.device)] = integers_of(change.new).to(held.device)
        for index, patterns in detected.values.items():
            integers(self._held[index]).copy_(integers_of(patterns))
        self.digests = list(detected.after)

    def hold(self, view: Sequence[torch.Tensor], digests: Sequence[Digest]) -> None:
        """Let this be the last durable view: the owned elements of each tensor, flat, and their digests."""
        for held, tensor in zip(self._held, view, strict=True):
            held.copy_(tensor)
        self.digests = list(digests)

    def close(self) -> None:
        """Nothing to do: there are no hooks."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The snapshot by name, in checkpoint shapes, if this process owns all. Do not write to them."""
        return {
            spec.name: in_order(held, shard).view(spec.shape)
            for spec, held, shard in zip(self.table, self._held, self.shards, strict=True)
        }

    def part(self, index: int) -> torch.Tensor:
        """The elements of one tensor that this process owns, flat. Not a copy: do not write to it."""
        return self._held[index]

    def _held_of(self, start: int, run: ElementRun) -> torch.Tensor:
        """A run of a live tensor's elements, in the live tensor's memory where it is held in one piece."""
        size = int(run.stops[-1])
        held = local_part(row_of(self._live[run.indices[0]])[0])
        if size < held.numel():  # else cast in its shape: torch rounds the NaN of a scalar differently in another
            return held.reshape(-1)[start : start + size]
        return held

    def _cast(self, held: torch.Tensor, run: ElementRun) -> torch.Tensor:
        """The published view of a run, flat. It may share the live tensor's memory."""
        view = held.to(self._dtypes[run.indices[0]])
        return (view.cpu() if self._on_cpu else view).contiguous().view(-1)

    def _captured(self, start: int, run: ElementRun, copy: torch.Tensor) -> torch.Tensor:
        """The published view of a run now, on the device of its copy. Later writes to live tensors do not change it."""
        held = self._held_of(start, run)
        view = self._cast(held, run).to(copy.device)  # a model may move to another device
        return view.clone() if view.untyped_storage().data_ptr() == held.untyped_storage().data_ptr() else view


def _parts(copies: Sequence[torch.Tensor], runs: Sequence[ElementRun]) -> list[torch.Tensor]:
    """Copies of runs as views for each tensor in them, by table index."""
    parts = {}
    for copy, run in zip(copies, runs, strict=True):
        for index, start, stop in zip(run.indices, run.starts, run.stops, strict=True):
            parts[index] = copy[start:stop]
    return [parts[index] for index in sorted(parts)]
