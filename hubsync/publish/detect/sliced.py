"""Exact detection without a copy of the model: a parameter's old weights exist until its own update.

The optimizer steps a few parameters at a time. Before each such update their published view is copied, and afterwards
it is compared and dropped. Changes of several steps are composed; elements that return to their old bits disappear. So
this detector holds only changes, and the memory for one bucket of parameters or for the largest parameter.

Writes to weights outside of a step are not observed. Three checks detect them: torch's version counters of tensors,
replaced tensors, and a digest of all live weights, recomputed now and then and compared with the digest after the
changes. If a check fails, detection restarts: `digest` is then the one of the live weights. It differs from the run's,
so the publisher uploads the whole model.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hubsync.errors import ChainError
from hubsync.format.digest import Digest, digest_torch, tensor_seed
from hubsync.format.table import TensorTable
from hubsync.kernels import rounding
from hubsync.kernels.bits import TORCH_DTYPES, bits_of
from hubsync.publish.view.cast import cast, integers
from hubsync.publish.view.live import require_same_table
from hubsync.publish.view.strided import ElementRun, row_of, whole_of

from .changes import Change, Detected, PendingChanges, compare, compose_all, split_by_tensor
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
        audit_every: recompute the digest of all live weights at every n-th detection; 0 for the first one and `audit`
            only.
        bucket: elements stepped together.
    """

    holds_old = False  # no weights to encode compact deltas against
    digest: Digest
    _submitted: dict[int, Change]  # returned by the last detection, by table index
    _pending: PendingChanges  # since then, by number, in the elements of live tensors
    _number: dict[int, int]  # id of a live tensor -> its number, the table index of the first published tensor in it
    _runs: dict[int, ElementRun]  # number of a live tensor -> the published tensors in it
    _buffers: Snapshot
    _moved_buffers: Detected

    def __init__(
        self,
        tensors: Tensors,
        table: TensorTable,
        optimizer: torch.optim.Optimizer,
        audit_every: int = 0,
        bucket: int = BUCKET,
    ):
        self.table = table
        self._dtypes = [TORCH_DTYPES[spec.dtype] for spec in table]
        self._audit_every = audit_every
        self._detections = 0
        self._weights = threading.RLock()  # held during steps, and while weights are read
        self._scratch = torch.empty(0, dtype=torch.bfloat16, device="cpu")
        self._suspicion: str | None = None
        self._stepping = False
        self._lost = _LostUpdates()
        self._live = [tensors[spec.name] for spec in table]
        self._restart()
        self._steps = SlicedSteps(optimizer, self, bucket)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    # --- called by the publisher -----------------------------------------------------------------------

    def follow(self, tensors: Tensors) -> None:
        """Watch these live tensors from now on. ConfigError unless they have the names and shapes of the table."""
        require_same_table(self.table, tensors)
        with self._weights:
            live = [tensors[spec.name] for spec in self.table]
            moved = [
                spec.name
                for spec, tensor, identity in zip(self.table, live, self._identities, strict=True)
                if _identity(whole_of(tensor)) != identity
            ]
            if moved:
                self._suspect(f"{moved[0]} was replaced")
                self._live = live
                self._index_live()

    def detect(self) -> Detected:
        """All changes since the view of `digest`, on the CPU. Audits the live weights if that is due."""
        with self._weights:
            submitted = compose_all(self._submitted, self._by_tensor(self._pending.collect()))
            pending = PendingChanges()
            # One statement without a call: a KeyboardInterrupt finds both attributes changed, or none.
            self._submitted, self._pending = submitted, pending
            self._moved_buffers = self._buffers.detect()
            index_of = self.table.index_of
            buffers = {
                index_of(self._buffers.table[i].name): change for i, change in self._moved_buffers.changes.items()
            }
            detected = Detected(self.table, {**self._submitted, **buffers}, self.digest)
            self._check_versions()
            due = self._detections == 0 or (self._audit_every > 0 and self._detections % self._audit_every == 0)
            self._detections += 1
            if not due and self._suspicion is None:
                return detected
            if self._matches_live(detected.digest):
                return detected
            self._restart()
            return Detected(self.table, {}, self.digest)

    def advance(self, detected: Detected) -> None:
        """Count changes from the view after the last `detected`: it is durable."""
        digest = detected.digest
        with self._weights:
            self._submitted = {}
            self._buffers.advance(self._moved_buffers)
            self.digest = digest

    def audit(self) -> None:
        """Recompute the digest of the live weights. If changes were missed, restart: `digest` is then another."""
        self._detections = 0
        self.detect()

    def tensors(self) -> Tensors:
        """The view of `digest` by name: a clone of the live view with the changes since then undone.

        ChainError if weights were written outside of the optimizer's steps, so that the view cannot be restored.
        """
        view = {}
        with self._weights:
            later = compose_all(self._submitted, self._by_tensor(self._pending.collect()))
            for index, spec in enumerate(self.table):
                tensor = self._view(index).clone()
                if index in later:
                    _write(tensor, later[index].indices, later[index].old)
                view[spec.name] = tensor.view(spec.shape)
            view |= {name: buffer.clone() for name, buffer in self._buffers.tensors().items()}
            digest = self.digest
        if _digest_of(self.table, view) != digest:
            self._suspect("the published view cannot be restored from them")
            raise ChainError(
                "weights were written outside of the optimizer's steps, so the published view cannot be restored: the "
                "next publish uploads the whole model"
            )
        return view

    def close(self) -> None:
        """Restore the optimizer's own step."""
        self._hook.remove()
        self._steps.undo()

    # --- called by steps ----------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._weights:
            self._check_versions()  # before this step advances the counters
            self._stepping = True
            try:
                yield
            except BaseException:
                self._stepping = False
                self._suspect("a step failed halfway")
                raise
            finally:
                self._note_versions()
                self._scratch = self._scratch[:0].clone()
                self._lost.report()

    @contextmanager
    def update(self, parameters: list[torch.Tensor]) -> Iterator[None]:
        """Copy the view of these parameters, and record its changes after the update."""
        watched = [(self._number[id(p)], p) for p in parameters if p.grad is not None and id(p) in self._number]
        old = self._copied(watched)
        try:
            yield
        finally:
            for (number, parameter), before in zip(watched, old, strict=True):
                change = _changes_since(before, parameter, self._dtypes[number])
                self._lost.count(parameter, change)
                self._pending.add(number, change)

    def _after_step(self, *_: Any) -> None:
        if not self._stepping:
            self._suspect("the optimizer was stepped by an earlier step function")
        self._stepping = False

    def _copied(self, watched: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
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

    def _restart(self) -> None:
        """Count changes from the live weights."""
        self._submitted = {}
        self._pending = PendingChanges()
        self._index_live()
        buffers = {
            spec.name: tensor
            for spec, tensor in zip(self.table, self._live, strict=True)
            if not isinstance(whole_of(tensor), torch.nn.Parameter)
        }
        # No optimizer updates buffers, and they are small: they are compared with a copy.
        self._buffers = Snapshot(buffers, TensorTable([spec for spec in self.table if spec.name in buffers]))
        self._moved_buffers = self._buffers.detect()
        self.digest = self._live_digest()
        self._suspicion = None

    def _index_live(self) -> None:
        self._wholes = [whole_of(tensor) for tensor in self._live]
        self._identities = [_identity(tensor) for tensor in self._wholes]
        self._note_versions()
        self._number = {}
        runs: dict[int, list[tuple[int, int, int]]] = {}
        for index, (spec, tensor) in enumerate(zip(self.table, self._live, strict=True)):
            number = self._number.setdefault(id(whole_of(tensor)), index)
            _, start = row_of(tensor)
            runs.setdefault(number, []).append((index, start, start + spec.numel))
        self._runs = {number: ElementRun.of(parts) for number, parts in runs.items()}

    def _note_versions(self) -> None:
        self._versions = [_version(tensor) for tensor in self._wholes]

    def _by_tensor(self, changes: dict[int, Change]) -> dict[int, Change]:
        """Changes of live tensors by number, as changes of the published tensors in them."""
        found: dict[int, Change] = {}
        for number, change in changes.items():
            found |= split_by_tensor(self._runs[number], change)
        return found

    def _check_versions(self) -> None:
        for spec, tensor, version in zip(self.table, self._wholes, self._versions, strict=True):
            if version != _version(tensor) and isinstance(tensor, torch.nn.Parameter):
                self._suspect(f"{spec.name} was written to")
                return

    def _suspect(self, reason: str) -> None:
        self._suspicion = self._suspicion or reason

    def _matches_live(self, expected: Digest) -> bool:
        if self._live_digest() == expected:
            self._note_versions()
            self._suspicion = None
            return True
        self._suspect("their digest differs")  # also if the restart is interrupted
        logger.warning(
            "weights were written outside of the optimizer's steps (%s), where changes are not detected: uploading the "
            "whole model. If the training does this regularly, use detector='snapshot'",
            self._suspicion,
        )
        return False

    def _live_digest(self) -> Digest:
        digest = Digest()
        for index, spec in enumerate(self.table):
            digest += digest_torch(tensor_seed(spec.name), integers(self._view(index)))
        return digest

    def _view(self, index: int) -> torch.Tensor:
        return cast(self._live[index], self._dtypes[index])


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
    values = torch.from_numpy(patterns.view(f"{'u' if patterns.itemsize == 1 else 'i'}{patterns.itemsize}"))
    held[torch.from_numpy(indices).to(flat.device)] = values.to(flat.device)


def _digest_of(table: TensorTable, view: Tensors) -> Digest:
    digest = Digest()
    for spec in table:
        digest += digest_torch(tensor_seed(spec.name), integers(view[spec.name].view(-1)))
    return digest


def _identity(tensor: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """Values that change when a tensor or its memory is replaced."""
    return id(tensor), tensor.data_ptr(), tensor.dtype


def _version(tensor: torch.Tensor) -> int:
    """Number of writes that torch has counted. It counts no writes by fused optimizers or through `.data`."""
    return 0 if tensor.is_inference() else tensor._version
