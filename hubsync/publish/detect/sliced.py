"""Exact detection without a copy of the model: a parameter's old weights exist until its own update.

The optimizer steps a few parameters at a time. Before each such update their published view is copied, and afterwards
it is compared and dropped. Changes of several steps are composed; elements that return to their old bits disappear. So
this detector holds only changes, and the memory for one bucket of parameters or for the largest parameter.

Writes to weights outside of these steps are not observed: by another optimizer, through `.data`, by a replaced tensor.
Each detection finds them: the digest of every live tensor must be the one after its changes. A tensor that deviates is
published with new values instead of changes. If it deviates again, a copy of it is kept from then on, and changes are
found by comparison.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from hubsync.errors import ChainError
from hubsync.format.digest import Digest
from hubsync.format.table import TensorTable
from hubsync.kernels import rounding
from hubsync.kernels.bits import TORCH_DTYPES, bits_of, integers_of
from hubsync.publish.view.cast import cast, integers
from hubsync.publish.view.live import require_same_table
from hubsync.publish.view.strided import ElementRun, row_of, whole_of

from .changes import Change, Detected, PendingChanges, TensorDigests, compare, compose_all, split_by_tensor
from .snapshot import Snapshot
from .stepping import BUCKET, SlicedSteps

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


class Sliced:
    """Records the changes of optimizer steps as they happen.

    Args:
        tensors: the live tensors, from `published_tensors`.
        table: their table.
        optimizer: a torch optimizer for which `why_not_sliced` returns None. Its `step` is replaced until `close`.
        bucket: elements stepped together.
    """

    holds_old = False  # no weights to encode compact deltas against
    _submitted: dict[int, Change]  # returned by the last detection, by table index
    _pending: PendingChanges  # since then, by number, in the elements of live tensors
    _number: dict[int, int]  # id of a live tensor -> its number, the table index of the first published tensor in it
    _runs: dict[int, ElementRun]  # number of a live tensor -> the published tensors in it

    def __init__(self, tensors: Tensors, table: TensorTable, optimizer: torch.optim.Optimizer, bucket: int = BUCKET):
        self.table = table
        self._dtypes = [TORCH_DTYPES[spec.dtype] for spec in table]
        self._weights = threading.RLock()  # held during steps, and while weights are read
        self._scratch = torch.empty(0, dtype=torch.bfloat16, device="cpu")
        self._lost = _LostUpdates()
        self._submitted = {}
        self._pending = PendingChanges()
        self._live = [tensors[spec.name] for spec in table]
        self._copied = _CopiedTensors(table)
        self._index_live()
        self._of = TensorDigests(table)
        self.digests = [self._of.of(index, self._view(index)) for index in range(len(table))]
        # No optimizer updates buffers, and they are small: they are compared with a copy.
        self._copied.add(self._copies_of([index for index in range(len(table)) if not self._is_parameter(index)]))
        self._deviated: set[int] = set()  # tensors that a publish found written to outside of steps
        self._candidate: Snapshot | None = None  # copies to keep once the new values are durable
        self._steps = SlicedSteps(optimizer, self, bucket)

    @property
    def digest(self) -> Digest:
        return sum(self.digests, Digest())

    # --- called by the publisher -----------------------------------------------------------------------

    def follow(self, tensors: Tensors) -> None:
        """Watch these live tensors from now on. ConfigError unless they have the names and shapes of the table."""
        require_same_table(self.table, tensors)
        with self._weights:
            self._live = [tensors[spec.name] for spec in self.table]
            self._index_live()
            self._copied.follow(tensors)

    def detect(self) -> Detected:
        """All changes since the view of `digest`, on the CPU, proved by the digests of all live tensors."""
        with self._weights:
            submitted = compose_all(self._submitted, self._by_tensor(self._pending.collect()))
            pending = PendingChanges()
            # One statement without a call: a KeyboardInterrupt finds both attributes changed, or none.
            self._submitted, self._pending = submitted, pending
            self._candidate = None
            copied = self._copied.detect()
            changes = {index: change for index, change in submitted.items() if index not in copied.after}
            after = [
                copied.after[index] if index in copied.after else self._of.of(index, self._view(index))
                for index in range(len(self.table))
            ]
            deviating = [
                index
                for index, digest in enumerate(after)
                if index not in copied.after
                and digest != self._of.after(index, self.digests[index], changes.get(index))
            ]
            values = dict(copied.values)
            if deviating:
                values |= self._new_values(deviating, after)
            changes = {index: change for index, change in changes.items() if index not in values} | copied.changes
            return Detected(changes, values, self.digests, after)

    def advance(self, detected: Detected) -> None:
        """Count changes from the view after the last `detected`: it is durable."""
        with self._weights:
            self._submitted = {}
            self._copied.advance(detected)
            if self._candidate is not None:
                self._copied.add(self._candidate)
                self._candidate = None
                self._index_live()
            self.digests = list(detected.after)

    def tensors(self) -> Tensors:
        """The view of `digest` by name: a clone of the live view with the changes since then undone.

        ChainError if weights were written outside of the optimizer's steps, so that the view cannot be restored.
        """
        view = {}
        with self._weights:
            later = compose_all(self._submitted, self._by_tensor(self._pending.collect()))
            held = self._copied.tensors()
            for index, spec in enumerate(self.table):
                if spec.name in held:
                    view[spec.name] = held[spec.name].clone()
                    continue
                tensor = self._view(index).clone()
                if index in later:
                    _write(tensor, later[index].indices, later[index].old)
                if self._of.of(index, tensor) != self.digests[index]:
                    raise ChainError(
                        f"{spec.name} was written outside of the optimizer's steps, so the last published view cannot "
                        "be restored: publish first"
                    )
                view[spec.name] = tensor.view(spec.shape)
        return view

    def close(self) -> None:
        """Restore the optimizer's own step."""
        self._steps.undo()

    # --- called by steps ----------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._weights:
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
                self._lost.count(parameter, change)
                self._pending.add(number, change)

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

    # --- writes outside of steps ----------------------------------------------------------------------

    def _new_values(self, deviating: list[int], after: list[Digest]) -> dict[int, np.ndarray]:
        """New values of tensors whose changes are not known. Sets their digests in `after`."""
        again = [index for index in deviating if index in self._deviated]
        first = [index for index in deviating if index not in self._deviated]
        self._deviated |= set(first)
        self._candidate = self._copies_of(again)
        size = sum(self.table[index].nbytes for index in deviating) / 1e6
        logger.warning(
            "%s and %d other tensors were written outside of the observed optimizer's steps: publishing their new "
            "values (%.1f MB)%s",
            self.table[deviating[0]].name,
            len(deviating) - 1,
            size,
            ". It is not the first time, so a copy of them is kept from now on" if again else "",
        )
        values = {}
        for indices, copies in ((again, self._candidate), (first, self._copies_of(first))):
            for number, index in enumerate(indices):
                assert copies is not None
                after[index] = copies.digests[number]
                values[index] = bits_of(copies.part(number).cpu())
        return values

    def _copies_of(self, indices: list[int]) -> Snapshot | None:
        if not indices:
            return None
        table = TensorTable([self.table[index] for index in indices])
        return Snapshot({self.table[index].name: self._live[index] for index in indices}, table)

    def _is_parameter(self, index: int) -> bool:
        return isinstance(whole_of(self._live[index]), torch.nn.Parameter)

    def _index_live(self) -> None:
        self._number = {}
        runs: dict[int, list[tuple[int, int, int]]] = {}
        for index, (spec, tensor) in enumerate(zip(self.table, self._live, strict=True)):
            number = self._number.setdefault(id(whole_of(tensor)), index)
            _, start = row_of(tensor)
            runs.setdefault(number, []).append((index, start, start + spec.numel))
        self._runs = {number: ElementRun.of(parts) for number, parts in runs.items()}
        compared = self._copied.indices
        self._number = {
            identity: number
            for identity, number in self._number.items()
            if any(index not in compared for index in self._runs[number].indices)
        }

    def _by_tensor(self, changes: dict[int, Change]) -> dict[int, Change]:
        """Changes of live tensors by number, as changes of the published tensors in them."""
        found: dict[int, Change] = {}
        for number, change in changes.items():
            found |= split_by_tensor(self._runs[number], change)
        return found

    def _view(self, index: int) -> torch.Tensor:
        return cast(self._live[index], self._dtypes[index])


class _CopiedTensors:
    """Tensors that are compared with a copy, some at a time."""

    def __init__(self, table: TensorTable):
        self._table = table
        self._snapshots: list[tuple[list[int], Snapshot]] = []

    def add(self, snapshot: Snapshot | None) -> None:
        if snapshot is not None:
            self._snapshots.append(([self._table.index_of(spec.name) for spec in snapshot.table], snapshot))

    @property
    def indices(self) -> set[int]:
        return {index for indices, _ in self._snapshots for index in indices}

    def follow(self, tensors: Tensors) -> None:
        for _, snapshot in self._snapshots:
            snapshot.follow({spec.name: tensors[spec.name] for spec in snapshot.table})

    def detect(self) -> _FoundByCopy:
        found = _FoundByCopy({}, {}, {})
        for indices, snapshot in self._snapshots:
            detected = snapshot.detect()
            found.changes.update({indices[own]: change for own, change in detected.changes.items()})
            found.values.update({indices[own]: patterns for own, patterns in detected.values.items()})
            found.after.update(zip(indices, detected.after, strict=True))
        return found

    def advance(self, detected: Detected) -> None:
        for indices, snapshot in self._snapshots:
            snapshot.advance(
                Detected(
                    {own: detected.changes[index] for own, index in enumerate(indices) if index in detected.changes},
                    {own: detected.values[index] for own, index in enumerate(indices) if index in detected.values},
                    snapshot.digests,
                    [detected.after[index] for index in indices],
                )
            )

    def tensors(self) -> Tensors:
        return {name: held for _, snapshot in self._snapshots for name, held in snapshot.tensors().items()}


@dataclass(frozen=True)
class _FoundByCopy:
    """As in `Detected`, for the copied tensors. `after` has a digest for each of them."""

    changes: dict[int, Change]
    values: dict[int, np.ndarray]
    after: dict[int, Digest]


class _LostUpdates:
    """Reports once which share of the first step's updates was lost to rounding in the parameters' own dtype."""

    def __init__(self) -> None:
        self._expected = self._moved = 0
        self._reported = False

    def count(self, parameter: torch.Tensor, change: Change) -> None:
        if self._reported or parameter.element_size() > 2 or change.new.itemsize != parameter.element_size():
            return
        if parameter.grad is not None and not parameter.grad.is_sparse:
            self._expected += int(torch.count_nonzero(parameter.grad))
            self._moved += len(change.indices)

    def report(self) -> None:
        if self._reported or self._moved == 0:  # a skipped step, or a learning rate that starts at zero
            return
        self._reported = True
        lost = 1 - self._moved / max(self._expected, self._moved)
        logger.warning(
            "the first step left %.1f %% of the parameters with a gradient unchanged: their updates are smaller than "
            "half a unit in the last place, and lost",
            100 * lost,
        )


def _copy_view(parameter: torch.Tensor, dtype: torch.dtype, scratch: torch.Tensor) -> torch.Tensor:
    """A copy of the published view, flat; in `scratch` (bfloat16[numel], on the CPU) if dtype and device match."""
    if _is_rounded_here(parameter, dtype) and rounding.round_into(bits_of(scratch), bits_of(parameter)):
        return scratch
    if dtype == scratch.dtype and parameter.device == scratch.device:
        return scratch.copy_(cast(parameter, dtype))  # cast in its shape: torch rounds a NaN differently in another
    return parameter.detach().to(dtype, copy=True).contiguous().view(-1)


def _changes_since(old: torch.Tensor, parameter: torch.Tensor, dtype: torch.dtype) -> Change:
    if _is_rounded_here(parameter, dtype):
        found = rounding.changes(bits_of(parameter), bits_of(old))
        if found is not None:
            indices, new = found
            return Change(indices, bits_of(old)[indices], new)
    return compare(old, cast(parameter, dtype))


def _is_rounded_here(parameter: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `kernels.rounding` does this cast; torch does all others."""
    on_cpu = parameter.device.type == "cpu" and parameter.is_contiguous()
    return on_cpu and parameter.dtype == torch.float32 and dtype == torch.bfloat16


def _write(flat: torch.Tensor, indices: np.ndarray, patterns: np.ndarray) -> None:
    held = integers(flat)
    held[torch.from_numpy(indices).to(flat.device)] = integers_of(patterns).to(flat.device)
