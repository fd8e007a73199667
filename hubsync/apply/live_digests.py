"""Digests of live weights on a GPU, of all regions in one launch instead of one for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hubsync.format.digest import device_constants, key_of
from hubsync.kernels.gpu.digest import Digests
from hubsync.kernels.gpu.numbering import RAW, Numbering

from .live import LiveStorage
from .regions import Block


class LiveDigests:
    """Digests of regions for which `LiveWeights` says so (`read_together`).

    Args:
        storages: live memory, by `Region.storage`.
        regions: at least one.
        seeds: of the digest of each region's tensor.

    Attributes:
        region_of: int64[pieces], ascending: the region of each piece. One program reads a piece.
        piece: elements of a piece at most.
    """

    def __init__(self, storages: Sequence[LiveStorage], regions: Sequence[Block], seeds: Sequence[int]):
        used = sorted({region.storage for region in regions})
        self._storages = [storages[number].bits for number in used]
        self._numbering = Numbering(self._storages, [RAW] * len(used))
        live = {number: at for at, number in enumerate(used)}
        runs = [region.runs() for region in regions]
        counts = [len(sources) for sources, _ in runs]
        of_run = np.repeat(np.arange(len(regions)), counts)
        columns = [
            np.array([live[region.storage] for region in regions])[of_run],
            np.concatenate([targets for _, targets in runs]),
            np.array([region.run for region in regions])[of_run],
            np.concatenate([sources for sources, _ in runs]),
        ]
        keys = np.array([key_of(seed) for seed in seeds], np.int64)[of_run]
        constants = device_constants(self._numbering.device)
        self._digests = Digests(self._numbering, np.stack(columns, axis=1), keys, constants)
        self.region_of = of_run[self._digests.owners]
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
        regions = self.region_of[first:end]
        begins = np.flatnonzero(np.diff(regions, prepend=-1))
        lanes[regions[begins]] += np.add.reduceat(sums, begins, axis=0)
