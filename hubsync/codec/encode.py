"""A patch -> records, code books, chunk rows and payload. docs/FORMAT.md is the specification.

Chunks are independent jobs, on as many threads as torch is given. The code parameters are shared by all tensors of a
dtype, so the work has two passes: look at every chunk, then choose parameters and write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hubsync import kernels
from hubsync.kernels.classes import CLASSES, ClassMap
from hubsync.patch import Patch, TensorDelta
from hubsync.table import TensorSpec, TensorTable

from . import streams
from .bitio import words_of
from .book import CENTER, FIELDS, GAP, LISTED, MAGNITUDE, MODE, Book, columns
from .grid import Grid
from .layout import CODED, RECORD_COLUMNS, OldBits
from .parallel import each
from .rows import RowWriter, zigzag

_SAMPLE = 4096  # changes of a chunk whose old exponents are looked at


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
    listed_gaps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    shift: int = 0
    remainder_bits: int = 0
    nbytes: int = 0


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
    for dtype in dict.fromkeys(table[index].dtype for index in grids):
        own = {index: grid for index, grid in grids.items() if table[index].dtype == dtype}
        chunks = {index: list(_cut(index, patch[index], grid)) for index, grid in own.items()}
        book = _choose_book(dtype, [chunk for some in chunks.values() for chunk in some], table, old)
        coded = {index: some for index, some in chunks.items() if not _is_larger_than_dense(some, table[index])}
        _fit_orders(book, [chunk for some in coded.values() for chunk in some])
        for index, grid in own.items():
            if index in coded:
                records.append((index, grid.chunk_rows, grid.chunk_cols, CODED | len(books) << 8))
                numbers = np.array([chunk.number for chunk in coded[index]])
                rows.append(book, numbers, _rows(coded[index]), grid.count)
                payload += each(partial(_write, book), coded[index])
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


def _choose_book(dtype: str, chunks: Sequence[_Chunk], table: TensorTable, old: OldBits | None) -> Book:
    """The code parameters for these chunks; afterwards each is in class order, and measured."""
    low = 0 if old is None else _lowest_class(dtype, chunks, old)
    classes = None if old is None else ClassMap.of(dtype, low)
    each(partial(_look, classes, old), chunks)
    book = _fit(low, chunks, table[chunks[0].index].width)
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

    histogram = np.sum(each(exponents, chunks), axis=0)
    shares = np.cumsum(histogram[::-1])[::-1] / histogram.sum()
    top = int(np.flatnonzero(shares > 0.002)[-1])
    return max(0, top + int(shares[top] > 0.05) - CLASSES + 1)


def _look(classes: ClassMap | None, old: OldBits | None, chunk: _Chunk) -> None:
    """Bring the changes into class order, and find what their gaps cost."""
    if classes is None or old is None:
        chunk.counts = np.array([len(chunk.positions)])
        chunk.sizes = np.array([(chunk.rows.stop - chunk.rows.start) * (chunk.cols.stop - chunk.cols.start)])
    else:
        chunk.sizes, class_of, ranks = kernels.rank(_rectangle(chunk, old), chunk.positions, classes)
        order = np.argsort(class_of, kind="stable")
        chunk.counts = np.bincount(class_of, minlength=CLASSES)
        chunk.positions, chunk.diffs = ranks[order], chunk.diffs[order]
    chunk.listed, chunk.gaps = streams.separate(chunk.counts, chunk.sizes, chunk.positions)
    chunk.gap_cost = streams.gap_cost(chunk.listed, chunk.gaps)


def _fit(low: int, chunks: Sequence[_Chunk], width: int) -> Book:
    """The code parameters with the fewest bits; orders of the row columns are fitted later."""
    count = len(chunks[0].counts)
    codes = np.zeros((count, 4), np.uint8)
    codes[:, GAP] = np.argmin(np.sum([chunk.gap_cost for chunk in chunks], axis=0), axis=1)
    usual = np.sum(each(lambda chunk: streams.magnitude_counts(chunk.counts, chunk.diffs), chunks), axis=0)
    codes[:, CENTER] = np.maximum(1, np.argmax(usual[:, : 1 << (width - 1)], axis=1))

    costs = each(lambda chunk: streams.magnitude_cost(chunk.counts, chunk.diffs, codes[:, CENTER]), chunks)
    cost, exceptions = np.sum([c for c, _ in costs], axis=0), np.sum([e for _, e in costs], axis=0)
    changes = np.sum([chunk.counts for chunk in chunks], axis=0)
    best = np.min(cost[:, :, :width], axis=2)  # larger parameters would not fit the width
    best[LISTED] += _cost_of_listing(changes, exceptions)
    codes[:, MODE] = np.argmin(best, axis=0)
    codes[:, MAGNITUDE] = np.argmin(cost[codes[:, MODE], np.arange(count), :width], axis=1)

    def list_cost(chunk: _Chunk) -> np.ndarray:
        chunk.listed_gaps = streams.exception_gaps(chunk.counts, chunk.diffs, codes)
        return streams.rice_cost(chunk.listed_gaps)

    k_listed = int(np.argmin(np.sum(each(list_cost, chunks), axis=0)))
    return Book(low, k_listed, np.zeros(count + FIELDS, np.uint8), codes)


def _cost_of_listing(changes: np.ndarray, exceptions: np.ndarray) -> np.ndarray:
    """About what it takes to say which changes are exceptions: their entropy, and 3 % for the code."""
    share = exceptions / np.maximum(changes, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    return (1.03 * changes * np.nan_to_num(entropy)).astype(np.int64)


def _finish(book: Book, chunk: _Chunk) -> None:
    """Choose the shift of a chunk, and measure it."""
    chunk.shift = streams.best_shift(chunk.counts, chunk.sizes, chunk.gap_cost, book.codes)
    chunk.remainder_bits, chunk.nbytes = streams.measure(
        chunk.counts, chunk.sizes, chunk.listed, chunk.gaps, chunk.diffs, chunk.listed_gaps, book.codes,
        book.k_listed, chunk.shift,
    )  # fmt: skip


def _rows(chunks: Sequence[_Chunk]) -> np.ndarray:
    """int64[chunks, classes + FIELDS]: the columns of their rows."""
    fields = [[len(c.listed_gaps), c.shift, c.remainder_bits, c.nbytes] for c in chunks]
    rest = np.array(fields, np.int64).reshape(-1, FIELDS)
    rest[:, 1] = zigzag(rest[:, 1])
    return np.concatenate([np.array([c.counts for c in chunks], np.int64), rest], axis=1)


def _fit_orders(book: Book, chunks: Sequence[_Chunk]) -> None:
    if chunks:
        rows = _rows(chunks)
        for column in range(rows.shape[1]):
            book.orders[column] = np.argmin(streams.exp_golomb_cost(rows[:, column].copy()))


def _is_larger_than_dense(chunks: Sequence[_Chunk], spec: TensorSpec) -> bool:
    return sum(chunk.nbytes + chunk.counts.nbytes // 4 + 8 for chunk in chunks) > spec.nbytes


def _write(book: Book, chunk: _Chunk) -> np.ndarray:
    words = words_of(chunk.nbytes)
    streams.write(
        chunk.counts, chunk.sizes, chunk.listed, chunk.gaps, chunk.diffs, chunk.listed_gaps, book.codes,
        book.k_listed, chunk.shift, chunk.remainder_bits, words,
    )  # fmt: skip
    return words.view(np.uint8)[: chunk.nbytes]


def _dense(spec: TensorSpec, delta: TensorDelta) -> np.ndarray:
    dense = np.zeros(spec.numel, delta.diffs.dtype.newbyteorder("<"))
    dense[delta.indices] = delta.diffs
    return dense.view(np.uint8)
