"""The live tensors of a model on a GPU, numbered, so that kernels reach all of them in one launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from hubsync.format.digest import Digest, device_constants, key_of, tensor_seed
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import TORCH_DTYPES
from hubsync.kernels.gpu import numbering
from hubsync.kernels.gpu.digest import Digests
from hubsync.kernels.gpu.listing import Listed
from hubsync.kernels.gpu.numbering import Numbering, kind_of
from hubsync.publish.view.pieces import Pieces
from hubsync.publish.view.shards import Shard, local_part
from hubsync.publish.view.strided import row_of, whole_of

from .changes import OnDevice

_INTERPRETED = False  # tests: tensors in main memory count as tensors on a GPU


Memory = tuple[int, int, torch.dtype]


def memory_of(tensor: torch.Tensor) -> Memory:
    """What a contiguous tensor holds: its address, elements and dtype. The address alone may be that of a part."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


def why_not_listed(tensor: torch.Tensor, published: torch.dtype, shard: Shard | None = None) -> str | None:
    """Why the changes of a published tensor cannot be listed on a GPU; None if they can."""
    whole, _ = row_of(tensor)
    if whole is not whole_of(tensor):
        return "it is scattered in a parameter"
    if isinstance(tensor, Pieces) and len(tensor.pieces) > 1:
        return "this rank holds it in several pieces"
    held = local_part(whole)
    if held.device.type != "cuda" and not _INTERPRETED:
        return f"it is on {held.device}"
    if kind_of(held.dtype, published) is None:
        return f"{held.dtype} is published as {published}"
    if not held.is_contiguous():
        return "its memory is not contiguous"
    return "this rank holds no run of its elements" if shard is not None and shard.first is None else None


def digests_held(
    names: Sequence[str], live: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]
) -> dict[str, Digest]:
    """Digests of what this process holds of published tensors, as if it were all of them, in one launch.

    Args:
        names: of the published tensors. `why_not_listed` returns None for them, and they are on one device.
        live: the live tensors.
        dtypes: in which they are published.
    """
    places: dict[tuple[int, torch.dtype], int] = {}  # a live tensor and a dtype -> its number
    held: list[torch.Tensor] = []
    kinds: list[int] = []
    rows: list[tuple[int, int, int, int]] = []
    for tensor, dtype in zip(live, dtypes, strict=True):
        whole, start = row_of(tensor)
        number = places.setdefault((id(whole), dtype), len(places))
        if number == len(held):
            held.append(local_part(whole).view(-1))
            kinds.append(kind_of(held[-1].dtype, dtype) or 0)
        rows.append((number, start, local_part(tensor).numel(), 0))
    keys = np.array([key_of(tensor_seed(name)) for name in names], np.int64)
    numbers = Numbering(held, kinds, numbering.TILE)
    digests = Digests(numbers, np.array(rows, np.int64), keys, device_constants(numbers.device))
    lanes = digests.live().cpu().numpy().view(np.uint64).tolist()
    return {name: Digest(a, b) for name, (a, b) in zip(names, lanes, strict=True)}


class DeviceLive:
    """Published tensors whose changes can be listed on a GPU, as parts of the live tensors that contain them.

    Args:
        table: the tensor table.
        live: the live tensors, by table index.
        indices: table indices of the published tensors. `why_not_listed` returns None for them.
        order: ids of live tensors: those that are updated together have numbers near each other.
        shards: table index -> the elements that this process owns; default is all.

    Attributes:
        indices: the published tensors that are followed.
        wholes: the live tensors that contain them.
        numbering: numbers of the elements that this process holds of `wholes`.
        digests: digests of the published tensors, in the order of `indices`.
        spans: int64[n, 4], as in `DevicePatch`: the numbers of the published tensors' owned elements.
    """

    def __init__(
        self,
        table: TensorTable,
        live: Sequence[torch.Tensor],
        indices: Sequence[int],
        order: Sequence[int] = (),
        shards: Sequence[Shard] | None = None,
    ):
        self._table = table
        self._shards = shards
        self.indices = list(indices)
        at = {identity: number for number, identity in enumerate(order)}
        found = {id(whole_of(live[index])): whole_of(live[index]) for index in indices}
        self.wholes = sorted(found.values(), key=lambda whole: at.get(id(whole), len(at)))
        self._number = {id(whole): number for number, whole in enumerate(self.wholes)}
        self._places = {index: self._number[id(whole_of(live[index]))] for index in indices}
        self.dtypes = {self._places[index]: TORCH_DTYPES[table[index].dtype] for index in indices}
        held = [local_part(whole) for whole in self.wholes]
        self._formats = [(tensor.dtype, tensor.numel()) for tensor in held]
        kinds = [kind_of(tensor.dtype, self.dtypes[number]) or 0 for number, tensor in enumerate(held)]
        self.numbering = Numbering([tensor.view(-1) for tensor in held], kinds, numbering.TILE)
        self._live = live
        self._begun: tuple[list[int], torch.Tensor] | None = None
        self._place()

    def follow(self, live: Sequence[torch.Tensor]) -> None:
        """Read these live tensors from now on. They have the names and shapes of the table."""
        self._live = live
        for index, number in self._places.items():
            self.wholes[number] = whole_of(live[index])
        self._number = {id(whole): number for number, whole in enumerate(self.wholes)}

    def leave_out(self, indices: Collection[int]) -> None:
        """Follow these published tensors no longer."""
        if not set(indices).isdisjoint(self.indices):
            self.indices = [index for index in self.indices if index not in indices]
            self._place()

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The number of a live tensor."""
        return self._number.get(id(tensor))

    def place_of(self, index: int) -> int:
        """The number of the live tensor that contains a published one."""
        return self._places[index]

    def usable(self) -> dict[Memory, int]:
        """`memory_of` -> number, of the live tensors that kernels can read now, and lets kernels read them.

        Training may move and cast tensors, or replace their memory. Tensors that were given the same memory are left
        out: each has its own update.
        """
        held = [self._usable(number) for number in range(len(self.wholes))]
        self.numbering.refresh(held)
        shared = {address for address, times in Counter(self.numbering.addresses).items() if times > 1}
        known = {memory_of(tensor): number for number, tensor in enumerate(held) if tensor is not None}
        return {memory: number for memory, number in known.items() if memory[0] not in shared}

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """The live tensors, by table index."""
        return self._live

    @contextmanager
    def readable(self) -> Iterator[None]:
        """All live tensors can be read by kernels: through copies of those that were moved or cast."""
        tensors = []
        for number, whole in enumerate(self.wholes):
            held = self._usable(number)
            if held is None:
                self._begun = None  # this copy may be where another tensor was that `begin` has read
                held = local_part(whole).to(self.numbering.device, self._formats[number][0]).contiguous()
            tensors.append(held)
        self.numbering.refresh(tensors)
        yield

    def begin(self) -> None:
        """Start the digest of the live tensors. `proved` uses it if they are still the same, at the same addresses.

        Not if some must be read through copies: an address says nothing of the tensor that was copied.
        """
        self._begun = None
        held = [self._usable(number) for number in range(len(self.wholes))]
        if all(tensor is not None for tensor in held):
            self.numbering.refresh(held)
            self._begun = self.numbering.addresses, self.digests.live()

    def forget(self) -> None:
        """The live tensors are about to change: what `begin` has started is of no use."""
        self._begun = None

    def lanes(self) -> np.ndarray:
        """uint64[n, 2]: digests of the live tensors, in the order of `indices`."""
        with self.readable():
            return self.digests.live().cpu().numpy().view(np.uint64)

    def proved(self, collect: Callable[[], Listed]) -> tuple[OnDevice, np.ndarray, np.ndarray]:
        """What `collect` returns, the digests of the live tensors (uint64[n, 2]), and what the changes add to them.

        Within `readable`. Waits for the device.
        """
        begun, self._begun = self._begun, None
        listed = collect()
        added, counts = self.digests.changes(listed)
        live = begun[1] if begun is not None and begun[0] == self.numbering.addresses else self.digests.live()
        host = torch.cat([live, added, counts[:, None]], dim=1).cpu().numpy()
        lanes = host.view(np.uint64)
        found = OnDevice(listed.numbers, listed.old, listed.new, self.spans, host[:, 4])
        return found, lanes[:, :2], lanes[:, 2:4]

    def _place(self) -> None:
        """Find the elements of published tensors in live ones."""
        self._begun = None
        rows = np.array([self._span(index) for index in self.indices], np.int64).reshape(-1, 4)
        keys = np.array([key_of(tensor_seed(self._table[index].name)) for index in self.indices], np.int64)
        self.digests = Digests(self.numbering, rows, keys, device_constants(self.numbering.device))
        number, start, size, flat = rows.T
        first = self.numbering.first[number] + start
        self.spans = np.stack([np.array(self.indices, np.int64), first, size, flat], axis=1)

    def _span(self, index: int) -> tuple[int, int, int, int]:
        """(live tensor, first owned element in it, owned elements, flat index of the first one)"""
        start = row_of(self._live[index])[1]
        if self._shards is None:
            return self._places[index], start, self._table[index].numel, 0
        shard = self._shards[index]
        assert shard.first is not None
        return self._places[index], start + shard.start, shard.numel, shard.first

    def _usable(self, number: int) -> torch.Tensor | None:
        """What this process holds of a live tensor, if kernels can read it as they could at the beginning."""
        whole = self.wholes[number]
        held = whole if type(whole) is torch.nn.Parameter else local_part(whole)
        same = (held.dtype, held.numel()) == self._formats[number] and held.device == self.numbering.device
        return held if same and held.is_contiguous() else None
