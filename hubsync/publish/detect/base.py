"""Detecting changes: the interface of detectors, and what they find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from hubsync.format.digest import Digest, digest_change, tensor_seed
from hubsync.format.patch import Patch, TensorDelta
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import difference
from hubsync.publish.view.shards import Shard
from hubsync.publish.view.strided import ElementRun


@dataclass(frozen=True)
class Change:
    """The changed elements of one tensor.

    Attributes:
        indices: int64, ascending, counted among the elements that this process owns: flat indices, if it owns all.
        old: bit patterns before, unsigned integers of the element's width.
        new: bit patterns after.
    """

    indices: np.ndarray
    old: np.ndarray
    new: np.ndarray


class Detected:
    """The changes since the last durable version, on the CPU.

    Differences and digest are computed at the first use: in the background, while training goes on.

    Args:
        table: the tensor table.
        changes: table index -> the tensor's changes; no empty ones.
        before: digest of the last durable version, or of this process's part of it.
        shards: table index -> the elements of the tensor that this process owns; default is all.
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
        """Number of changed elements."""
        return sum(len(change.indices) for change in self.changes.values())

    @cached_property
    def patch(self) -> Patch:
        """The changes in checkpoint coordinates."""
        return {
            index: TensorDelta(self._indices[index], difference(change.old, change.new))
            for index, change in self.changes.items()
        }

    @cached_property
    def digest(self) -> Digest:
        """Digest after the changes, of the view or of this process's part of it."""
        digest = self.before
        for index, change in self.changes.items():
            seed = tensor_seed(self._table[index].name)
            digest += digest_change(seed, self._indices[index], change.old, change.new)
        return digest

    @cached_property
    def _indices(self) -> dict[int, np.ndarray]:
        """Table index -> flat indices in the checkpoint's tensor."""
        if self._shards is None:
            return {index: change.indices for index, change in self.changes.items()}
        return {index: self._shards[index].globally(change.indices) for index, change in self.changes.items()}


class Detector(Protocol):
    """Finds the changes since the last durable version.

    Attributes:
        table: the tensor table.
        digest: digest of the view, or of this process's part of it, that changes are counted from.
        holds_old: whether `tensors` costs nothing, so that compact deltas can be encoded against them.
    """

    table: TensorTable
    digest: Digest
    holds_old: bool

    def follow(self, tensors: dict[str, torch.Tensor]) -> None:
        """Watch these live tensors from now on: a module may replace its parameters and buffers."""

    def detect(self) -> Detected:
        """All changes since the view of `digest`."""

    def advance(self, detected: Detected) -> None:
        """Count changes from the view after `detected`: it is durable."""

    def audit(self) -> None:
        """Check that no change was missed."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The view of `digest` by name, in checkpoint shapes."""

    def close(self) -> None:
        """Remove hooks."""


def split_by_tensor(run: ElementRun, change: Change) -> dict[int, Change]:
    """A change of a run of elements as changes of the tensors in the run; no empty ones."""
    return {
        index: Change(
            change.indices[part] - start if start else change.indices[part], change.old[part], change.new[part]
        )
        for index, part, start in run.split(change.indices)
    }
