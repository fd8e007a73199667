"""Staged changes: the edits that a commit writes, the digests afterwards, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from hubsync.format.digest import Digest, DigestList, digest_torch
from hubsync.format.manifest import Position
from hubsync.format.patch import TensorValues
from hubsync.kernels.bits import TORCH_DTYPES, integers_of

from .dense import DenseTensors
from .live_weights import HeldRegion, LiveWeights, view_bits
from .memory import Edit, EditCollector


class Sums:
    """Digests of this rank's part at one position.

    Attributes:
        owned: of the elements it owns.
        regions: uint64[regions, 2], of each region in live memory, by `HeldRegion.number`, copies included.
    """

    def __init__(self, owned: Digest, regions: np.ndarray):
        self.owned = owned
        self.regions = regions

    @classmethod
    def zero(cls, regions: int) -> Sums:
        """To be added to."""
        return cls(Digest(), np.zeros((regions, 2), np.uint64))

    def copy(self) -> Sums:
        """To be added to. One that belongs to a position is not changed."""
        return Sums(self.owned, self.regions.copy())

    def region(self, number: int) -> Digest:
        return DigestList(self.regions)[number]

    def add(self, change: Digest, part: HeldRegion) -> None:
        self.regions[part.number] += np.array([change.a, change.b], np.uint64)
        if part.owned:
            self.owned += change

    def add_all(self, numbers: np.ndarray, changes: np.ndarray, owned: Digest) -> None:
        """Of the regions `numbers`, each once (uint64[n, 2]); and of those that this rank owns, together."""
        self.regions[numbers] += changes
        self.owned += owned

    def add_master(self, change: Digest, owned: bool) -> None:
        """Of a tensor that is loaded whole: no region holds it."""
        if owned:
            self.owned += change


@dataclass(frozen=True)
class Staged:
    """A change of the live weights, ready to be written.

    Attributes:
        start: position of the live weights when it was computed; it can be written from there only. None: from any.
        target: position afterwards.
        edits: by key of the memory.
        touched: numbers of the storages that they change.
        sums: this rank's digests afterwards.
        changed: live elements that differ.
        dense: by table index, the new values of tensors that are loaded whole.
    """

    start: Position | None
    target: Position
    edits: dict[int, Edit]
    touched: frozenset[int]
    sums: Sums
    changed: int
    dense: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Undo:
    """The last commit, and what it replaced.

    Attributes:
        staged: the change that was written, from a known position.
        sums: this rank's digests before.
        dense: values before of the tensors that are loaded whole.
    """

    staged: Staged
    sums: Sums
    dense: dict[int, torch.Tensor]

    @cached_property
    def change(self) -> Staged:
        """The change that takes the commit back."""
        staged = self.staged
        assert staged.start is not None
        edits = {key: edit.inverted() for key, edit in staged.edits.items()}
        return Staged(staged.target, staged.start, edits, staged.touched, self.sums, staged.changed, self.dense)


def add_values(live: LiveWeights, index: int, new: TensorValues, edits: EditCollector, sums: Sums) -> None:
    """Add the edits that give one tensor new values, and the change of its digests. O(tensor)."""
    flat = integers_of(new.patterns)
    for part in live.held[index]:
        sums.add(live.digest_of_source(index, part.region, flat) - sums.region(part.number), part)
    live.collect_edits(index, flat, edits)


def add_view(
    live: LiveWeights, dense: DenseTensors, tensors: Mapping[str, torch.Tensor], edits: EditCollector, sums: Sums
) -> tuple[Digest, dict[int, torch.Tensor]]:
    """Add the edits that make live weights a whole view, and its digests.

    Returns:
        (its digest, new values of tensors that are loaded whole).
    """
    total, loaded = Digest(), {}
    for index, spec in enumerate(live.table):
        flat = view_bits(spec, tensors)
        whole = digest_torch(live.seeds[index], flat)
        total += whole
        if index in dense:
            loaded[index] = flat.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
            sums.add_master(whole, dense.owned[index])
        for part in live.held[index]:
            sums.add(live.digest_of_source(index, part.region, flat), part)
        live.collect_edits(index, flat, edits)
    return total, loaded
