"""A patch whose changes stay on a GPU, in one list over all tensors. `codec.encode` encodes it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hubsync.errors import FormatError
from hubsync.kernels.bits import difference

from .patch import Patch, TensorDelta, TensorValues
from .table import TensorTable

TENSOR, FIRST, COUNT, OFFSET = range(4)  # columns of `DevicePatch.spans`


@dataclass(frozen=True, eq=False)
class DevicePatch(Mapping[int, TensorDelta | TensorValues]):
    """Changes of 16-bit tensors on a device, and a patch of other tensors. Usable wherever a `Patch` is read.

    As a mapping it copies all changes to the host, once. Tensors are read on the current stream of the calling thread:
    who made them on another one lets it wait for that.

    Attributes:
        numbers: int64[n] on the device, strictly ascending: the number of each changed element.
        old, new: int16[n] on the device: its bit patterns. They differ everywhere.
        spans: int64[S, 4] on the host: which elements have which numbers. A row is (table index, number of the first
            element, elements, flat index of the first element in the tensor). Spans share no numbers; a tensor has one
            span at most, which may be a part of it. Most spans may have no changes. Numbers in no span are ignored.
        host: changes or new values of other tensors.
    """

    numbers: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor
    spans: np.ndarray
    host: Patch

    def __getitem__(self, index: int) -> TensorDelta | TensorValues:
        return self._on_host[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._on_host)

    def __len__(self) -> int:
        return len(self._on_host)

    def check(self, table: TensorTable) -> None:
        """Raise FormatError unless the spans fit this table. The list itself is sound by construction.

        Detection lists elements in ascending order, and only where the patterns differ: to check that again would need
        a pass over all changes.
        """
        index, first, count, offset = self.spans.T
        if len(np.unique(index)) < len(index) or np.any((index < 0) | (index >= len(table))):
            raise FormatError(f"patch: a tensor on the device occurs twice, or is not in a table of {len(table)}")
        if np.any((first < 0) | (count < 0) | (offset < 0) | (offset + count > table.columns.numel[index])):
            raise FormatError("patch: the elements of a tensor on the device lie outside it")
        for row in np.flatnonzero(table.columns.width[index] != 16):
            spec = table[int(index[row])]
            raise FormatError(f"patch: {spec.name} ({spec.dtype}) cannot be on the device: it is not of 16 bits")
        for both in set(self.host).intersection(index.tolist()):
            raise FormatError(f"patch: {table[both].name} is both on the device and on the host")

    def deltas(self, indices: Sequence[int]) -> dict[int, TensorDelta]:
        """The changes of these tensors, copied to the host. Tensors without changes are left out."""
        spans = self.spans[np.isin(self.spans[:, TENSOR], indices)]
        edges = torch.from_numpy(np.stack([spans[:, FIRST], spans[:, FIRST] + spans[:, COUNT]]))
        bounds = torch.searchsorted(self.numbers, edges.to(self.numbers.device)).cpu().numpy()
        numbers, diffs = self.listed(bounds[0], bounds[1])
        stops = np.cumsum(bounds[1] - bounds[0])
        out = {}
        for span, start, stop in zip(spans.tolist(), (stops - (bounds[1] - bounds[0])).tolist(), stops, strict=True):
            if stop > start:
                own = slice(start, int(stop))
                out[span[TENSOR]] = TensorDelta(numbers[own] - (span[FIRST] - span[OFFSET]), diffs[own])
        return dict(sorted(out.items()))

    def listed(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (int64) and differences (int16) in the ranges `starts .. stops` of the list, one after the other."""
        counts = stops - starts
        at = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        index = torch.from_numpy(at).to(self.numbers.device)
        old, new = (side[index].cpu().numpy().view(np.uint16) for side in (self.old, self.new))
        return self.numbers[index].cpu().numpy(), difference(old, new)

    @cached_property
    def _on_host(self) -> Patch:
        return dict(sorted({**self.deltas(self.spans[:, TENSOR].tolist()), **self.host}.items()))
