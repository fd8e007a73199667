"""Tensors of a model that are compared with copies, while others are followed in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hubsync.format.digest import Digest
from hubsync.format.table import TensorTable

from .changes import Change, Detected
from .snapshot import Snapshot

Tensors = dict[str, torch.Tensor]


class CopiedTensors:
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

    def digests(self) -> dict[int, Digest]:
        """Digests of the copies, by table index."""
        found: dict[int, Digest] = {}
        for indices, copies in self._snapshots:
            found.update(zip(indices, copies.digests, strict=True))
        return found

    def part(self, index: int) -> torch.Tensor:
        """The copied elements of one tensor, flat. Not a copy: do not write to it."""
        for indices, copies in self._snapshots:
            if index in indices:
                return copies.part(indices.index(index))
        raise KeyError(index)

    def follow(self, tensors: Tensors) -> None:
        for _, snapshot in self._snapshots:
            snapshot.follow({spec.name: tensors[spec.name] for spec in snapshot.table})

    def detect(self) -> FoundByCopy:
        found = FoundByCopy({}, {}, {})
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
class FoundByCopy:
    """As in `Detected`, for the copied tensors. `after` has a digest for each of them."""

    changes: dict[int, Change]
    values: dict[int, np.ndarray]
    after: dict[int, Digest]
