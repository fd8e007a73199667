"""A patch -> records, code books, chunk rows and payload. docs/FORMAT.md is the specification.

Chunks are independent jobs, on as many threads as torch is given. The code parameters are shared by all tensors of a
dtype, so the work has two passes: look at every chunk, then choose parameters and write. What is done with a chunk is a
few calls of compiled code: threads that come back to Python often wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hubsync import kernels
from hubsync.format.patch import Patch, TensorDelta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.classes import CLASSES, ClassMap
from hubsync.kernels.parallel import add_up, each

from . import streams
from .book import FIELDS, GAP, LIST_REST, MAX_K, MAX_PLANES, NO_PLANE, RICE, TAIL, USUAL, Book, columns, one_class
from .grid import Grid
from .layout import CODED, RECORD_COLUMNS, OldBits
from .rows import SHIFT, RowWriter, zigzag
from .streams import MAX_GAP_K

_SAMPLE = 1024  # changes of a chunk whose old exponents are looked at
_SAMPLED_CHUNKS = 64


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a delta part holds, as arrays: uint32[T, RECORD_COLUMNS], uint8[B, columns], uint8 and uint8."""

    tensors: np.ndarray
    books: np.ndarray
    chunks: np.ndarray
    payload: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.tensors.nbytes + self.books.nbytes + self.chunks.nbytes + self.payload.nbytes


@dataclass(eq=False)
class _Chunk:
    """A chunk with changes. Arrays are in class order once `_look` has seen it."""

    index: int
    number: int
    rows: slice
    cols: slice
    positions: np.ndarray
    diffs: np.ndarray
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    listed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    gaps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    gap_cost: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    shift: int = 0
    payload: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))


def encode(
    table: TensorTable, patch: Patch, old: OldBits | None = None, *, grid_of: Callable[[int, int], Grid] | None = None
) -> Encoded:
    """Encode a sound patch.

    Args:
        old: the weights that the patch applies to: changes are then coded by class (*compact*). It must hold all
            of every tensor that changes.
        grid_of: (rows, cols) -> how a tensor is cut; by default as the level needs it.
    """
    grid_of = grid_of or (Grid.contiguous if old is None else Grid.tiles)
    grids = {index: grid_of(*table[index].matrix) for index in sorted(patch)}
    rows = RowWriter()
    books: list[np.ndarray] = []
    records: list[tuple[int, int, int, int]] = []
    payload: list[np.ndarray] = []
    # Vectors are too small to be cut, and a rank may hold a part of one (a bias): theirs are not coded by class.
    kinds = {index: (table[index].dtype, old is None or grid.rows == 1) for index, grid in grids.items()}
    for kind in dict.fromkeys(kinds.values()):
        own = {index: grid for index, grid in grids.items() if kinds[index] == kind}
        cut = each(lambda item: list(_cut(item[0], patch[item[0]], item[1])), list(own.items()))
        chunks = dict(zip(own, cut, strict=True))
        dtype, alike = kind
        count = 1 if old is None else CLASSES
        flat = [chunk for some in chunks.values() for chunk in some]
        book = _choose_book(dtype, flat, table, None if alike else old, count)
        coded = {index: some for index, some in chunks.items() if not _is_larger_than_dense(some, table[index])}
        _fit_orders(book, [chunk for some in coded.values() for chunk in some])
        for index, grid in own.items():
            if index in coded:
                records.append((index, grid.chunk_rows, grid.chunk_cols, CODED | len(books) << 8))
                numbers = np.array([chunk.number for chunk in coded[index]])
                rows.append(book, numbers, _rows(coded[index]), grid.count)
                payload += [chunk.payload for chunk in coded[index]]
            else:
                records.append((index, 0, 0, 0))
                payload.append(_dense(table[index], patch[index]))
        books.append(book.pack())
    width = columns(1 if old is None else CLASSES)
    return Encoded(
        np.array(records, np.uint32).reshape(-1, RECORD_COLUMNS),
        np.array(books, np.uint8).reshape(-1, width),
        rows.data(),
        np.concatenate([np.zeros(0, np.uint8), *payload]),
    )


def _choose_book(dtype: str, chunks: Sequence[_Chunk], table: TensorTable, old: OldBits | None, count: int) -> Book:
    """The code parameters for these chunks; afterwards each is in class order, and written.

    Args:
        old: without it all elements are of class 0, the highest exponent and all below it.
        count: classes of the book.
    """
    highest = 0 if count == 1 else ClassMap.of(dtype, 0).mask
    low = highest if old is None else _lowest_class(dtype, chunks, old)
    classes = None if old is None else ClassMap.of(dtype, low)
    look = partial(_look, classes, old, count)
    (magnitudes,) = add_up(look, chunks, lambda: (np.zeros((count, streams.MAGNITUDES), np.int64),))
    book = _fit(low, chunks, magnitudes, table[chunks[0].index].width)
    each(partial(_finish, book), chunks)
    return book


def _cut(index: int, delta: TensorDelta, grid: Grid) -> Iterator[_Chunk]:
    numbers, bounds, order, positions = grid.split(delta.indices)
    diffs = delta.diffs if grid.ascends else delta.diffs[order]
    for number, start, stop in zip(numbers.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield _Chunk(index, number, *grid.slices(number), positions[start:stop], diffs[start:stop])


def _rectangle(chunk: _Chunk, old: OldBits) -> kernels.Bits:
    bits = old.rectangle(chunk.index, chunk.rows, chunk.cols)
    if bits is None:
        raise ValueError(f"the old weights of tensor {chunk.index} are needed to encode its changes")
    return bits


def _lowest_class(dtype: str, chunks: Sequence[_Chunk], old: OldBits) -> int:
    """Exponent of class 0. Few changes (0.2 %) lie above the octave that the highest class begins with.

    Where changes do not thin out towards it, but end with it (a first step from a bf16 checkpoint), it begins with the
    octave above.
    """
    any_map = ClassMap.of(dtype, 0)

    def exponents(chunk: _Chunk) -> np.ndarray:
        step = -(-len(chunk.positions) // _SAMPLE)
        found = any_map.exponents(kernels.gather(_rectangle(chunk, old), chunk.positions[::step]))
        return np.bincount(found, minlength=256) * step

    some = chunks[:: -(-len(chunks) // _SAMPLED_CHUNKS)]
    histogram = np.sum([exponents(chunk) for chunk in some], axis=0)
    shares = np.cumsum(histogram[::-1])[::-1] / histogram.sum()
    top = int(np.flatnonzero(shares > 0.002)[-1])
    return max(0, top + int(shares[top] > 0.05) - CLASSES + 1)


def _look(
    classes: ClassMap | None, old: OldBits | None, count: int, chunk: _Chunk, totals: tuple[np.ndarray, ...]
) -> None:
    """Bring the changes into class order, find what their gaps cost, and count their magnitudes in `totals`."""
    if classes is None or old is None:
        chunk.counts = one_class(count, len(chunk.positions))
        chunk.sizes = one_class(count, (chunk.rows.stop - chunk.rows.start) * (chunk.cols.stop - chunk.cols.start))
    else:
        chunk.sizes, class_of, ranks = kernels.rank(_rectangle(chunk, old), chunk.positions, classes)
        chunk.counts, chunk.positions, chunk.diffs = streams.by_class(CLASSES, class_of, ranks, chunk.diffs)
    (magnitudes,) = totals
    chunk.listed, chunk.gaps, chunk.gap_cost = streams.look(
        chunk.counts, chunk.sizes, chunk.positions, chunk.diffs, magnitudes
    )


def _fit(low: int, chunks: Sequence[_Chunk], magnitudes: np.ndarray, width: int) -> Book:
    """The code parameters with the fewest bits; orders of the row columns are fitted later."""
    count = len(chunks[0].counts)
    codes = np.full((count, 3 + MAX_PLANES), NO_PLANE, np.uint8)
    codes[:, GAP] = np.argmin(np.sum([chunk.gap_cost for chunk in chunks], axis=0), axis=1)
    codes[:, USUAL] = np.maximum(1, np.argmax(magnitudes[:, : 1 << (width - 1)], axis=1))
    found, beyond = add_up(
        lambda chunk, totals: streams.distance_counts(chunk.counts, chunk.diffs, codes[:, USUAL], *totals),
        chunks,
        lambda: (np.zeros((count, streams.DISTANCES), np.int64), np.zeros((2, count, MAX_K + 1), np.int64)),
    )
    lists = np.sum([chunk.counts > 0 for chunk in chunks], axis=0)
    for c in range(count):
        codes[c, TAIL:] = _fit_magnitudes(found[c], beyond[:, c], int(lists[c]), width)
    return Book(low, np.zeros(count + FIELDS, np.uint8), codes)


def _fit_magnitudes(found: np.ndarray, beyond: np.ndarray, lists: int, width: int) -> np.ndarray:
    """How to code the distances of one class: uint8[1 + MAX_PLANES], the tail and the planes.

    Args:
        found: how often each distance occurs.
        beyond: int64[2, MAX_K + 1], what larger distances cost in an Exp-Golomb or Rice code.
        lists: number of chunks, each of which has a list in every plane.
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
    k, values = np.arange(MAX_K + 1)[:, None], np.arange(streams.DISTANCES)
    exp_golomb = 2 * np.floor(np.log2(values + (1 << k))).astype(np.int64) - k + 1
    return np.stack([exp_golomb, (values >> k) + k + 1])


_TAIL_BITS = _tail_bits()


def _best_list(ending: int, left: int, lists: int) -> tuple[float, int]:
    """(bits, code) of a plane in which `ending` of `left` changes end: these are listed, or the others."""
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
    costs = beyond[:, :orders] + _TAIL_BITS[:, :orders, : len(found)] @ found
    kind, k = divmod(int(np.argmin(costs)), costs.shape[1])
    return float(costs[kind, k]), k | (RICE if kind else 0)


def _finish(book: Book, chunk: _Chunk) -> None:
    """Choose the shift of a chunk, and write it."""
    chunk.shift, chunk.payload = streams.finish(
        chunk.counts, chunk.sizes, chunk.listed, chunk.gaps, chunk.gap_cost, chunk.diffs, book.codes
    )


def _rows(chunks: Sequence[_Chunk]) -> np.ndarray:
    """int64[chunks, classes + FIELDS]: the columns of their rows."""
    rest = np.array([[c.shift, len(c.payload)] for c in chunks], np.int64).reshape(-1, FIELDS)
    rest[:, SHIFT] = zigzag(rest[:, SHIFT])
    return np.concatenate([np.array([c.counts for c in chunks], np.int64), rest], axis=1)


def _fit_orders(book: Book, chunks: Sequence[_Chunk]) -> None:
    if chunks:
        rows = _rows(chunks)
        for column in range(rows.shape[1]):
            book.orders[column] = np.argmin(streams.exp_golomb_cost(rows[:, column].copy()))


def _is_larger_than_dense(chunks: Sequence[_Chunk], spec: TensorSpec) -> bool:
    return sum(len(chunk.payload) + chunk.counts.nbytes // 4 + 8 for chunk in chunks) > spec.nbytes


def _dense(spec: TensorSpec, delta: TensorDelta) -> np.ndarray:
    dense = np.zeros(spec.numel, delta.diffs.dtype.newbyteorder("<"))
    dense[delta.indices] = delta.diffs
    return dense.view(np.uint8)
