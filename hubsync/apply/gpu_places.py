"""Where the elements of a run's tensors lie in the memory of a GPU: a delta is decoded and staged there.

Elements have the numbers of `DeviceDelta`, and places are those of `GpuMemory`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hubsync.chain.planner import Step
from hubsync.errors import FormatError
from hubsync.format.codec import OldBits
from hubsync.format.codec.device import launching_on
from hubsync.format.codec.device_decode import DeviceDelta, composed, first_numbers, prepare
from hubsync.format.digest import Digest
from hubsync.format.parts import read_delta_on_device

from .live_weights import LiveWeights
from .memory import EditCollector, GpuMemory
from .staging import Sums

logger = logging.getLogger("vllm.hubsync")

_WIDTH = 2  # bytes of an element


def read_on_gpu(
    live: LiveWeights, steps: Sequence[Step], files: Sequence[Sequence[Path]], old: OldBits | None = None
) -> DeviceDelta | None:
    """The changes of a path, on the GPU of live weights with `places`. None if the CPU must decode it.

    That is so for anything that is not sound, and for compact parts of later steps.

    Args:
        files: the parts of each step.
        old: the live weights, for compact parts.
    """
    assert live.places is not None
    deltas = []
    try:
        with live.aside():
            for number, (step, parts) in enumerate(zip(steps, files, strict=True)):
                held = None if number or step.inverse else old
                for part in parts:
                    delta = read_delta_on_device(part, live.table, step.manifest, live.places, held)
                    if delta is None:
                        return None
                    deltas.append(delta.inverted() if step.inverse else delta)
            return composed(live.table, deltas) if deltas else None
    except (FormatError, torch.OutOfMemoryError) as error:
        logger.info("hubsync: decoding on the CPU: %s", error)
        return None


@dataclass(frozen=True, eq=False)
class _NumberedRuns:
    """Elements that are consecutive both in the table and in memory, in the order of their numbers.

    Attributes:
        first, end: int64[n], numbers: half-open ranges that share nothing.
        place: int64[n], where the first one lies.
    """

    first: np.ndarray
    end: np.ndarray
    place: np.ndarray


class GpuPlaces:
    """The elements of one rank whose changes can be staged on its GPU: `hubsync.format.codec.device_decode.Held`.

    Those are tensors of which it holds nothing, or only regions that `LiveWeights` reads together, each element in one
    place. Others, such as embeddings that a draft model has a copy of, are staged region by region.

    Args:
        live: with `together`, and `GpuMemory`.
    """

    def __init__(self, live: LiveWeights):
        together, memory = live.together, live.memory
        assert together is not None
        assert isinstance(memory, GpuMemory)
        self._live, self._together, self._memory = live, together, memory
        self._firsts = first_numbers(live.table)
        self.device = memory.device
        self.followed = live.table.columns.width == 8 * _WIDTH
        self.followed[[part.index for part in live.apart] + sorted(live.refused)] = False
        self._runs = self._find()
        # A range in front of all others, for numbers that are in none.
        self._from = torch.from_numpy(np.append(-1, self._runs.first)).to(self.device)
        self._ends = torch.from_numpy(np.append(-1, self._runs.end)).to(self.device)
        self._shift = torch.from_numpy(np.append(0, self._runs.place - self._runs.first)).to(self.device)
        parts = [live.parts[number] for number in live.numbers_together.tolist()]
        self._owned = np.array([part.owned for part in parts])
        self._storages = np.array([part.region.storage for part in parts])

    def prepare(self) -> None:
        """Compile what decoding and staging need, which may take seconds, before a delta waits for it."""
        with launching_on(self.device):
            prepare(self.device)
            nothing = torch.empty(0, dtype=torch.int16, device=self.device)
            self._together.changes(nothing.long(), nothing, nothing)

    def holds(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        ends = np.append(self._runs.end, np.iinfo(np.int64).max)
        firsts = np.append(self._runs.first, np.iinfo(np.int64).max)
        return firsts[np.searchsorted(ends, first, side="right")] < end

    def addresses(self, tensors: np.ndarray) -> np.ndarray:
        first, end = self._firsts[tensors], self._firsts[tensors + 1]
        at = np.searchsorted(np.append(self._runs.first, np.iinfo(np.int64).max), first)
        place, whole = np.append(self._runs.place, 0)[at], np.append(self._runs.first, -1)[at] == first
        whole &= np.append(self._runs.end, -1)[at] == end
        held = np.where(whole, self._memory.address(_WIDTH, place), -1)
        return np.where(self.holds(first, end), held, 0)

    def stage(self, delta: DeviceDelta, edits: EditCollector, sums: Sums) -> None:
        """Add the edits that a delta makes of live weights, and the change of their digests. Waits for the device."""
        numbers, diffs = delta.numbers, delta.diffs
        run = torch.searchsorted(self._from, numbers, right=True, out_int32=True).sub_(1)
        held = numbers < self._ends[run]
        if not bool(held.all()):
            at = held.nonzero().squeeze(1)
            numbers, diffs, run = numbers[at], diffs[at], run[at]
        places = self._shift[run].add_(numbers)
        del run
        old, new = self._memory.stepped(_WIDTH, places, diffs)
        lanes, counts = self._together.changes(numbers, old, new)
        touched = np.unique(self._storages[counts > 0]).tolist()
        edits.add_all(_WIDTH, touched, places, old, new)
        owned = Digest(*lanes[self._owned].sum(axis=0, dtype=np.uint64).tolist())
        sums.add_all(self._live.numbers_together, lanes, owned)

    def _find(self) -> _NumberedRuns:
        """The runs of followed tensors. A tensor of which elements have two places is followed no longer."""
        runs = self._together.runs
        parts = [self._live.parts[number] for number in self._live.numbers_together.tolist()]
        index = np.array([part.index for part in parts])[runs.region]
        starts = np.array([self._memory.start(part.region.storage) for part in parts], np.int64)
        first = self._firsts[index] + runs.source
        order = np.argsort(first, kind="stable")
        index, first = index[order], first[order]
        end = first + runs.length[order]
        place = starts[runs.region[order]] + runs.target[order]
        reached = np.maximum.accumulate(np.append(0, end))[:-1]
        self.followed[index[first < reached]] = False
        own = self.followed[index]
        return _NumberedRuns(first[own], end[own], place[own])
