"""Detection by comparison with a copy, on a GPU: all tensors in one launch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hubsync.format.digest import Digest, DigestList
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import TORCH_DTYPES, bits_of, integers_of
from hubsync.kernels.gpu.listing import ChangeList
from hubsync.publish.view.live import require_same_table
from hubsync.publish.view.shards import Shard, local_part, require_held

from .changes import Detected, in_order
from .copied import CopiedTensors, Tensors
from .device_live import DeviceLive
from .device_warmup import compile_in_background
from .snapshot import DAMAGED, Snapshot

logger = logging.getLogger(__name__)

_TOGETHER = 1 << 30  # elements compared together: bounds the memory for their marks


class DeviceSnapshot:
    """A copy of the last durable view on the GPU, and its digest. As `Snapshot`, which holds what it cannot.

    Memory: 2 bytes for each element, an eighth of a byte more, and 8 bytes for each change of the largest publish.

    Args:
        tensors: the live tensors, from `published_tensors`.
        table: their table.
        copied: table indices of tensors for which `why_not_listed` has a reason.
        shards: table index -> the elements of the tensor that this process owns; default is all.
    """

    holds_old = True

    def __init__(
        self, tensors: Tensors, table: TensorTable, copied: frozenset[int], shards: Sequence[Shard] | None = None
    ):
        self.table = table
        self._shards = shards
        live = [tensors[spec.name] for spec in table]
        indices = [index for index in range(len(table)) if index not in copied]
        self._live = DeviceLive(table, live, indices, shards=shards)
        self._list = ChangeList(self._live.numbering)
        held = local_part(self._live.wholes[0])
        compile_in_background(held.device, held.dtype, self._live.dtypes[0], fused=False, holds_old=True)
        with self._live.readable():
            self._copies = self._list.save([(0, self._live.numbering.tiles)])
        self._rows = {index: row for row, index in enumerate(indices)}
        self._others = CopiedTensors(table)
        self._others.add(self._host(tensors, sorted(copied)))
        self.digests = self._in_order(self._live.lanes(), self._others.digests())

    @property
    def digest(self) -> Digest:
        return self.digests.total

    def begin(self) -> None:
        self._live.begin()

    def follow(self, tensors: Tensors) -> None:
        """Watch these live tensors from now on. ConfigError unless they have the names and shapes of the table."""
        require_same_table(self.table, tensors)
        if self._shards is not None:
            for spec, shard in zip(self.table, self._shards, strict=True):
                require_held(spec.name, tensors[spec.name], shard.boxes)
        self._live.follow([tensors[spec.name] for spec in self.table])
        self._others.follow(tensors)

    def detect(self) -> Detected:
        """Compare the live tensors with the copy. Needs memory for O(changes)."""
        with self._live.readable():
            self._compare()
            if not self._list.is_complete():
                self._compare()  # now it has room
            found, after, added = self._live.proved(self._list.collect)
        others = self._others.detect()
        indices = found.spans[:, 0]
        written = indices[(after != self.digests.lanes[indices] + added).any(axis=1)].tolist()
        lanes = self._in_order(after, others.after)
        values = dict(others.values)
        if written:
            logger.warning(DAMAGED, self.table[written[0]].name)
            values |= self._new_values(written, lanes)
        return Detected(others.changes, values, self.digests, lanes, self._shards, on_device=found.without(written))

    def advance(self, detected: Detected) -> None:
        """Move the copy to the view after `detected`: it is durable."""
        if (found := detected.on_device) is not None:
            starts, sizes = found.spans[:, 1], found.spans[:, 2]
            if found.spans.shape == self._live.spans.shape:
                self._copies[found.numbers] = found.new
            else:  # without the changes of some tensors
                edges = torch.from_numpy(np.stack([starts, starts + sizes])).to(found.numbers.device)
                for begin, end in torch.searchsorted(found.numbers, edges).T.tolist():
                    self._copies[found.numbers[begin:end]] = found.new[begin:end]
        for index, patterns in detected.values.items():
            if index in self._rows:
                self._held(index).copy_(integers_of(patterns))
        self._others.advance(detected)
        assert isinstance(detected.after, DigestList)
        self.digests = detected.after

    def close(self) -> None:
        """Nothing to do: there are no hooks."""

    def tensors(self) -> Tensors:
        """The copy by name, in checkpoint shapes, if this process owns all. Do not write to them."""
        shards = self._shards or [Shard.whole(spec.shape) for spec in self.table]
        return {
            spec.name: in_order(self.part(index), shards[index]).view(spec.shape)
            for index, spec in enumerate(self.table)
        }

    def part(self, index: int) -> torch.Tensor:
        """The elements of one tensor that this process owns, flat. Not a copy: do not write to it."""
        if index in self._rows:
            return self._held(index).view(TORCH_DTYPES[self.table[index].dtype])
        return self._others.part(index)

    def _compare(self) -> None:
        """List the elements of live tensors that differ from the copy."""
        self._list.begin()
        self._list.clear()
        for first, end in self._pieces():
            self._list.compare([(first, end)], self._copies[first * self._tile : end * self._tile])
        self._list.end()

    @property
    def _tile(self) -> int:
        return self._live.numbering.tile

    def _held(self, index: int) -> torch.Tensor:
        _, first, size, _ = self._live.spans[self._rows[index]].tolist()
        return self._copies[first : first + size]

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """All tiles, some at a time."""
        together = max(1, _TOGETHER // self._tile)
        for first in range(0, self._live.numbering.tiles, together):
            yield first, min(first + together, self._live.numbering.tiles)

    def _host(self, tensors: Tensors, indices: list[int]) -> Snapshot | None:
        if not indices:
            return None
        table = TensorTable([self.table[index] for index in indices])
        shards = None if self._shards is None else [self._shards[index] for index in indices]
        return Snapshot({spec.name: tensors[spec.name] for spec in table}, table, shards=shards)

    def _new_values(self, indices: list[int], lanes: DigestList) -> dict[int, np.ndarray]:
        """Values of tensors whose copies were written to. Sets their digests in `lanes`."""
        tensors = {spec.name: tensor for spec, tensor in zip(self.table, self._live.tensors, strict=True)}
        copies = self._host(tensors, indices)
        assert copies is not None
        values = {}
        for number, index in enumerate(indices):
            lanes.lanes[index] = copies.digests[number].a, copies.digests[number].b
            values[index] = bits_of(copies.part(number).cpu())
        return values

    def _in_order(self, lanes: np.ndarray, others: dict[int, Digest]) -> DigestList:
        found = np.zeros((len(self.table), 2), np.uint64)
        found[self._live.spans[:, 0]] = lanes
        for index, digest in others.items():
            found[index] = digest.a, digest.b
        return DigestList(found)
