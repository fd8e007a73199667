"""Exact detection without a copy of the model: old weights are still there just before their own update.

The optimizer is stepped a few parameters at a time: each time their published view is remembered, and compared after
the update; what is remembered is then forgotten. Changes of several steps add up; those that come back disappear. So
only changes are held, and at most the memory for one bucket of parameters, or the largest one.

What is written to weights at other times than in a step is not seen as it happens. Three things give it away: torch's
version counters of tensors, tensors that have been replaced, and a digest of all live weights, recomputed now and then,
that must be the one that the changes lead to. The answer to each is a new start: `digest` is that of the live weights
from then on, and whoever publishes sees that it is not the run's, and uploads the whole model.
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

from .base import Change, Detected, split_by_tensor
from .compare import compare
from .composition import PendingChanges, compose_all
from .snapshot import Snapshot
from .stepping import BUCKET, SlicedSteps

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


class Sliced:
    """Finds what optimizer steps change, as they happen. Holds changes, buffers, and for each tensor where it was.

    Args:
        tensors: the live tensors, from `published_tensors`.
        table: their table.
        optimizer: the torch optimizer of which `why_not_sliced` says nothing; its `step` is replaced until `close`.
        audit_every: recompute the digest of all live weights at each so many detections; 0 for the first one and
            `audit` only.
        bucket: elements stepped together.
    """

    holds_old = False  # no weights to encode compact deltas against
    digest: Digest
    _submitted: dict[int, Change]  # by the last detection
    _pending: PendingChanges  # since then, in the elements of live tensors
    _number: dict[int, int]  # id of a live tensor -> its number, which is the index of the first that lies in it
    _lying: dict[int, ElementRun]  # number of a live tensor -> the published ones that lie in it
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
        self._weights = threading.RLock()  # held while a step moves weights, and while weights are looked at
        self._room = torch.empty(0, dtype=torch.bfloat16, device="cpu")
        self._suspicion: str | None = None
        self._stepping = False
        self._lost = _LostUpdates()
        self._live = [tensors[spec.name] for spec in table]
        self._begin()
        self._steps = SlicedSteps(optimizer, self, bucket)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    # --- what publishers call -----------------------------------------------------------------------

    def follow(self, tensors: Tensors) -> None:
        """Look at these live tensors from now on. ConfigError unless they are of the same table."""
        require_same_table(self.table, tensors)
        with self._weights:
            live = [tensors[spec.name] for spec in self.table]
            moved = [
                spec.name
                for spec, tensor, place in zip(self.table, live, self._places, strict=True)
                if _place(whole_of(tensor)) != place
            ]
            if moved:
                self._suspect(f"{moved[0]} was replaced")
                self._live = live
                self._look_at_live()

    def detect(self) -> Detected:
        """All changes since the view of `digest`, on the CPU. Recomputes the digest of live weights when it is due."""
        with self._weights:
            submitted, pending = (
                compose_all(self._submitted, self._by_tensor(self._pending.collect())),
                PendingChanges(),
            )
            # No call between these two: a KeyboardInterrupt finds both changed, or none.
            self._submitted, self._pending = submitted, pending
            self._moved_buffers = self._buffers.detect()
            index_of = self.table.index_of
            buffers = {
                index_of(self._buffers.table[i].name): change for i, change in self._moved_buffers.changes.items()
            }
            detected = Detected(self.table, {**self._submitted, **buffers}, self.digest)
            self._look_for_writes()
            due = self._detections == 0 or (self._audit_every > 0 and self._detections % self._audit_every == 0)
            self._detections += 1
            if not due and self._suspicion is None:
                return detected
            if self._is_where_it_should_be(detected.digest):
                return detected
            self._begin()
            return Detected(self.table, {}, self.digest)

    def advance(self, detected: Detected) -> None:
        """The view that the last `detected` leads to has become durable: changes count from there."""
        digest = detected.digest
        with self._weights:
            self._submitted = {}
            self._buffers.advance(self._moved_buffers)
            self.digest = digest

    def audit(self) -> None:
        """Recompute the digest of the live weights. Begins anew if changes were missed: `digest` is then another."""
        self._detections = 0
        self.detect()

    def tensors(self) -> Tensors:
        """The view of `digest` by name: a clone of the live one with the changes since then undone.

        ChainError if weights were written to outside of the optimizer's steps, so that it is not known.
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
            self._suspect("the view that was published cannot be told from it")
            raise ChainError(
                "weights were written to outside of the optimizer's steps: the view that was published is gone. The "
                "next publish uploads the whole model"
            )
        return view

    def close(self) -> None:
        """Let the optimizer's step be as it was."""
        self._hook.remove()
        self._steps.undo()

    # --- what steps call ----------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._weights:
            self._look_for_writes()  # those that happened before this step; it changes what counters say
            self._stepping = True
            try:
                yield
            except BaseException:
                self._stepping = False
                self._suspect("a step has failed halfway")
                raise
            finally:
                self._note_versions()
                self._room = self._room[:0].clone()
                self._lost.tell()

    @contextmanager
    def update(self, parameters: list[torch.Tensor]) -> Iterator[None]:
        """Remember the view of these parameters, and find what has become of it."""
        watched = [(self._number[id(p)], p) for p in parameters if p.grad is not None and id(p) in self._number]
        old = self._remembered(watched)
        try:
            yield
        finally:
            for (number, parameter), before in zip(watched, old, strict=True):
                change = _changes_since(before, parameter, self._dtypes[number])
                self._lost.count(parameter, change)
                self._pending.add(number, change)

    def _after_step(self, *_: Any) -> None:
        if not self._stepping:
            self._suspect("the optimizer was stepped by a function that it had before")
        self._stepping = False

    def _remembered(self, watched: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        needed = sum(parameter.numel() for _, parameter in watched)
        if len(self._room) < needed:
            self._room = torch.empty(needed, dtype=torch.bfloat16, device="cpu")
        old, start = [], 0
        for number, parameter in watched:
            stop = start + parameter.numel()
            old.append(_remember(parameter, self._dtypes[number], self._room[start:stop]))
            start = stop
        return old

    # --- writes at other times ----------------------------------------------------------------------

    def _begin(self) -> None:
        """Count changes from the live weights on."""
        self._submitted = {}
        self._pending = PendingChanges()
        self._look_at_live()
        buffers = {
            spec.name: tensor
            for spec, tensor in zip(self.table, self._live, strict=True)
            if not isinstance(whole_of(tensor), torch.nn.Parameter)
        }
        # No optimizer moves buffers, and they are small: these are compared with a copy.
        self._buffers = Snapshot(buffers, TensorTable([spec for spec in self.table if spec.name in buffers]))
        self._moved_buffers = self._buffers.detect()
        self.digest = self._live_digest()
        self._suspicion = None

    def _look_at_live(self) -> None:
        self._wholes = [whole_of(tensor) for tensor in self._live]
        self._places = [_place(tensor) for tensor in self._wholes]
        self._note_versions()
        self._number = {}
        lying: dict[int, list[tuple[int, int, int]]] = {}
        for index, (spec, tensor) in enumerate(zip(self.table, self._live, strict=True)):
            number = self._number.setdefault(id(whole_of(tensor)), index)
            _, start = row_of(tensor)
            lying.setdefault(number, []).append((index, start, start + spec.numel))
        self._lying = {number: ElementRun.of(parts) for number, parts in lying.items()}

    def _note_versions(self) -> None:
        self._versions = [_version(tensor) for tensor in self._wholes]

    def _by_tensor(self, changes: dict[int, Change]) -> dict[int, Change]:
        """Changes of live tensors, by number, as changes of the published tensors that lie in them."""
        found: dict[int, Change] = {}
        for number, change in changes.items():
            found |= split_by_tensor(self._lying[number], change)
        return found

    def _look_for_writes(self) -> None:
        for spec, tensor, version in zip(self.table, self._wholes, self._versions, strict=True):
            if version != _version(tensor) and isinstance(tensor, torch.nn.Parameter):
                self._suspect(f"{spec.name} was written to")
                return

    def _suspect(self, reason: str) -> None:
        self._suspicion = self._suspicion or reason

    def _is_where_it_should_be(self, expected: Digest) -> bool:
        if self._live_digest() == expected:
            self._note_versions()
            self._suspicion = None
            return True
        self._suspect("their digest says so")  # also where the new start is interrupted
        logger.warning(
            "weights were written to outside of the optimizer's steps (%s), where changes are not seen: uploading the "
            "whole model. If this is how the training works, use detector='snapshot'",
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
    """Says once how much of the first step a parameter's own dtype was too coarse for."""

    def __init__(self) -> None:
        self._asked = self._moved = 0
        self._told = False

    def count(self, parameter: torch.Tensor, change: Change) -> None:
        if self._told or parameter.element_size() > 2 or change.new.itemsize != parameter.element_size():
            return
        if parameter.grad is not None and not parameter.grad.is_sparse:
            self._asked += int(torch.count_nonzero(parameter.grad))
            self._moved += len(change.indices)

    def tell(self) -> None:
        if self._told or self._moved == 0:  # a skipped step, or a learning rate that begins at zero
            return
        self._told = True
        lost = 1 - self._moved / max(self._asked, self._moved)
        logger.warning(
            "the first step has left %.1f %% of the parameters as they were although they have a gradient: their "
            "updates are smaller than half a unit in the last place, and lost",
            100 * lost,
        )


def _remember(parameter: torch.Tensor, dtype: torch.dtype, room: torch.Tensor) -> torch.Tensor:
    """A copy of the published view, flat; in `room` (bfloat16[numel], on the CPU) where it fits."""
    if _is_rounded_here(parameter, dtype) and rounding.round_into(bits_of(room), bits_of(parameter)):
        return room
    if dtype == room.dtype and parameter.device == room.device:
        return room.copy_(cast(parameter, dtype))  # cast in its shape: torch rounds a NaN otherwise in another
    return parameter.detach().to(dtype, copy=True).contiguous().view(-1)


def _changes_since(old: torch.Tensor, parameter: torch.Tensor, dtype: torch.dtype) -> Change:
    if _is_rounded_here(parameter, dtype):
        found = rounding.changes(bits_of(parameter), bits_of(old))
        if found is not None:
            indices, new = found
            return Change(indices, bits_of(old)[indices], new)
    return compare(old, cast(parameter, dtype))


def _is_rounded_here(parameter: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether our own kernels know this cast; torch does all others."""
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


def _place(tensor: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """What another tensor in its place would have otherwise."""
    return id(tensor), tensor.data_ptr(), tensor.dtype


def _version(tensor: torch.Tensor) -> int:
    """How often torch has seen it written to; not by fused optimizers, and not through `.data`."""
    return 0 if tensor.is_inference() else tensor._version
