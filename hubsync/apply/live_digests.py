"""Digests of live weights on a GPU, of all regions in one launch instead of one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hubsync.format.digest import device_constants, key_of
from hubsync.kernels.gpu.digest import Digests
from hubsync.kernels.gpu.listing import Listed
from hubsync.kernels.gpu.numbering import RAW, Numbering

from .live import LiveStorage
from .regions import Block


class Runs(NamedTuple):
    """Elements of regions that are consecutive both in the checkpoint tensor and in live memory, as int64 arrays.

    Attributes:
        region: ascending, the region of each run.
        source, target: first element in the tensor, and in the storage.
        length: elements.
    """

    region: np.ndarray
    source: np.ndarray
    target: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, regions: Sequence[Block]) -> Runs:
        found = [region.runs() for region in regions]
        region = np.repeat(np.arange(len(regions)), [len(sources) for sources, _ in found])
        length = np.array([region.run for region in regions], np.int64)[region]
        sources, targets = zip(*found, strict=True)
        return cls(region, np.concatenate(sources), np.concatenate(targets), length)


class LiveDigests:
    """Digests of regions for which `LiveWeights` says so (`read_together`).

    Args:
        storages: live memory, by `Region.storage`.
        regions: at least one.
        seeds: of the digest of each region's tensor.
        firsts: number of the first element of each region's tensor, as in `DeviceDelta`.

    Attributes:
        runs: of the regions.
        region_of: int64[pieces], ascending: the region of each piece. One program reads a piece.
        piece: elements of a piece at most.
    """

    def __init__(
        self, storages: Sequence[LiveStorage], regions: Sequence[Block], seeds: Sequence[int], firsts: Sequence[int]
    ):
        used = sorted({region.storage for region in regions})
        self._storages = [storages[number].bits for number in used]
        self._numbering = Numbering(self._storages, [RAW] * len(used))
        live = {number: at for at, number in enumerate(used)}
        self.runs = runs = Runs.of(regions)
        tensor = np.array([live[region.storage] for region in regions])[runs.region]
        keys = np.array([key_of(seed) for seed in seeds], np.int64)[runs.region]
        spans = np.stack([tensor, runs.target, runs.length, runs.source], axis=1)
        numbers = np.array(firsts, np.int64)[runs.region] + runs.source
        constants = device_constants(self._numbering.device)
        self._digests = Digests(self._numbering, spans, keys, constants, numbers)
        self.region_of = runs.region[self._digests.owners]
        self.piece = self._digests.piece
        self._count = len(regions)

    def lanes(self) -> np.ndarray:
        """uint64[regions, 2]: both lanes of each digest, as it is now."""
        lanes = np.zeros((self._count, 2), np.uint64)
        self.add(lanes, 0, len(self.region_of))
        return lanes

    def add(self, lanes: np.ndarray, first: int, end: int) -> None:
        """Read the pieces `first .. end`, and add their digests to those of their regions. Waits for the device."""
        self._numbering.refresh(self._storages)
        sums = self._digests.sums(first, end).cpu().numpy().view(np.uint64)
        _add_up(lanes, self.region_of[first:end], sums)

    def changes(self, numbers: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """By region: what changes add to both lanes, uint64[regions, 2], and their number, int64[regions].

        Args:
            numbers: int64[n], ascending.
            old, new: int16[n], patterns.
        """
        sums, found = self._digests.changes(Listed(numbers, old, new))
        lanes, counts = np.zeros((self._count, 2), np.uint64), np.zeros((self._count, 1), np.int64)
        _add_up(lanes, self.runs.region, sums.cpu().numpy().view(np.uint64))
        _add_up(counts, self.runs.region, found.cpu().numpy()[:, None])
        return lanes, counts[:, 0]


def _add_up(totals: np.ndarray, groups: np.ndarray, rows: np.ndarray) -> None:
    """Add rows to the totals of their groups, which ascend."""
    begins = np.flatnonzero(np.diff(groups, prepend=-1))
    totals[groups[begins]] += np.add.reduceat(rows, begins, axis=0)
