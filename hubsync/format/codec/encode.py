"""A patch -> records, code books, chunk rows and payload. docs/FORMAT.md is the specification.

Three stages. Each is a pure function of the results of the stages before:

1. `_cut` and `_sort`: the changes of each chunk, in class order.
2. `fit`: the code book with the fewest bits. All tensors of one dtype share it.
3. `_write`: each chunk as bits.

Chunks are independent jobs, on as many threads as torch is given. A job makes few calls of compiled code, because
threads that return to Python often wait for each other. `device` does all stages for changes on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import numpy as np
import torch

from hubsync import kernels
from hubsync.format.device_patch import DevicePatch
from hubsync.format.patch import TensorDelta, TensorValues
from hubsync.format.table import WIDTHS, TensorSpec, TensorTable
from hubsync.kernels.classes import CLASSES, ClassMap
from hubsync.kernels.parallel import add_up, each

from . import costs, streams
from .book import MAX_K, Book, columns, one_class
from .device import DeviceChunks, DeviceGroup, Kind, can_encode
from .device_classes import ClassedChunks, ClassedGroup, old_weights
from .fit import fit, fit_orders
from .grid import Grid
from .layout import ABSOLUTE, CODE, CODED, DENSE, RECORD_COLUMNS, Measured, OldBits, key_of, parts_of
from .rows import BYTES, RowWriter, zigzag

_SAMPLE = 1024  # changes of a chunk whose old exponents are read
_SAMPLED_CHUNKS = 64


@dataclass(frozen=True, eq=False)
class Encoded:
    """Content of a delta part: uint32[T, RECORD_COLUMNS], uint8[B, columns], uint8[bytes] and uint8[bytes]."""

    tensors: np.ndarray
    books: np.ndarray
    chunks: np.ndarray
    payload: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.tensors.nbytes + self.books.nbytes + self.chunks.nbytes + self.payload.nbytes


@dataclass(frozen=True, eq=False)
class _CutChunk:
    """The changes of one chunk of a tensor: positions (int32[n], ascending) and differences (signed[n])."""

    index: int
    number: int
    rows: slice
    cols: slice
    positions: np.ndarray
    diffs: np.ndarray


@dataclass(frozen=True, eq=False)
class _SortedChunk:
    """A chunk in class order.

    Attributes:
        key: of the chunk (`layout.key_of`).
        counts: int64[classes], changes of each class.
        sizes: int64[classes], elements of each class.
        diffs: signed[n].
        listed: int64[classes], listed elements of each class.
        gaps: int32[sum of listed], in class order.
        gap_cost: int64[classes, MAX_GAP_K], bits of the gaps for each Rice parameter.
    """

    key: int
    counts: np.ndarray
    sizes: np.ndarray
    diffs: np.ndarray
    listed: np.ndarray
    gaps: np.ndarray
    gap_cost: np.ndarray


class _HostChunks:
    """Chunks in main memory, in class order: what they hold (`fit.Counts`), and their bits."""

    def __init__(self, chunks: Sequence[_SortedChunk], classes: int):
        self._chunks, self._classes = chunks, classes
        self._payloads: list[np.ndarray] = []

    def gap_cost(self) -> np.ndarray:
        return np.sum([chunk.gap_cost for chunk in self._chunks], axis=0)

    def lists(self) -> np.ndarray:
        return np.sum([chunk.counts > 0 for chunk in self._chunks], axis=0)

    def magnitude_counts(self) -> np.ndarray:
        (found,) = add_up(
            lambda chunk, totals: costs.magnitude_counts(chunk.counts, chunk.diffs, *totals),
            self._chunks,
            lambda: (np.zeros((self._classes, costs.MAGNITUDES), np.int64),),
        )
        return found

    def distance_counts(self, usual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        zeros = ((self._classes, costs.DISTANCES), (2, self._classes, MAX_K + 1))
        found, beyond = add_up(
            lambda chunk, totals: costs.distance_counts(chunk.counts, chunk.diffs, usual, *totals),
            self._chunks,
            lambda: tuple(np.zeros(shape, np.int64) for shape in zeros),
        )
        return found, beyond

    def measure(self, book: Book) -> Measured:
        """Write the chunks: to measure them is as much work."""
        written = each(partial(_write, book), self._chunks)
        self._payloads = [payload for _, payload in written]
        shifts = zigzag(np.array([shift for shift, _ in written], np.int64))
        rest = np.stack([shifts, np.array([len(payload) for payload in self._payloads], np.int64)], axis=1)
        counts = np.array([chunk.counts for chunk in self._chunks], np.int64)
        return Measured(self._keys(), np.concatenate([counts, rest], axis=1))

    def payload(self, is_kept: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(key, bytes) of those chunks of `measure` that are kept."""
        kept = zip(self._keys().tolist(), self._payloads, is_kept, strict=True)
        return [(key, payload) for key, payload, is_own in kept if is_own]

    def _keys(self) -> np.ndarray:
        return np.array([chunk.key for chunk in self._chunks], np.int64)


@dataclass(frozen=True, eq=False)
class _Group:
    """The changes of all tensors that share a code book: in main memory, in their grids, and on a device."""

    table: TensorTable
    dtype: str
    changes: dict[int, TensorDelta]
    grids: dict[int, Grid]
    old: OldBits | None
    classes: int
    device: DeviceChunks | ClassedChunks | None

    @property
    def kind(self) -> Kind:
        return self.dtype, self.old is not None

    def grid_sizes(self, tensors: np.ndarray) -> np.ndarray:
        """int64[n, 2], chunk_rows and chunk_cols of these tensors."""
        if self.device is not None:
            return self.device.sizes(tensors)
        grids = [self.grids[index] for index in tensors.tolist()]
        return np.array([(grid.chunk_rows, grid.chunk_cols) for grid in grids], np.int64)


@dataclass(frozen=True, eq=False)
class _CodedGroup:
    """The records of a group.

    Attributes:
        records: int64[T, RECORD_COLUMNS], ascending by tensor; the row of the book is missing in those that need it.
        chunks: number of chunks of the coded tensors.
        numbers: int64[r], ascending: which of these chunks have changes.
        columns: int64[r, classes + FIELDS], of the rows of these.
        payload: the bytes of the records, in pieces.
    """

    book: Book
    records: np.ndarray
    chunks: int
    numbers: np.ndarray
    columns: np.ndarray
    payload: list[np.ndarray]


def encode(
    table: TensorTable,
    patch: Mapping[int, TensorDelta | TensorValues],
    old: OldBits | None = None,
    *,
    grid_of: Callable[[int, int], Grid] | None = None,
) -> Encoded:
    """Encode a sound patch.

    Args:
        patch: table index -> changes or new values of the tensor. The bits of a `DevicePatch` are the same, and made
            where its changes are, unless `grid_of` is given, or `old` is not in tensors on that device.
        old: the weights that the patch applies to. With them, changes are coded by class (*compact*). It must hold all
            of every tensor that changes.
        grid_of: (rows, cols) -> the grid of a tensor; by default the one for the encoding.
    """
    device = None if grid_of is not None else _on_device(table, patch, old)
    patch = patch if device is None else device.patch.host
    grid_of = grid_of or (Grid.contiguous if old is None else Grid.tiles)
    changes = {index: delta for index, delta in sorted(patch.items()) if isinstance(delta, TensorDelta)}
    values = {index: delta for index, delta in sorted(patch.items()) if isinstance(delta, TensorValues)}
    grids = {index: grid_of(*table[index].matrix) for index in changes}
    # Vectors are too small to be cut, and a rank may hold a part of one (a bias): they are not coded by class.
    kinds = {index: (table[index].dtype, old is not None and grid.rows > 1) for index, grid in grids.items()}
    first = {kind: index for index, kind in reversed(kinds.items())}
    on_device = {} if device is None else device.first_tensors()
    for kind, index in on_device.items():
        first[kind] = min(index, first.get(kind, index))
    classes = 1 if old is None else CLASSES
    groups = []
    for kind in sorted(first, key=first.__getitem__):
        own = {index: grid for index, grid in grids.items() if kinds[index] == kind}
        there = device if kind in on_device else None
        group = _Group(table, kind[0], changes, own, old if kind[1] else None, classes, there)
        groups.append(_encode_group(group))
    return _assemble(groups, values, columns(classes))


def _on_device(
    table: TensorTable, patch: Mapping[int, TensorDelta | TensorValues], old: OldBits | None
) -> DeviceChunks | ClassedChunks | None:
    """The chunks that are encoded on a device; None if none are."""
    if not isinstance(patch, DevicePatch) or not can_encode(patch):
        return None
    if old is None:
        return DeviceChunks(table, patch)
    weights = old_weights(patch, old)
    return None if weights is None else ClassedChunks(table, patch, weights)


def prepare(device: torch.device, *, by_class: bool = False) -> None:
    """Compile what encoding on this device needs, with or without old weights: seconds in the first process."""
    one = torch.ones(1, dtype=torch.int16, device=device)
    table = TensorTable([TensorSpec("any", (8, 8), "BF16")])
    patch = DevicePatch(one.long(), one, 2 * one, np.array([[0, 0, table.numel, 0]]), {})
    encode(table, patch, _Ones(device) if by_class else None)


class _Ones:
    """Old weights for `prepare`."""

    def __init__(self, device: torch.device):
        self._held = torch.ones((8, 8), dtype=torch.int16, device=device)

    def whole(self, index: int) -> torch.Tensor:
        return self._held

    def rectangle(self, index: int, rows: slice, cols: slice) -> torch.Tensor:
        return self._held[rows, cols]


def _encode_group(group: _Group) -> _CodedGroup:
    """Encode tensors of one dtype. Without `old` all elements are of class 0."""
    classes = group.classes
    cut = each(lambda index: _cut(index, group.changes[index], group.grids[index]), list(group.grids))
    chunks = [chunk for own in cut for chunk in own]
    if isinstance(group.device, DeviceChunks):
        chunks += _crowded(group, group.device)
    low = _lowest_class(group, chunks)
    device = None if group.device is None else group.device.group(group.kind, low)
    host = None
    if chunks:
        by = None if group.old is None else ClassMap.of(group.dtype, low)
        host = _HostChunks(each(partial(_sort, by, group.old, classes), chunks), classes)
    parts: list[_HostChunks | DeviceGroup | ClassedGroup] = [part for part in (host, device) if part is not None]
    book = fit(low, parts, WIDTHS[group.dtype])
    measured = [part.measure(book) for part in parts]
    keys = np.concatenate([own.keys for own in measured])
    order = np.argsort(keys, kind="stable")
    rows = np.concatenate([own.columns for own in measured])[order]

    tensor_of, numbers = parts_of(keys[order])
    tensors, starts, of = np.unique(tensor_of, return_index=True, return_inverse=True)
    nbytes = np.add.reduceat(rows[:, classes + BYTES] + 2 * classes + 8, starts)
    is_dense = nbytes > group.table.columns.nbytes[tensors]
    records, chunk_counts = _records(group, tensors, is_dense)
    is_kept = ~is_dense[of]
    rows, numbers = rows[is_kept], (numbers + (np.cumsum(chunk_counts) - chunk_counts)[of])[is_kept]

    kept = np.empty_like(is_kept)
    kept[order] = is_kept
    pieces = _dense_tensors(group, tensors[is_dense])
    pieces += [] if host is None else host.payload(kept[: len(chunks)])
    payload = _in_order(pieces, None if device is None else device.payload(kept[len(chunks) :]))
    return _CodedGroup(replace(book, orders=fit_orders(rows)), records, int(chunk_counts.sum()), numbers, rows, payload)


def _records(group: _Group, tensors: np.ndarray, is_dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64[T, RECORD_COLUMNS], int64[T]): the records of tensors, and the chunks of each, none of dense ones."""
    sizes = group.grid_sizes(tensors)
    shapes = np.stack([group.table.columns.rows[tensors], group.table.columns.cols[tensors]], axis=1)
    records = np.concatenate([tensors[:, None], sizes, np.full((len(tensors), 1), CODED)], axis=1)
    records[is_dense, 1:] = 0, 0, DENSE
    return records, np.where(is_dense, 0, (-(-shapes // sizes)).prod(axis=1))


def _assemble(groups: Sequence[_CodedGroup], values: dict[int, TensorValues], width: int) -> Encoded:
    rows = RowWriter()
    records: list[np.ndarray] = [np.zeros((0, RECORD_COLUMNS), np.int64)]
    payload: list[np.ndarray] = []
    for number, group in enumerate(groups):
        group.records[group.records[:, CODE] == CODED, CODE] |= number << 8
        records.append(group.records)
        if group.chunks:
            rows.append(group.book, group.numbers, group.columns, group.chunks)
        payload += group.payload
    for index, new in values.items():
        records.append(np.array([[index, 0, 0, ABSOLUTE]]))
        payload.append(_little_endian(new.patterns).view(np.uint8))
    return Encoded(
        np.concatenate(records).astype(np.uint32),
        np.array([group.book.pack() for group in groups], np.uint8).reshape(-1, width),
        rows.data(),
        payload[0] if len(payload) == 1 else np.concatenate([np.zeros(0, np.uint8), *payload]),
    )


# --- 1: the changes of each chunk, in class order ---------------------------------------------------


def _cut(index: int, delta: TensorDelta, grid: Grid) -> list[_CutChunk]:
    """The chunks of a tensor that have changes."""
    numbers, bounds, order, positions = grid.split(delta.indices)
    diffs = delta.diffs if grid.ascends else delta.diffs[order]
    return [
        _CutChunk(index, number, *grid.slices(number), positions[start:stop], diffs[start:stop])
        for number, start, stop in zip(numbers.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]


def _crowded(group: _Group, device: DeviceChunks) -> list[_CutChunk]:
    """The chunks that the device leaves to the host."""
    out = []
    for index, number, positions, diffs in device.crowded(group.kind):
        place = Grid.contiguous(*group.table[index].matrix).slices(number)
        out.append(_CutChunk(index, number, *place, positions, diffs))
    return out


def _sort(by: ClassMap | None, old: OldBits | None, classes: int, chunk: _CutChunk) -> _SortedChunk:
    """Bring the changes into class order, and list their gaps. Without `old` all elements are of class 0."""
    if by is None or old is None:
        counts = one_class(classes, len(chunk.positions))
        sizes = one_class(classes, (chunk.rows.stop - chunk.rows.start) * (chunk.cols.stop - chunk.cols.start))
        ranks, diffs = chunk.positions, chunk.diffs
    else:
        sizes, class_of, ranks = kernels.rank(_rectangle(chunk, old), chunk.positions, by)
        counts, ranks, diffs = costs.by_class(classes, class_of, ranks, chunk.diffs)
    listed, gaps, gap_cost = costs.list_gaps(counts, sizes, ranks)
    return _SortedChunk(key_of(chunk.index, chunk.number), counts, sizes, diffs, listed, gaps, gap_cost)


def _rectangle(chunk: _CutChunk, old: OldBits) -> kernels.Bits:
    bits = old.rectangle(chunk.index, chunk.rows, chunk.cols)
    if bits is None:
        raise ValueError(f"the old weights of tensor {chunk.index} are needed to encode its changes")
    return bits


def _lowest_class(group: _Group, chunks: Sequence[_CutChunk]) -> int:
    """Exponent of class 0. Few changes (0.2 %) lie above the octave that the highest class begins with.

    If changes do not thin out towards it, but end with it (a first step from a bf16 checkpoint), the highest class
    begins with the octave above. Without `old` no exponent is above class 0.
    """
    any_map, old = ClassMap.of(group.dtype, 0), group.old
    if old is None:
        return 0 if group.classes == 1 else any_map.mask

    def exponents(chunk: _CutChunk) -> np.ndarray:
        step = -(-len(chunk.positions) // _SAMPLE)
        found = any_map.exponents(kernels.gather(_rectangle(chunk, old), chunk.positions[::step]))
        return np.bincount(found, minlength=256) * step

    device = group.device if isinstance(group.device, ClassedChunks) else None
    keys = np.array([key_of(chunk.index, chunk.number) for chunk in chunks], np.int64)
    every = keys if device is None else np.sort(np.append(keys, device.keys(group.kind)))
    some = every[:: -(-len(every) // _SAMPLED_CHUNKS)]
    histogram = np.zeros(256, np.int64) if device is None else device.exponents(group.kind, some, _SAMPLE)
    histogram += np.sum([exponents(chunks[at]) for at in np.flatnonzero(np.isin(keys, some))], axis=0, dtype=np.int64)
    shares = np.cumsum(histogram[::-1])[::-1] / histogram.sum()
    top = int(np.flatnonzero(shares > 0.002)[-1])
    return max(0, top + int(shares[top] > 0.05) - CLASSES + 1)


# --- 3: each chunk as bits --------------------------------------------------------------------------


def _write(book: Book, chunk: _SortedChunk) -> tuple[int, np.ndarray]:
    """(shift, uint8[bytes])"""
    return streams.write(chunk.counts, chunk.sizes, chunk.listed, chunk.gaps, chunk.gap_cost, chunk.diffs, book.codes)


def _dense_tensors(group: _Group, tensors: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(key, uint8[bytes]): the difference of every element of these tensors."""
    deltas = group.changes
    if group.device is not None and len(tensors):
        deltas = {**group.device.patch.deltas(tensors.tolist()), **deltas}
    dense = []
    for index in tensors.tolist():
        diffs = np.zeros(group.table[index].numel, deltas[index].diffs.dtype.newbyteorder("<"))
        diffs[deltas[index].indices] = deltas[index].diffs
        dense.append((key_of(index, 0), diffs.view(np.uint8)))
    return dense


def _in_order(
    pieces: list[tuple[int, np.ndarray]], device: tuple[np.ndarray, np.ndarray, np.ndarray] | None
) -> list[np.ndarray]:
    """Bytes by ascending key: those with a key each, and those of a `DeviceGroup.payload`."""
    pieces.sort(key=itemgetter(0))
    if device is None:
        return [piece for _, piece in pieces]
    keys, ends, data = device
    cuts = np.append(0, ends)[np.searchsorted(keys, [key for key, _ in pieces])]
    first, *runs = np.split(data, cuts)
    following = [part for (_, piece), run in zip(pieces, runs, strict=True) for part in (piece, run)]
    return [first, *following]


def _little_endian(patterns: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(patterns, patterns.dtype.newbyteorder("<"))
