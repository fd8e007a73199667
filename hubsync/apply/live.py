"""Live memory: the storages of a loaded model's parameters, their addresses, and their layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hubsync.errors import ReplicaRefused

from .regions import Region, Scatter, span

# Element size -> the dtype that bit patterns are viewed as.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SAMPLE = 1024  # elements per storage compared before and after the dry run


@dataclass(frozen=True, eq=False)
class Relayout:
    """A permutation of a parameter's elements that happened after loading, the same one in every period of them.

    A loader would put an element at offset `o`; it lives at `o // period * period + places[o % period]`.
    """

    places: np.ndarray

    @property
    def period(self) -> int:
        return len(self.places)

    def live(self, offsets: np.ndarray) -> np.ndarray:
        """Offsets as a loader sees them -> offsets in live memory, int64."""
        inside = offsets % self.period
        return offsets - inside + self.places[inside]

    def in_halves(self) -> Relayout:
        """The same permutation, with offsets in halves of elements: element i is halves 2 i and 2 i + 1."""
        pairs = 2 * self.places.astype(np.int64)
        return Relayout(np.stack([pairs, pairs + 1], 1).reshape(-1))


@dataclass(frozen=True)
class Derived:
    """A parameter that the server computes from others after loading.

    Attributes:
        sources: names of the parameters it is computed from.
        refresh: computes it again, in place.
    """

    sources: tuple[str, ...]
    refresh: Callable[[], None]


@dataclass(frozen=True)
class LayoutHints:
    """Knowledge of an engine about the layout of its model that no dry run can find, by parameter name.

    Attributes:
        relayouts: for a parameter that was permuted after loading, the engine's own function for it. It takes a tensor
            with the parameter's shape and dtype from the layout that the loader fills to the one that kernels read.
        derived: parameters that are copies of others.
        apart: names of the parameters of each part that a run may leave out as a whole, because another part is trained
            alone: towers beside a language model, layers of a draft.
        reachable: (path, tensor) of everything that forward passes may read, for the search for hidden copies.
    """

    relayouts: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    derived: Mapping[str, Derived] = field(default_factory=dict)
    apart: Sequence[frozenset[str]] = ()
    reachable: Callable[[], Iterable[tuple[str, torch.Tensor]]] = tuple


class LiveStorage:
    """One piece of memory that holds parameters of the model.

    Attributes:
        names: every parameter and buffer name that lives in it; the first one is used in messages.
        bits: the whole storage as a flat integer tensor of the element's width, on the model's device. Writing to it
            writes to the model.
        dtype: dtype of the parameters in it.
        widened: it is float32 and takes bfloat16 elements, so `bits` has two numbers of 16 bits for each element. The
            second, the upper half, is the bfloat16 pattern; the lower half must be zero.
        parameter: False if only buffers live in it.
        relayout: how its elements were permuted after loading; None if they are where the loader puts them.
    """

    def __init__(self, tensor: torch.Tensor):
        self.names: list[str] = []
        self.dtype = tensor.dtype
        self.parameter = False
        self.relayout: Relayout | None = None
        self.widened = False
        self._tenants: dict[tuple[int, tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = tensor.detach().as_strided((length,), (1,), 0)
        self.bits = flat.view(INTEGERS[tensor.element_size()])

    def widen(self) -> None:
        """See `widened`."""
        self.bits, self.widened = self.bits.view(torch.int16), True

    def lower_halves(self, region: Region) -> np.ndarray:
        """Lower halves in a region of widened storage that are not zero: int64, before `relayout`."""
        places = region.offsets(np.arange(region.numel)) - 1
        live = places if self.relayout is None else self.relayout.live(places)
        found = self.bits[torch.from_numpy(live).to(self.bits.device)].nonzero().squeeze(1)
        return places[found.cpu().numpy()]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """One more parameter or buffer that lives here; an alias of another adds only its name."""
        self.names.append(name)
        self.parameter |= isinstance(tensor, torch.nn.Parameter)
        key = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
        self._tenants.setdefault(key, tensor.detach())

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def used(self) -> int:
        """Elements that belong to a parameter or buffer; the storage may be longer."""
        solid: list[tuple[int, int]] = []
        total = 0
        for tensor in sorted(self._tenants.values(), key=torch.Tensor.numel, reverse=True):
            low = int(tensor.storage_offset())
            high = low + span(tensor.shape, tensor.stride())
            if any(first <= low and high <= last for first, last in solid):
                continue  # a view of a larger one
            total += tensor.numel()
            if tensor.numel() == high - low:
                solid.append((low, high))
        return total

    def sample(self) -> torch.Tensor:
        """A few hundred bit patterns spread over the storage."""
        bits = self.bits
        return bits[:: max(1, len(bits) // _SAMPLE)].clone()

    def offsets(self, region: Region, ranks: np.ndarray) -> np.ndarray:
        """Live offsets of the region's `ranks`-th elements in block order, int64."""
        offsets = region.offsets(ranks)
        return offsets if self.relayout is None else self.relayout.live(offsets)

    def gather(self, region: Region) -> torch.Tensor:
        """Live patterns of the region in block order, 1-D, on the device; a copy unless it is one run."""
        if self.relayout is None:
            return region.gather_live(self.bits)
        places = torch.from_numpy(self.offsets(region, np.arange(region.numel)))
        return self.bits[places.to(self.bits.device)]

    def holds_zero_outside(self, regions: Iterable[Region]) -> bool:
        """Is every element that none of the regions reaches zero? Reads all of the storage."""
        outside = torch.ones(len(self.bits), dtype=torch.bool)
        for region in regions:
            for piece in region.pieces(1 << 22):
                outside[torch.from_numpy(self.offsets(piece, np.arange(piece.numel)))] = False
        return not bool(self.bits[outside.to(self.bits.device)].any())


def find_storages(models: Iterable[torch.nn.Module]) -> list[LiveStorage]:
    """Distinct memory of all parameters and buffers of all models."""
    found: dict[int, LiveStorage] = {}
    for _owner, _key, name, tensor in _tensors(models):
        if tensor.numel() == 0 or tensor.is_meta or tensor.element_size() not in INTEGERS:
            continue
        found.setdefault(tensor.untyped_storage().data_ptr(), LiveStorage(tensor)).add(name, tensor)
    return list(found.values())


@dataclass(frozen=True)
class Address:
    """Where a parameter or buffer is registered, and where its data was when the map was built."""

    owner: dict[str, Any]
    key: str
    name: str
    pointer: int


def find_addresses(models: Iterable[torch.nn.Module]) -> list[Address]:
    return [
        Address(owner, key, name, tensor.data_ptr())
        for owner, key, name, tensor in _tensors(models)
        if not tensor.is_meta
    ]


def first_moved(addresses: Iterable[Address]) -> str | None:
    """Name of a tensor that is no longer where it was, or None. Takes microseconds, so every commit can call it."""
    for address in addresses:
        tensor = address.owner.get(address.key)
        if tensor is None or tensor.data_ptr() != address.pointer:
            return address.name
    return None


def find_relayout(transform: Callable[[torch.Tensor], torch.Tensor], parameter: torch.Tensor) -> Relayout:
    """The permutation that an opaque transform of the engine makes, per first-dimension slice (an expert).

    Element numbers go through it in two 16-bit halves where elements have 16 bits, so it must move whole elements and
    nothing else. ReplicaRefused if it does not, or if slices are permuted differently or exchange elements.
    """
    shape, period = parameter.shape, parameter[0].numel()
    slices = min(2, shape[0])
    numbers = torch.arange(slices * period, dtype=torch.int32).reshape(slices, *shape[1:])
    came_from = _moved_numbers(transform, numbers, parameter.dtype).reshape(slices, period).numpy().astype(np.int64)
    expected = came_from[0] + np.arange(slices)[:, None] * period
    if not (np.array_equal(came_from, expected) and np.array_equal(np.sort(came_from[0]), np.arange(period))):
        raise ReplicaRefused(
            "its elements are mixed or changed after loading, not only moved within an expert. Choose another kernel "
            "for experts, such as --moe-backend triton on GPUs"
        )
    places = np.empty(period, np.int32 if period < 1 << 31 else np.int64)
    places[came_from[0]] = np.arange(period)
    return Relayout(places)


def _moved_numbers(
    transform: Callable[[torch.Tensor], torch.Tensor], numbers: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Element numbers (int32) after a transform that takes and gives tensors of `dtype`."""
    if dtype.itemsize == numbers.element_size():
        return transform(numbers.view(dtype)).contiguous().view(torch.int32)
    halves = [transform(half.to(torch.int16).view(dtype)) for half in (numbers & 0xFFFF, numbers >> 16)]
    low, high = (half.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF for half in halves)
    return high << 16 | low


def _tensors(
    models: Iterable[torch.nn.Module],
) -> Iterator[tuple[dict[str, Any], str, str, torch.Tensor]]:
    """(owner dictionary, key, full name, tensor) of every parameter and buffer, aliases included."""
    for model in models:
        for prefix, module in model.named_modules():
            for owner in (module._parameters, module._buffers):
                for key, tensor in owner.items():
                    if tensor is not None:
                        yield owner, key, f"{prefix}.{key}" if prefix else key, tensor


def named_tensors(models: Iterable[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its full name, those of the first model first."""
    found: dict[str, torch.Tensor] = {}
    for _owner, _key, name, tensor in _tensors(models):
        found.setdefault(name, tensor)
    return found


def places_of(target: torch.Tensor) -> np.ndarray:
    """Offsets in its storage of every element of a view, int64, in row-major order."""
    first = target.storage_offset()
    offsets = torch.arange(int(first) + span(target.shape, target.stride()))
    return offsets.as_strided(target.shape, target.stride(), first).reshape(-1).numpy()


def flat_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bit patterns of a contiguous tensor, as a flat integer tensor of the element's width. No copy."""
    return tensor.reshape(-1).view(INTEGERS[tensor.element_size()])


def class_of(regions: Iterable[Region], storages: list[LiveStorage]) -> str:
    """Layout class of a tensor: `relayout` (permuted after loading), `table` (element by element) or `affine`."""
    regions = list(regions)
    if any(storages[region.storage].relayout is not None for region in regions):
        return "relayout"
    return "table" if any(isinstance(region, Scatter) for region in regions) else "affine"
