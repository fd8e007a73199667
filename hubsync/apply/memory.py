"""Reading and writing scattered elements of live storages: the only code that touches weights.

A commit spreads over every storage of a model, often with a few elements in each, so it must not do work per storage.
On a CPU and on a GPU all storages of one element width are treated as one flat array: addresses are offsets from the
lowest of them, and one compiled loop without the interpreter's lock, or one launch on the stream of the forward passes,
handles a whole commit. On other devices there is one operation for each storage.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
import torch

from hubsync import kernels
from hubsync.errors import ReplicaRefused
from hubsync.format.codec.device import launching_on
from hubsync.format.patch import TensorDelta
from hubsync.kernels.bits import UNSIGNED, advance, integers_of
from hubsync.kernels.compiled import compiled

from .live import INTEGERS, LiveStorage
from .regions import Region

_BLOCK = 1 << 12  # elements written before they are read back: their cache lines fit the second level


@dataclass(frozen=True)
class Edit:
    """New patterns for some elements of one memory, all three on the model's device.

    Attributes:
        places: offsets, unique; int64 (or int32, in `DeviceMemory`).
        old: patterns that must be there before, as integers of the element's width.
        new: patterns to write.
    """

    places: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor

    def inverted(self) -> Edit:
        return Edit(self.places, self.new, self.old)


class Memory(Protocol):
    """The live storages of one map. Edits of storages with the same `key` are made together."""

    def key(self, storage: int) -> int:
        """The key of a storage's edits."""
        ...

    def places(self, storage: int, offsets: np.ndarray) -> torch.Tensor:
        """Offsets in a storage as the loader sees them (int64) -> places for `read` and `Edit`, on the device."""
        ...

    def read(self, storage: int, places: torch.Tensor) -> torch.Tensor:
        """The patterns at these places of a storage."""
        ...

    def prepare(self) -> None:
        """Compile what the other methods need, which may take seconds, before a commit waits for it."""
        ...

    def hold_old(self, edits: Mapping[int, Edit]) -> bool:
        """Does memory hold the `old` patterns of all edits, given by key?"""
        ...

    def write(self, edits: Mapping[int, Edit]) -> bool:
        """Write the `new` patterns. Returns whether memory holds them afterwards."""
        ...


def memory_of(storages: Sequence[LiveStorage], device: torch.device) -> Memory:
    if kernels.on_gpu(torch.empty(0, device=device)):
        return GpuMemory(storages, device)
    return HostMemory(storages) if device.type == "cpu" else DeviceMemory(storages, device)


class _Flat:
    """Storages of one device as one array for each element width, which is the key of their edits.

    Args:
        storages: of the map. Those on other devices have no places.
        device_type: of the device.
    """

    def __init__(self, storages: Sequence[LiveStorage], device_type: str):
        self._storages = storages  # keeps the memory alive
        self._spans: dict[int, tuple[int, int]] = {}
        """By width: the first address of all storages, and the last, half open."""
        held = {n: storage.bits for n, storage in enumerate(storages) if storage.bits.device.type == device_type}
        for width in {bits.element_size() for bits in held.values()}:
            spans = [_span(bits) for bits in held.values() if bits.element_size() == width]
            self._spans[width] = min(low for low, _ in spans), max(high for _, high in spans)
        self._starts = {
            number: (_span(bits)[0] - self._spans[width][0]) // width
            for number, bits in held.items()
            for width in (bits.element_size(),)
        }

    def key(self, storage: int) -> int:
        return self._storages[storage].bits.element_size()

    def prepare(self) -> None:
        """Compiled loops are kept on disk."""

    def start(self, storage: int) -> int:
        """The element of the array of its width that a storage begins with. ReplicaRefused if it is elsewhere."""
        if storage not in self._starts:
            bits = self._storages[storage].bits
            raise ReplicaRefused(f"{self._storages[storage].name} is on {bits.device}, the other weights are not")
        return self._starts[storage]

    def elements(self, storage: int, offsets: np.ndarray) -> np.ndarray:
        """Offsets in a storage as the loader sees them -> elements of the array of its width."""
        return _in_memory(self._storages[storage], offsets) + self.start(storage)


class HostMemory(_Flat):
    """Storages in this process's own memory."""

    def __init__(self, storages: Sequence[LiveStorage]):
        super().__init__(storages, "cpu")
        self._arrays = {
            width: _array(*span, np.dtype(f"i{width}" if width > 1 else "u1")) for width, span in self._spans.items()
        }

    def places(self, storage: int, offsets: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.elements(storage, offsets))

    def read(self, storage: int, places: torch.Tensor) -> torch.Tensor:
        memory = self._arrays[self.key(storage)]
        out = np.empty(len(places), memory.dtype)
        _gather(memory, places.numpy(), out)
        return torch.from_numpy(out)

    def hold_old(self, edits: Mapping[int, Edit]) -> bool:
        return all(_equal(self._arrays[key], edit.places.numpy(), edit.old.numpy()) for key, edit in edits.items())

    def write(self, edits: Mapping[int, Edit]) -> bool:
        done = [_scatter(self._arrays[key], edit.places.numpy(), edit.new.numpy()) for key, edit in edits.items()]
        return all(done)


class GpuMemory(_Flat):
    """Storages on a GPU. A write is one launch for each width, and reading back another."""

    def __init__(self, storages: Sequence[LiveStorage], device: torch.device):
        super().__init__(storages, device.type)
        self.device = device
        self._scattered = import_module("hubsync.kernels.gpu.scattered")  # needs triton

    def places(self, storage: int, offsets: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.elements(storage, offsets)).to(self.device)

    def read(self, storage: int, places: torch.Tensor) -> torch.Tensor:
        bits = self._storages[storage].bits
        out = torch.empty(len(places), dtype=bits.dtype, device=self.device)
        with launching_on(self.device):
            self._scattered.read(self._spans[self.key(storage)][0], places, out)
        return out

    def prepare(self) -> None:
        with launching_on(self.device):
            for width in self._spans:
                scratch = torch.zeros(1, dtype=INTEGERS[width], device=self.device)
                places = torch.zeros(1, dtype=torch.int64, device=self.device)
                differs = torch.zeros(1, dtype=torch.int32, device=self.device)
                self._scattered.read(scratch.data_ptr(), places, torch.empty_like(scratch))
                self._scattered.write(scratch.data_ptr(), places, torch.zeros_like(scratch))
                self._scattered.compare(scratch.data_ptr(), places, scratch, differs)
                if width == 2:
                    self._scattered.step(scratch.data_ptr(), places, scratch, scratch.clone(), scratch.clone())

    def address(self, key: int, places: np.ndarray) -> np.ndarray:
        """Addresses of places of storages with this key, int64."""
        return self._spans[key][0] + key * places

    def stepped(self, key: int, places: torch.Tensor, diffs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patterns at places of 16-bit storages (int16), and those that differences (int16) make of them."""
        old, new = torch.empty_like(diffs), torch.empty_like(diffs)
        with launching_on(self.device):
            self._scattered.step(self._spans[key][0], places, diffs, old, new)
        return old, new

    def hold_old(self, edits: Mapping[int, Edit]) -> bool:
        return self._hold((key, edit.places, edit.old) for key, edit in edits.items())

    def write(self, edits: Mapping[int, Edit]) -> bool:
        with launching_on(self.device):
            for key, edit in edits.items():
                self._scattered.write(self._spans[key][0], edit.places, edit.new)
        return self._hold((key, edit.places, edit.new) for key, edit in edits.items())

    def _hold(self, expected: Iterable[tuple[int, torch.Tensor, torch.Tensor]]) -> bool:
        """One answer, and one wait for the device, for all."""
        with launching_on(self.device):
            differs = torch.zeros(1, dtype=torch.int32, device=self.device)
            for key, places, bits in expected:
                self._scattered.compare(self._spans[key][0], places, bits, differs)
            return not bool(differs)


class DeviceMemory:
    """Storages on an accelerator without Triton. The key of a storage is its number."""

    def __init__(self, storages: Sequence[LiveStorage], device: torch.device):
        self._storages = storages
        self._device = device

    def key(self, storage: int) -> int:
        return storage

    def prepare(self) -> None:
        """Nothing is compiled."""

    def places(self, storage: int, offsets: np.ndarray) -> torch.Tensor:
        width = torch.int32 if len(self._storages[storage].bits) < 1 << 31 else torch.int64
        return torch.from_numpy(_in_memory(self._storages[storage], offsets)).to(width).to(self._device)

    def read(self, storage: int, places: torch.Tensor) -> torch.Tensor:
        return self._storages[storage].bits.index_select(0, places)

    def hold_old(self, edits: Mapping[int, Edit]) -> bool:
        return self._hold((key, edit.places, edit.old) for key, edit in edits.items())

    def write(self, edits: Mapping[int, Edit]) -> bool:
        with torch.inference_mode():  # also where the model was loaded in inference mode
            for key, edit in edits.items():
                self._storages[key].bits.scatter_(0, edit.places.long(), edit.new)
            return self._hold((key, edit.places, edit.new) for key, edit in edits.items())

    def _hold(self, expected: Iterable[tuple[int, torch.Tensor, torch.Tensor]]) -> bool:
        """One answer, and one wait for the device, for all."""
        flags = [(self.read(key, places) == bits).all() for key, places, bits in expected]
        return not flags or bool(torch.stack(flags).all())


class EditCollector:
    """Collects edits of storages into one edit for each key of the memory."""

    def __init__(self, memory: Memory):
        self.changed = 0
        self._memory = memory
        self._touched: set[int] = set()
        self._parts: dict[int, list[Edit]] = defaultdict(list)

    def add(self, storage: int, places: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        self.changed += len(places)
        self._touched.add(storage)
        self._parts[self._memory.key(storage)].append(Edit(places, old, new.to(old.dtype).to(old.device)))

    def add_all(self, key: int, storages: Iterable[int], *columns: torch.Tensor) -> None:
        """Add edits (places, old, new) of several storages of one key."""
        self.changed += len(columns[0])
        self._touched.update(storages)
        self._parts[key].append(Edit(*columns))

    def advance(self, region: Region, delta: TensorDelta) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add the edits of a delta in one region. Returns (positions in the delta, patterns before, patterns after)."""
        positions, offsets = region.locate(delta.indices)
        places = self._memory.places(region.storage, offsets)
        old = self._memory.read(region.storage, places)
        before = unsigned(old)
        after = advance(before, delta.diffs[positions])
        if len(positions):
            self.add(region.storage, places, old, integers_of(after))
        return positions, before, after

    @property
    def touched(self) -> frozenset[int]:
        return frozenset(self._touched)

    def finish(self) -> dict[int, Edit]:
        return {key: _merged(parts) for key, parts in self._parts.items()}


def _merged(parts: Sequence[Edit]) -> Edit:
    """One edit of several of the same key."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*((part.places, part.old, part.new) for part in parts), strict=True)
    return Edit(*(torch.cat(column) for column in columns))


def unsigned(bits: torch.Tensor) -> np.ndarray:
    """Patterns as unsigned integers, on the CPU."""
    return bits.cpu().numpy().view(UNSIGNED[8 * bits.element_size()])


def _in_memory(storage: LiveStorage, offsets: np.ndarray) -> np.ndarray:
    """Offsets as the loader sees them -> offsets in the storage's bits."""
    return offsets if storage.relayout is None else storage.relayout.live(offsets)


def _span(bits: torch.Tensor) -> tuple[int, int]:
    """First and last address of a flat tensor, half open."""
    return bits.data_ptr(), bits.data_ptr() + bits.nbytes


def _array(base: int, end: int, dtype: np.dtype) -> np.ndarray:
    """The address range as an array. Most of it is other memory, which is never read."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * (end - base)).from_address(base)), dtype)


@compiled
def _gather(memory: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(places)):
        out[i] = memory[places[i]]


@compiled
def _equal(memory: np.ndarray, places: np.ndarray, expected: np.ndarray) -> bool:
    different = False  # no early return: differences are rare, and without a branch the CPU prefetches
    for i in range(len(places)):
        different |= memory[places[i]] != expected[i]
    return not different


@compiled
def _scatter(memory: np.ndarray, places: np.ndarray, new: np.ndarray) -> bool:
    """Write, and read the values back while they are in the cache."""
    different = False
    for first in range(0, len(places), _BLOCK):
        last = min(first + _BLOCK, len(places))
        for i in range(first, last):
            memory[places[i]] = new[i]
        for i in range(first, last):
            different |= memory[places[i]] != new[i]
    return not different
