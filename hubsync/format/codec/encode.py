"""A patch -> records, code books, chunk rows and payload. docs/FORMAT.md is the specification.

Three stages. Each is a pure function of the results of the stages before:

1. `_cut` and `_sort`: the changes of each chunk, in class order.
2. `_fit`: the code book with the fewest bits. All tensors of one dtype share it.
3. `_write`: each chunk as bits.

Chunks are independent jobs, on as many threads as torch is given. A job makes few calls of compiled code, because
threads that return to Python often wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from hubsync import kernels
from hubsync.format.patch import TensorDelta, TensorValues
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.classes import CLASSES, ClassMap
from hubsync.kernels.parallel import add_up, each

from . import costs, streams
from .book import FIELDS, GAP, LIST_REST, MAX_K, MAX_PLANES, NO_PLANE, RICE, TAIL, USUAL, Book, columns, one_class
from .costs import MAX_GAP_K
from .grid import Grid
from .layout import ABSOLUTE, CODED, DENSE, RECORD_COLUMNS, OldBits
from .rows import SHIFT, RowWriter, zigzag

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
        number: of the chunk in its grid.
        counts: int64[classes], changes of each class.
        sizes: int64[classes], elements of each class.
        diffs: signed[n].
        listed: int64[classes], listed elements of each class.
        gaps: int32[sum of listed], in class order.
        gap_cost: int64[classes, MAX_GAP_K], bits of the gaps for each Rice parameter.
    """

    number: int
    counts: np.ndarray
    sizes: np.ndarray
    diffs: np.ndarray
    listed: np.ndarray
    gaps: np.ndarray
    gap_cost: np.ndarray


@dataclass(frozen=True, eq=False)
class _WrittenChunk:
    """A chunk as bits: its number in the grid, the columns of its row, and uint8[bytes]."""

    number: int
    counts: np.ndarray
    shift: int
    payload: np.ndarray


@dataclass(frozen=True, eq=False)
class _CodedGroup:
    """Tensors with one code book: table index -> written chunks, or all differences (uint8[bytes]) if smaller."""

    book: Book
    tensors: dict[int, list[_WrittenChunk] | np.ndarray]


def encode(
    table: TensorTable,
    patch: Mapping[int, TensorDelta | TensorValues],
    old: OldBits | None = None,
    *,
    grid_of: Callable[[int, int], Grid] | None = None,
) -> Encoded:
    """Encode a sound patch.

    Args:
        patch: table index -> changes or new values of the tensor.
        old: the weights that the patch applies to. With them, changes are coded by class (*compact*). It must hold all
            of every tensor that changes.
        grid_of: (rows, cols) -> the grid of a tensor; by default the one for the encoding.
    """
    grid_of = grid_of or (Grid.contiguous if old is None else Grid.tiles)
    changes = {index: delta for index, delta in sorted(patch.items()) if isinstance(delta, TensorDelta)}
    values = {index: delta for index, delta in sorted(patch.items()) if isinstance(delta, TensorValues)}
    grids = {index: grid_of(*table[index].matrix) for index in changes}
    # Vectors are too small to be cut, and a rank may hold a part of one (a bias): they are not coded by class.
    kinds = {index: (table[index].dtype, old is not None and grid.rows > 1) for index, grid in grids.items()}
    classes = 1 if old is None else CLASSES
    groups = []
    for kind in dict.fromkeys(kinds.values()):
        own = {index: grid for index, grid in grids.items() if kinds[index] == kind}
        groups.append(_encode_group(table, changes, own, old if kind[1] else None, classes))
    return _assemble(groups, grids, values, columns(classes))


def _encode_group(
    table: TensorTable, patch: dict[int, TensorDelta], grids: dict[int, Grid], old: OldBits | None, classes: int
) -> _CodedGroup:
    """Encode tensors of one dtype. Without `old` all elements are of class 0."""
    spec = table[next(iter(grids))]
    cut = each(lambda index: _cut(index, patch[index], grids[index]), list(grids))
    chunks = [chunk for own in cut for chunk in own]
    low = _lowest_class(spec.dtype, chunks, old, classes)
    in_order = each(partial(_sort, None if old is None else ClassMap.of(spec.dtype, low), old, classes), chunks)
    book = _fit(low, in_order, spec.width)
    written = iter(each(partial(_write, book), in_order))
    tensors: dict[int, list[_WrittenChunk] | np.ndarray] = {}
    for index, own in zip(grids, cut, strict=True):
        bits = [next(written) for _ in own]
        tensors[index] = _dense(table[index], patch[index]) if _is_larger_than_dense(bits, table[index]) else bits
    coded = [chunk for own in tensors.values() if isinstance(own, list) for chunk in own]
    return _CodedGroup(replace(book, orders=_fit_orders(coded, len(book.orders))), tensors)


def _assemble(
    groups: Sequence[_CodedGroup], grids: dict[int, Grid], values: dict[int, TensorValues], width: int
) -> Encoded:
    rows = RowWriter()
    records: list[tuple[int, int, int, int]] = []
    payload = [np.zeros(0, np.uint8)]
    for number, group in enumerate(groups):
        for index, chunks in group.tensors.items():
            if isinstance(chunks, np.ndarray):
                records.append((index, 0, 0, DENSE))
                payload.append(chunks)
                continue
            grid = grids[index]
            records.append((index, grid.chunk_rows, grid.chunk_cols, CODED | number << 8))
            rows.append(group.book, np.array([chunk.number for chunk in chunks]), _rows(chunks), grid.count)
            payload += [chunk.payload for chunk in chunks]
    for index, new in values.items():
        records.append((index, 0, 0, ABSOLUTE))
        payload.append(_little_endian(new.patterns).view(np.uint8))
    return Encoded(
        np.array(records, np.uint32).reshape(-1, RECORD_COLUMNS),
        np.array([group.book.pack() for group in groups], np.uint8).reshape(-1, width),
        rows.data(),
        np.concatenate(payload),
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
    return _SortedChunk(chunk.number, counts, sizes, diffs, listed, gaps, gap_cost)


def _rectangle(chunk: _CutChunk, old: OldBits) -> kernels.Bits:
    bits = old.rectangle(chunk.index, chunk.rows, chunk.cols)
    if bits is None:
        raise ValueError(f"the old weights of tensor {chunk.index} are needed to encode its changes")
    return bits


def _lowest_class(dtype: str, chunks: Sequence[_CutChunk], old: OldBits | None, classes: int) -> int:
    """Exponent of class 0. Few changes (0.2 %) lie above the octave that the highest class begins with.

    If changes do not thin out towards it, but end with it (a first step from a bf16 checkpoint), the highest class
    begins with the octave above. Without `old` no exponent is above class 0.
    """
    if old is None:
        return 0 if classes == 1 else ClassMap.of(dtype, 0).mask
    any_map = ClassMap.of(dtype, 0)

    def exponents(chunk: _CutChunk) -> np.ndarray:
        step = -(-len(chunk.positions) // _SAMPLE)
        found = any_map.exponents(kernels.gather(_rectangle(chunk, old), chunk.positions[::step]))
        return np.bincount(found, minlength=256) * step

    some = chunks[:: -(-len(chunks) // _SAMPLED_CHUNKS)]
    histogram = np.sum([exponents(chunk) for chunk in some], axis=0)
    shares = np.cumsum(histogram[::-1])[::-1] / histogram.sum()
    top = int(np.flatnonzero(shares > 0.002)[-1])
    return max(0, top + int(shares[top] > 0.05) - CLASSES + 1)


# --- 2: the code parameters with the fewest bits ----------------------------------------------------


def _fit(low: int, chunks: Sequence[_SortedChunk], width: int) -> Book:
    """The code book for these chunks. Orders of the row columns are fitted later, to the rows that are written."""
    count = len(chunks[0].counts)
    codes = np.full((count, 3 + MAX_PLANES), NO_PLANE, np.uint8)
    codes[:, GAP] = np.argmin(np.sum([chunk.gap_cost for chunk in chunks], axis=0), axis=1)
    (magnitudes,) = add_up(
        lambda chunk, totals: costs.magnitude_counts(chunk.counts, chunk.diffs, *totals),
        chunks,
        lambda: (np.zeros((count, costs.MAGNITUDES), np.int64),),
    )
    codes[:, USUAL] = np.maximum(1, np.argmax(magnitudes[:, : 1 << (width - 1)], axis=1))
    found, beyond = add_up(
        lambda chunk, totals: costs.distance_counts(chunk.counts, chunk.diffs, codes[:, USUAL], *totals),
        chunks,
        lambda: (np.zeros((count, costs.DISTANCES), np.int64), np.zeros((2, count, MAX_K + 1), np.int64)),
    )
    lists = np.sum([chunk.counts > 0 for chunk in chunks], axis=0)
    for c in range(count):
        codes[c, TAIL:] = _fit_magnitudes(found[c], beyond[:, c], int(lists[c]), width)
    return Book(low, np.zeros(count + FIELDS, np.uint8), codes)


def _fit_magnitudes(found: np.ndarray, beyond: np.ndarray, lists: int, width: int) -> np.ndarray:
    """The code of the distances of one class: uint8[1 + MAX_PLANES], the tail and the planes.

    Args:
        found: int64[DISTANCES], number of changes with each distance.
        beyond: int64[2, MAX_K + 1], bits of larger distances in an Exp-Golomb or Rice code.
        lists: number of chunks. Each has a list in every plane.
    """
    code = np.full(1 + MAX_PLANES, NO_PLANE, np.uint8)
    best, spent, chosen = np.inf, 0.0, 0
    left = int(found.sum()) + int(beyond[0, 0] > 0)
    for planes in range(MAX_PLANES + 1):
        tail_cost, tail = _best_tail(found[planes:], beyond, width)
        if spent + tail_cost < best:
            best, chosen, code[0] = spent + tail_cost, planes, tail
        if planes == MAX_PLANES or left <= 0:
            break
        ending = int(found[planes])
        list_cost, code[1 + planes] = _best_list(ending, left, lists)
        spent += list_cost
        left -= ending
    code[1 + chosen :] = NO_PLANE
    return code


def _tail_bits() -> np.ndarray:
    """int64[2, MAX_K + 1, DISTANCES]: bits of a number in an Exp-Golomb and in a Rice code of every parameter."""
    k, values = np.arange(MAX_K + 1)[:, None], np.arange(costs.DISTANCES)
    exp_golomb = 2 * np.floor(np.log2(values + (1 << k))).astype(np.int64) - k + 1
    return np.stack([exp_golomb, (values >> k) + k + 1])


_TAIL_BITS = _tail_bits()


def _best_list(ending: int, left: int, lists: int) -> tuple[float, int]:
    """(bits, code) of a plane in which `ending` of `left` changes end: it lists either these, or the others."""
    options = []
    for listed, flag in ((left - ending, LIST_REST), (ending, 0)):
        share = listed / left
        k = np.arange(MAX_GAP_K)
        with np.errstate(divide="ignore"):
            quotients = 1 / -np.expm1(np.exp2(k) * np.log1p(-share)) if 0 < share < 1 else np.ones(len(k))
        last = min(left / lists, 1 / share if share else np.inf) / np.exp2(k) + k + 1  # of a list, up to its end
        cost = listed * (k + quotients) + lists + min(lists, listed) * last
        options.append((float(cost.min()), flag | int(np.argmin(cost))))
    return min(options)


def _best_tail(found: np.ndarray, beyond: np.ndarray, width: int) -> tuple[float, int]:
    """(bits, code) of distances, counted from the first that no plane ends."""
    orders = min(width, MAX_K) + 1
    bits = beyond[:, :orders] + _TAIL_BITS[:, :orders, : len(found)] @ found
    kind, k = divmod(int(np.argmin(bits)), bits.shape[1])
    return float(bits[kind, k]), k | (RICE if kind else 0)


def _fit_orders(chunks: Sequence[_WrittenChunk], count: int) -> np.ndarray:
    """uint8[count], the Exp-Golomb orders of the columns of these chunks' rows."""
    if not chunks:
        return np.zeros(count, np.uint8)
    rows = _rows(chunks)
    return np.array([np.argmin(costs.exp_golomb_cost(rows[:, c].copy())) for c in range(count)], np.uint8)


# --- 3: each chunk as bits --------------------------------------------------------------------------


def _write(book: Book, chunk: _SortedChunk) -> _WrittenChunk:
    shift, payload = streams.write(
        chunk.counts, chunk.sizes, chunk.listed, chunk.gaps, chunk.gap_cost, chunk.diffs, book.codes
    )
    return _WrittenChunk(chunk.number, chunk.counts, shift, payload)


def _rows(chunks: Sequence[_WrittenChunk]) -> np.ndarray:
    """int64[chunks, classes + FIELDS]: the columns of their rows."""
    rest = np.array([[chunk.shift, len(chunk.payload)] for chunk in chunks], np.int64).reshape(-1, FIELDS)
    rest[:, SHIFT] = zigzag(rest[:, SHIFT])
    return np.concatenate([np.array([chunk.counts for chunk in chunks], np.int64), rest], axis=1)


def _is_larger_than_dense(chunks: Iterable[_WrittenChunk], spec: TensorSpec) -> bool:
    return sum(len(chunk.payload) + chunk.counts.nbytes // 4 + 8 for chunk in chunks) > spec.nbytes


def _dense(spec: TensorSpec, delta: TensorDelta) -> np.ndarray:
    """uint8[bytes]: the difference of every element."""
    dense = np.zeros(spec.numel, delta.diffs.dtype.newbyteorder("<"))
    dense[delta.indices] = delta.diffs
    return dense.view(np.uint8)


def _little_endian(patterns: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(patterns, patterns.dtype.newbyteorder("<"))
