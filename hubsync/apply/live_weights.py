"""Live weights: the run's tensors as one rank holds them in the memory of a loaded model, to be read, never written."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch

from hubsync import kernels
from hubsync.errors import FormatError
from hubsync.format.codec.device_decode import first_numbers
from hubsync.format.digest import Digest, DigestList, digest_torch
from hubsync.format.table import TensorSpec
from hubsync.kernels.bits import TORCH_DTYPES

from .coordinate_map import CoordinateMap
from .live import flat_bits
from .memory import EditCollector, GpuMemory, memory_of
from .regions import Block, Region
from .vote import Holding

if TYPE_CHECKING:
    from .gpu_places import GpuPlaces
    from .live_digests import LiveDigests

_PIECE = 1 << 22  # elements handled at once where a temporary copy is needed
_RUN = 512  # elements: a launch over all regions is no faster where runs are shorter


@dataclass(frozen=True)
class HeldRegion:
    """One region of one tensor in live memory.

    Attributes:
        number: of this region among all of the rank.
        index: of the tensor in the run's table.
        owned: does this rank count it in the digest of the whole view?
    """

    number: int
    index: int
    region: Region
    owned: bool


class LiveWeights:
    """The mapped elements of one rank.

    Args:
        coordinates: where they are.
        device: where the parameters are.
        seeds: of every tensor's digest, by table index.
        owned: for each region, in order, whether this rank owns it. None before the ranks have joined: all.
    """

    def __init__(
        self,
        coordinates: CoordinateMap,
        device: torch.device,
        seeds: Sequence[int],
        owned: Sequence[bool] | None = None,
    ):
        number = itertools.count()
        self.held = [
            [
                HeldRegion(at, index, region, True if owned is None else owned[at])
                for region, at in zip(regions, number, strict=False)
            ]
            for index, regions in enumerate(coordinates.regions)
        ]
        """By table index."""
        self.parts = [part for held in self.held for part in held]
        """By number."""
        self.memory = memory_of(coordinates.storages, device)
        self.table = coordinates.table
        self.refused = frozenset(coordinates.refused)
        self._storages = coordinates.storages
        self._device = device
        self.seeds = seeds
        # The lowest priority that CUDA has. Engines use it too, so neither goes first: what runs here must be short.
        self._stream = torch.cuda.Stream(device, priority=0) if device.type == "cuda" else None

    @property
    def source_keys(self) -> list[tuple]:
        """Which elements of the tensors the regions hold, by number."""
        return [part.region.source_key for part in self.parts]

    def prepare(self) -> None:
        """Compile and tabulate what staging and commits need, which may take seconds, before one waits for it."""
        with self.aside():
            self.memory.prepare()
            if self.places is not None:
                self.places.prepare()

    def holdings(self) -> list[Holding]:
        """Every region with the digest that it has now."""
        found = DigestList(self.digests())
        return [Holding(part.index, part.region, digest) for part, digest in zip(self.parts, found, strict=True)]

    def digests(self) -> np.ndarray:
        """uint64[regions, 2]: both lanes of the digest of each region as it is now, by number."""
        lanes = np.empty((len(self.parts), 2), np.uint64)
        with self.aside():
            if self.together is not None:
                lanes[self.numbers_together] = self.together.lanes()
            for part in self.apart:
                digest = self.digest_of(part.index, part.region)
                lanes[part.number] = digest.a, digest.b
        return lanes

    @cached_property
    def numbers_together(self) -> np.ndarray:
        """int64[n], ascending: numbers of the regions whose digests one launch computes (`together`)."""
        return np.array([part.number for part in self.parts if self._read_together(part.region)], np.int64)

    @cached_property
    def together(self) -> LiveDigests | None:
        """Digests of the regions of `numbers_together`; None if there are none."""
        parts = [self.parts[number] for number in self.numbers_together.tolist()]
        if not parts:
            return None
        digests = import_module("hubsync.apply.live_digests").LiveDigests  # needs triton
        firsts = first_numbers(self.table)
        return digests(
            self._storages,
            [part.region for part in parts],
            [self.seeds[part.index] for part in parts],
            [int(firsts[part.index]) for part in parts],
        )

    @cached_property
    def places(self) -> GpuPlaces | None:
        """Where deltas are staged on a GPU; None if they are not."""
        if self.together is None or not isinstance(self.memory, GpuMemory):
            return None
        places: GpuPlaces = import_module("hubsync.apply.gpu_places").GpuPlaces(self)
        return places

    @cached_property
    def apart(self) -> list[HeldRegion]:
        """All other regions."""
        together = set(self.numbers_together.tolist())
        return [part for part in self.parts if part.number not in together]

    def names(self, found: np.ndarray, expected: np.ndarray) -> list[str]:
        """Names of the tensors, each once, of the regions whose digests are not the expected ones; as of `digests`."""
        numbers = np.flatnonzero((found != expected).any(axis=1)).tolist()
        return list(dict.fromkeys(self.table[self.parts[number].index].name for number in numbers))

    def differing(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of the tensors whose live patterns differ from these, in table order."""
        names = []
        with self.aside():
            for index, spec in enumerate(self.table):
                if not self.held[index]:
                    continue
                flat = view_bits(spec, tensors)
                if any(len(offsets) for _, offsets, _, _ in self.compare(index, flat)):
                    names.append(spec.name)
        return names

    def holds_unrounded(self, name: str, stored: torch.Tensor) -> bool:
        """Whether the live values of a tensor are these, in float32, although the run publishes it in bfloat16."""
        if stored.dtype != torch.float32:
            return False
        flat = flat_bits(stored.contiguous())
        for part in self.held[self.table.index_of(name)]:
            storage = self._storages[part.region.storage]
            if not storage.widened:
                return False
            whole = storage.bits.view(torch.int32)
            for piece in part.region.pieces(_PIECE):
                ranks = np.arange(piece.numel)
                places = torch.from_numpy(storage.offsets(piece, ranks) // 2).to(whole.device)
                expected = flat[torch.from_numpy(piece.indices(ranks))].to(whole.device)
                with self.aside():
                    if not torch.equal(whole[places], expected):
                        return False
        return True

    def compare(
        self, index: int, flat: torch.Tensor
    ) -> Iterator[tuple[Region, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(piece, places, old, new) of the elements of a tensor that differ from `flat`, in bounded pieces."""
        for part in self.held[index]:
            storage = self._storages[part.region.storage]
            for piece in part.region.pieces(_PIECE):
                new = piece.gather_source(flat).to(self._device)
                ranks = (storage.gather(piece) != new).nonzero().squeeze(1)
                if len(ranks):
                    places = self.memory.places(piece.storage, piece.offsets(ranks.cpu().numpy()))
                    yield piece, places, self.memory.read(piece.storage, places), new[ranks]
                if storage.widened and len(offsets := storage.lower_halves(piece)):
                    places = self.memory.places(piece.storage, offsets)
                    old = self.memory.read(piece.storage, places)
                    yield piece, places, old, torch.zeros_like(old)

    def collect_edits(self, index: int, flat: torch.Tensor, edits: EditCollector) -> None:
        """Add the edits that make a tensor equal to `flat`."""
        for region, places, old, new in self.compare(index, flat):
            edits.add(region.storage, places, old, new)

    def plain(self, region: Region) -> bool:
        """Is it one run of elements in memory? Others are read many times more slowly."""
        storage = self._storages[region.storage]
        return region.contiguous and storage.relayout is None and not storage.widened

    def _read_together(self, region: Region) -> bool:
        """Are a region's elements of 16 bits, on a GPU where the loader put them, and in long runs?

        Others are read region by region: those of other widths, permuted or widened storage, and elements that are
        strided in their last dimension, or listed one by one.
        """
        storage = self._storages[region.storage]
        return (
            storage.bits.element_size() == 2
            and storage.relayout is None
            and not storage.widened
            and isinstance(region, Block)
            and (region.contiguous or region.run >= _RUN)
            and kernels.on_gpu(storage.bits)
        )

    def digest_of_source(self, index: int, region: Region, flat: torch.Tensor) -> Digest:
        """Digest of a region's elements, taken from a flat checkpoint tensor instead of from live memory."""
        if region.contiguous:
            first, last = region.source_extent
            return digest_torch(self.seeds[index], flat[first:last], first)
        return self._digest_pieces(self.seeds[index], region, lambda piece: piece.gather_source(flat))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Read on a separate CUDA stream, so that reads on a GPU do not queue up behind forward passes."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def digest_of(self, index: int, region: Region) -> Digest:
        """Digest of a region of a tensor, or of a piece of one, as it is now. Call it within `aside`."""
        storage, seed = self._storages[region.storage], self.seeds[index]
        if storage.widened:  # a number that bfloat16 does not have must not have the digest of one that it has
            excess = sum(len(storage.lower_halves(piece)) for piece in region.pieces(_PIECE))
            return self._digest_pieces(seed, region, storage.gather) + Digest(excess, excess)
        if self.plain(region):
            first, last = region.target_extent
            return digest_torch(seed, storage.bits[first:last], region.source_extent[0])
        return self._digest_pieces(seed, region, storage.gather)

    def _digest_pieces(self, seed: int, region: Region, gather: Callable[[Region], torch.Tensor]) -> Digest:
        total = Digest()
        for piece in region.pieces(_PIECE):
            bits = gather(piece)
            indices = torch.from_numpy(piece.indices(np.arange(piece.numel))).to(bits.device)
            total += digest_torch(seed, bits, indices=indices)
        return total


def view_bits(spec: TensorSpec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One tensor of a view as a flat integer tensor; FormatError if it differs from the table's shape or dtype."""
    try:
        tensor = tensors[spec.name]
    except KeyError:
        raise FormatError(f"{spec.name} is missing from the checkpoint") from None
    if tuple(tensor.shape) != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
        raise FormatError(
            f"{spec.name} is {tensor.dtype} {list(tensor.shape)} in the checkpoint, "
            f"and {spec.dtype} {list(spec.shape)} in the run"
        )
    return flat_bits(tensor.contiguous())
