"""Changes of tensor elements: finding, composing and proving them, and their patch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from hubsync import kernels
from hubsync.format.device_patch import DevicePatch
from hubsync.format.digest import Digest, DigestList, digest_change, digest_torch, tensor_seed
from hubsync.format.patch import Patch, TensorDelta, TensorValues
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import UNSIGNED, bits_of, difference, find_changes
from hubsync.kernels.compiled import compiled
from hubsync.publish.view.cast import integers
from hubsync.publish.view.shards import Shard
from hubsync.publish.view.strided import ElementRun

_CHUNK = 1 << 26  # elements compared at a time on a device: bounds the mask, and `nonzero` has a limit


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


@dataclass(frozen=True, eq=False)
class OnDevice:
    """The changed elements of 16-bit tensors on a GPU, in one list.

    Attributes:
        numbers: int64[n] on the device, ascending: the number of each changed element.
        old, new: int16[n] on the device: its bit patterns.
        spans: int64[S, 4], as in `DevicePatch`: which elements of which tensors have which numbers.
        counts: int64[S], the changes of each span.
    """

    numbers: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor
    spans: np.ndarray
    counts: np.ndarray

    @property
    def changed(self) -> int:
        return int(self.counts.sum())

    def change_of(self, index: int) -> Change | None:
        """The changes of one tensor, copied to the CPU. None if it is not in the list."""
        (rows,) = np.nonzero(self.spans[:, 0] == index)
        if len(rows) == 0:
            return None
        _, first, size, _ = self.spans[rows[0]].tolist()
        begin, end = torch.searchsorted(self.numbers, self.numbers.new_tensor([first, first + size])).tolist()
        indices = (self.numbers[begin:end] - first).cpu().numpy()
        return Change(indices, _unsigned(self.old[begin:end]), _unsigned(self.new[begin:end]))

    def without(self, indices: Collection[int]) -> OnDevice:
        """Without the changes of some tensors, by table index."""
        kept = ~np.isin(self.spans[:, 0], list(indices))
        return self if kept.all() else replace(self, spans=self.spans[kept], counts=self.counts[kept])


@dataclass(frozen=True, eq=False)
class Detected:
    """The changes since the last durable version, proved: what they lead to is what the model holds.

    Attributes:
        changes: table index -> the tensor's changes, on the CPU; no empty ones.
        values: table index -> bit patterns (unsigned, flat) of the owned elements of a tensor that was also written
            where no change was seen, so that its changes are not known. Disjoint from `changes`.
        before: table index -> digest of the last durable version, or of this process's part of it.
        after: table index -> digest of the live tensor, after the changes or with the new values.
        shards: table index -> the elements of the tensor that this process owns; None for all.
        whole: table index -> `values` of the whole tensor, of those that this process publishes; None for `values`.
        on_device: changes of other tensors, on a GPU.
    """

    changes: dict[int, Change]
    values: dict[int, np.ndarray]
    before: Sequence[Digest]
    after: Sequence[Digest]
    shards: Sequence[Shard] | None = None
    whole: dict[int, np.ndarray] | None = None
    on_device: OnDevice | None = None

    @property
    def is_empty(self) -> bool:
        return self.changed == 0

    @property
    def changed(self) -> int:
        """Number of changed elements; all elements of a tensor with new values."""
        on_device = 0 if self.on_device is None else self.on_device.changed
        on_host = sum(len(change.indices) for change in self.changes.values())
        return on_device + on_host + sum(map(len, self.values.values()))

    @property
    def has_parts(self) -> bool:
        """Whether this process publishes anything. With several ranks another one may publish its new values."""
        return bool(self.changes or self._published_values or (self.on_device and self.on_device.changed))

    @property
    def _published_values(self) -> dict[int, np.ndarray]:
        return self.values if self.whole is None else self.whole

    @property
    def start(self) -> Digest:
        """Digest before the changes, of the view or of this process's part of it."""
        return _total(self.before)

    @property
    def digest(self) -> Digest:
        """Digest after the changes, of the view or of this process's part of it."""
        return _total(self.after)

    @cached_property
    def patch(self) -> Patch | DevicePatch:
        """The changes in checkpoint coordinates. Computed at the first use: in the background."""
        on_host: dict[int, TensorDelta | TensorValues] = {
            index: _delta(globally(self.shards, index, change.indices), difference(change.old, change.new))
            for index, change in self.changes.items()
        }
        on_host |= {index: TensorValues(patterns) for index, patterns in self._published_values.items()}
        if (found := self.on_device) is None:
            return on_host
        return DevicePatch(found.numbers, found.old, found.new, found.spans, on_host)


def _total(digests: Sequence[Digest]) -> Digest:
    return digests.total if isinstance(digests, DigestList) else sum(digests, Digest())


def _delta(indices: np.ndarray, difference: np.ndarray) -> TensorDelta:
    """A patch has ascending indices. Several boxes of a tensor may be interleaved."""
    if (np.diff(indices) < 0).any():
        order = np.argsort(indices)
        indices, difference = indices[order], difference[order]
    return TensorDelta(indices, difference)


def in_order(owned: torch.Tensor, shard: Shard) -> torch.Tensor:
    """All elements of a tensor in row-major order, of a process that owns all of it in any boxes."""
    if shard.first is not None:
        return owned
    ordered = torch.empty_like(owned)
    for first, last, indices in shard.pieces():
        ordered[torch.from_numpy(indices).to(owned.device)] = owned[first:last]
    return ordered


def globally(shards: Sequence[Shard] | None, index: int, indices: np.ndarray) -> np.ndarray:
    """Flat indices in the checkpoint's tensor of elements, counted among those that this process owns."""
    return indices if shards is None else shards[index].globally(indices)


class TensorDigests:
    """Computes the digests of the elements that this process owns.

    Args:
        table: the tensor table.
        shards: table index -> the elements of the tensor that this process owns; default is all.
    """

    def __init__(self, table: TensorTable, shards: Sequence[Shard] | None = None):
        self._shards = shards
        self._seeds = [tensor_seed(spec.name) for spec in table]

    def of(self, index: int, owned: torch.Tensor) -> Digest:
        """Digest of the owned elements of a tensor, flat, in its served dtype. Reads all of them."""
        seed, bits = self._seeds[index], integers(owned)
        shard = None if self._shards is None else self._shards[index]
        if shard is None or shard.first is not None:
            return digest_torch(seed, bits, 0 if shard is None or shard.first is None else shard.first)
        digest = Digest()
        for first, last, indices in shard.pieces():
            digest += digest_torch(seed, bits[first:last], indices=torch.from_numpy(indices).to(bits.device))
        return digest

    def after(self, index: int, before: Digest, change: Change | None) -> Digest:
        """Digest of a tensor after a change. O(changes)."""
        if change is None:
            return before
        indices = globally(self._shards, index, change.indices)
        return before + digest_change(self._seeds[index], indices, change.old, change.new)


def split_by_tensor(run: ElementRun, change: Change) -> dict[int, Change]:
    """A change of a run of elements as changes of the tensors in the run; no empty ones."""
    if len(change.indices) and run.is_one_tensor(change.indices[-1]):
        return {run.indices[0]: change}
    return {
        index: Change(
            change.indices[part] - start if start else change.indices[part], change.old[part], change.new[part]
        )
        for index, part, start in run.split(change.indices)
    }


# --- comparing ---------------------------------------------------------------------------------------


def compare(old: torch.Tensor, new: torch.Tensor) -> Change:
    """The elements whose bits differ. Only these are copied from a device."""
    if old.device.type != "cpu":
        return compare_on_device(old, new)
    old_bits, new_bits = bits_of(old), bits_of(new)
    indices, _ = find_changes(old_bits, new_bits)
    return Change(indices, old_bits[indices], new_bits[indices])


def compare_on_device(old: torch.Tensor, new: torch.Tensor) -> Change:
    """`compare` on any device: with Triton on a GPU, with torch operations elsewhere."""
    if kernels.on_gpu(old):
        indices, before, after = kernels.gpu_kernels().changes(integers(old), integers(new))
        return Change(indices.cpu().numpy(), _unsigned(before), _unsigned(after))
    at = torch.cat(list(_unequal(integers(old), integers(new))))
    return Change(at.cpu().numpy(), _unsigned(integers(old)[at]), _unsigned(integers(new)[at]))


def _unequal(old: torch.Tensor, new: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, max(1, old.numel()), _CHUNK):
        stop = start + _CHUNK
        yield (old[start:stop] != new[start:stop]).nonzero().view(-1) + start


def _unsigned(bits: torch.Tensor) -> np.ndarray:
    return bits.cpu().numpy().view(UNSIGNED[8 * bits.element_size()])


# --- composing ---------------------------------------------------------------------------------------


class PendingChanges:
    """Changes of several steps by key, as lists of changes. Changes of similar size are composed, so each one is
    copied only a few times."""

    def __init__(self) -> None:
        self._parts: dict[int, list[Change]] = {}

    def add(self, key: int, change: Change) -> None:
        if len(change.indices) == 0:
            return
        parts = self._parts.setdefault(key, [])
        parts.append(change)
        while len(parts) > 1 and len(parts[-2].indices) < 2 * len(parts[-1].indices):
            later, earlier = parts.pop(), parts.pop()
            parts.append(compose(earlier, later))

    def length(self, key: int) -> int:
        """Elements in the lists of one key. An element may be in several."""
        return sum(len(change.indices) for change in self._parts.get(key, []))

    def keep(self, keys: Collection[int]) -> None:
        """Forget the changes of all other keys."""
        self._parts = {key: parts for key, parts in self._parts.items() if key in keys}

    def collect(self) -> dict[int, Change]:
        """One change for each key; no empty ones."""
        whole = {}
        for key, parts in self._parts.items():
            change = parts[-1]
            for earlier in reversed(parts[:-1]):
                change = compose(earlier, change)
            if len(change.indices):
                whole[key] = change
        return whole


def compose_all(first: dict[int, Change], second: dict[int, Change]) -> dict[int, Change]:
    """`compose` for each key; no empty changes."""
    out = {**first, **second}
    for key in first.keys() & second.keys():
        out[key] = compose(first[key], second[key])
    return {key: change for key, change in out.items() if len(change.indices)}


def compose(first: Change, second: Change) -> Change:
    """The change that equals `first` followed by `second`. Elements that return to their old bits disappear."""
    size = len(first.indices) + len(second.indices)
    indices, old, new = np.empty(size, np.int64), np.empty(size, first.old.dtype), np.empty(size, first.new.dtype)
    n = _merge(first.indices, first.old, first.new, second.indices, second.old, second.new, indices, old, new)
    return Change(indices[:n].copy(), old[:n].copy(), new[:n].copy())


@compiled
def _merge(
    indices_a: np.ndarray,
    old_a: np.ndarray,
    new_a: np.ndarray,
    indices_b: np.ndarray,
    old_b: np.ndarray,
    new_b: np.ndarray,
    indices: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
) -> int:
    """Merge two ascending lists: old patterns of the first, new ones of the second. Returns how many were written."""
    a, b, n = 0, 0, 0
    while a < len(indices_a) or b < len(indices_b):
        if b == len(indices_b) or (a < len(indices_a) and indices_a[a] < indices_b[b]):
            indices[n], old[n], new[n] = indices_a[a], old_a[a], new_a[a]
            a += 1
        elif a == len(indices_a) or indices_b[b] < indices_a[a]:
            indices[n], old[n], new[n] = indices_b[b], old_b[b], new_b[b]
            b += 1
        else:
            indices[n], old[n], new[n] = indices_a[a], old_a[a], new_b[b]
            a += 1
            b += 1
        n += old[n] != new[n]
    return n
