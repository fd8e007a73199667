"""What a sliced detector records in optimizer steps, in main memory or wherever weights have no faster way.

Before the update of some parameters their published view is copied, and afterwards it is compared and dropped. Changes
of several steps are composed; elements that return to their old bits disappear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hubsync.format.digest import DigestList
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import TORCH_DTYPES, bits_of, integers_of, round_into, rounded_changes
from hubsync.publish.view.cast import cast, integers
from hubsync.publish.view.strided import ElementRun, row_of, whole_of

from .changes import Change, OnDevice, PendingChanges, TensorDigests, compare, compose_all, split_by_tensor
from .lost_updates import LostUpdates
from .stepping import BUCKET

_SMALL = 1 << 12  # elements of tensors whose lists are not worth a copy


@dataclass(frozen=True)
class Recorded:
    """Changes since the last durable version, and the digests of live tensors, by table index.

    Attributes:
        changes: changes on the CPU.
        on_device: changes on a GPU, of other tensors.
        indices: int64[n], the recorded tensors.
        after: uint64[n, 2], digests of the live tensors.
        expected: uint64[n, 2], what they should be: the digests before, and the changes.
    """

    changes: dict[int, Change]
    on_device: OnDevice | None
    indices: np.ndarray
    after: np.ndarray
    expected: np.ndarray


class Recorder(Protocol):
    """Records the changes of some tensors in optimizer steps.

    Attributes:
        bucket: elements that are updated together.
        outgrown: table indices of tensors whose recorded changes take more memory than a copy would.
    """

    bucket: int
    outgrown: set[int]

    def follow(self, live: Sequence[torch.Tensor], left_out: set[int]) -> None:
        """Record these live tensors from now on, by table index, apart from some."""

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        """The recorded tensors, int64[n], and the digests of the live ones, uint64[n, 2]."""

    def begin(self) -> None:
        """Start what `collect` needs of the tensors that are followed, without waiting for it."""

    def step(self) -> AbstractContextManager[None]:
        """Around a whole step."""

    def update(self, parameters: list[torch.Tensor]) -> AbstractContextManager[None]:
        """Around the update of these parameters."""

    def collect(self, before: DigestList) -> Recorded:
        """All changes since `advance`. `before`: the digests then."""

    def advance(self) -> None:
        """What was collected last is durable."""

    def restorer(self) -> Callable[[int], torch.Tensor]:
        """Makes clones of live tensors, flat, as they were at the last `advance`."""


class HostRecorder:
    """Changes as lists on the CPU, whatever device the weights are on.

    Args:
        table: the tensor table.
        bucket: elements that are updated together.
    """

    _submitted: dict[int, Change]  # collected last, by table index
    _pending: PendingChanges  # since then, by number, in the elements of live tensors
    _number: dict[int, int]  # id of a live tensor -> its number, the table index of the first published tensor in it
    _runs: dict[int, ElementRun]  # number of a live tensor -> the published tensors in it

    def __init__(self, table: TensorTable, bucket: int = BUCKET):
        self.bucket = bucket
        self.outgrown: set[int] = set()
        self._table = table
        self._dtypes = [TORCH_DTYPES[spec.dtype] for spec in table]
        self._of = TensorDigests(table)
        self._scratch = torch.empty(0, dtype=torch.bfloat16, device="cpu")
        self._lost = LostUpdates()
        self._submitted = {}
        self._pending = PendingChanges()

    def follow(self, live: Sequence[torch.Tensor], left_out: set[int]) -> None:
        self._live = live
        self._left_out = left_out
        self.outgrown -= left_out
        self._number = {}
        runs: dict[int, list[tuple[int, int, int]]] = {}
        for index, (spec, tensor) in enumerate(zip(self._table, live, strict=True)):
            number = self._number.setdefault(id(whole_of(tensor)), index)
            _, start = row_of(tensor)
            runs.setdefault(number, []).append((index, start, start + spec.numel))
        self._runs = {number: ElementRun.of(parts) for number, parts in runs.items()}
        self._number = {
            identity: number
            for identity, number in self._number.items()
            if any(index not in left_out for index in self._runs[number].indices)
        }
        self._pending.keep(self._number.values())

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        indices = [index for index in range(len(self._table)) if index not in self._left_out]
        digests = DigestList.of(self._of.of(index, self._view(index)) for index in indices)
        return np.array(indices, np.int64), digests.lanes

    def begin(self) -> None:
        """Nothing: the CPU would wait for it."""

    @contextmanager
    def step(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._scratch = self._scratch[:0].clone()
            self._lost.report()

    @contextmanager
    def update(self, parameters: list[torch.Tensor]) -> Iterator[None]:
        """Copy the view of these parameters, and record its changes after the update."""
        watched = [(self._number[id(p)], p) for p in parameters if p.grad is not None and id(p) in self._number]
        old = self._copy_views(watched)
        try:
            yield
        finally:
            for (number, parameter), before in zip(watched, old, strict=True):
                change = _changes_since(before, parameter, self._dtypes[number])
                self._count_lost(parameter, change)
                self._pending.add(number, change)
                if 4 * self._pending.length(number) > max(parameter.numel(), _SMALL):  # 12 bytes each, 3 an element
                    self.outgrown.update(self._runs[number].indices)

    def collect(self, before: DigestList) -> Recorded:
        submitted = compose_all(self._submitted, self._by_tensor(self._pending.collect()))
        pending = PendingChanges()
        # One statement without a call: a KeyboardInterrupt finds both attributes changed, or none.
        self._submitted, self._pending = submitted, pending
        changes = {index: change for index, change in submitted.items() if index not in self._left_out}
        indices, after = self.digests()
        expected = DigestList.of(self._of.after(index, before[index], changes.get(index)) for index in indices.tolist())
        return Recorded(changes, None, indices, after, expected.lanes)

    def advance(self) -> None:
        self._submitted = {}

    def restorer(self) -> Callable[[int], torch.Tensor]:
        later = compose_all(self._submitted, self._by_tensor(self._pending.collect()))

        def restored(index: int) -> torch.Tensor:
            tensor = self._view(index).clone()
            if index in later:
                _write(tensor, later[index].indices, later[index].old)
            return tensor

        return restored

    def _copy_views(self, watched: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        needed = sum(parameter.numel() for _, parameter in watched)
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.bfloat16, device="cpu")
        old, start = [], 0
        for number, parameter in watched:
            stop = start + parameter.numel()
            old.append(_copy_view(parameter, self._dtypes[number], self._scratch[start:stop]))
            start = stop
        return old

    def _count_lost(self, parameter: torch.Tensor, change: Change) -> None:
        if self._lost.is_reported or parameter.element_size() > 2:
            return
        if change.new.itemsize != parameter.element_size() or parameter.grad is None or parameter.grad.is_sparse:
            return
        self._lost.count(int(torch.count_nonzero(parameter.grad)), len(change.indices))

    def _by_tensor(self, changes: dict[int, Change]) -> dict[int, Change]:
        """Changes of live tensors by number, as changes of the published tensors in them."""
        found: dict[int, Change] = {}
        for number, change in changes.items():
            found |= split_by_tensor(self._runs[number], change)
        return found

    def _view(self, index: int) -> torch.Tensor:
        return cast(self._live[index], self._dtypes[index])


def _copy_view(parameter: torch.Tensor, dtype: torch.dtype, scratch: torch.Tensor) -> torch.Tensor:
    """A copy of the published view, flat; in `scratch` (bfloat16[numel], on the CPU) if dtype and device match."""
    if _is_rounded_here(parameter, dtype) and round_into(bits_of(scratch), bits_of(parameter)):
        return scratch
    if dtype == scratch.dtype and parameter.device == scratch.device:
        return scratch.copy_(cast(parameter, dtype))  # cast in its shape: torch rounds a NaN differently in another
    return parameter.detach().to(dtype, copy=True).contiguous().view(-1)


def _changes_since(old: torch.Tensor, parameter: torch.Tensor, dtype: torch.dtype) -> Change:
    if _is_rounded_here(parameter, dtype):
        found = rounded_changes(bits_of(parameter), bits_of(old))
        if found is not None:
            indices, new = found
            return Change(indices, bits_of(old)[indices], new)
    return compare(old, cast(parameter, dtype))


def _is_rounded_here(parameter: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `kernels.bits` does this cast; torch does all others."""
    on_cpu = parameter.device.type == "cpu" and parameter.is_contiguous()
    return on_cpu and parameter.dtype == torch.float32 and dtype == torch.bfloat16


def _write(flat: torch.Tensor, indices: np.ndarray, patterns: np.ndarray) -> None:
    held = integers(flat)
    held[torch.from_numpy(indices).to(flat.device)] = integers_of(patterns).to(flat.device)
