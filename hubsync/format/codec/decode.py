"""Records, code books, chunk rows and payload -> a patch. docs/FORMAT.md is the specification.

Nothing is trusted: every number is checked against its bound before use. Memory is O(bytes of the part), because each
change takes at least a bit of payload, plus one chunk of old weights for each thread (tests/format/test_memory.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hubsync import kernels
from hubsync.errors import FormatError
from hubsync.format.patch import Patch, TensorDelta, TensorValues
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import SIGNED, UNSIGNED
from hubsync.kernels.parallel import each

from . import streams
from .bitio import words_from
from .book import Book, one_class
from .grid import MAX_ELEMENTS, Grid
from .layout import ABSOLUTE, CHUNK_COLS, CHUNK_ROWS, CODE, CODED, DENSE, TENSOR, OldBits
from .rows import BYTES, SHIFT, RowReader

_JOB_CHANGES = 1 << 16  # a job decodes chunks until it has this many changes,
_JOB_CHUNKS = 1 << 10  # or this many chunks, so that memory does not depend on the number of chunks


@dataclass(frozen=True, eq=False)
class Coded:
    """The chunks of a tensor that have changes.

    Attributes:
        numbers: int64[r], ascending.
        rows: int64[r, classes + FIELDS], their rows.
        starts: int64[r + 1], where their payloads begin, and the last one ends.
        bounds: int64[r + 1], chunk i has the changes `bounds[i] .. bounds[i + 1]` of the tensor.
    """

    index: int
    spec: TensorSpec
    book: Book
    grid: Grid
    numbers: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    bounds: np.ndarray

    def jobs(self) -> list[tuple[int, int]]:
        """Consecutive chunks, from the first to before the last, that are decoded together."""
        key = self.bounds[:-1] // _JOB_CHANGES + np.arange(len(self.numbers)) // _JOB_CHUNKS
        firsts = [0, *(np.flatnonzero(np.diff(key)) + 1).tolist(), len(self.numbers)]
        return list(itertools.pairwise(firsts))


def decode(
    table: TensorTable,
    tensors: np.ndarray,
    books: np.ndarray,
    chunks: np.ndarray,
    payload: np.ndarray,
    classes: int,
    old: OldBits | None = None,
) -> Patch:
    """Decode the content of a delta part (`Encoded`). FormatError unless every byte of it is valid for `table`.

    Args:
        classes: of the code books; 1 for fast.
        old: the weights that the patch applies to. Needed unless `classes` is 1. Chunks of which it holds nothing are
            not decoded.
    """
    known = [Book.unpack(row, classes) for row in books]
    reader = RowReader(chunks)
    coded: list[Coded] = []
    patch: Patch = {}
    start, seen = 0, set()
    for record in tensors:
        index = int(record[TENSOR])
        if index >= len(table) or index in seen:
            raise FormatError(f"tensor {index} is listed twice or is not in the table")
        seen.add(index)
        spec = table[index]
        mode, book = int(record[CODE]) & 0xFF, int(record[CODE]) >> 8
        if mode in (DENSE, ABSOLUTE) and not (record[CHUNK_ROWS] or record[CHUNK_COLS] or book):
            patch[index] = decode_whole(spec, mode, payload[start : start + spec.nbytes])
            start += spec.nbytes
        elif mode == CODED and book < len(known):
            coded.append(_rows(index, spec, known[book], _grid(spec, record), reader, start, len(payload)))
            start = int(coded[-1].starts[-1])
        else:
            raise FormatError(f"{spec.name}: unknown mode {mode}, or code book {book} of {len(known)}")
    reader.finish()
    if start != len(payload):
        raise FormatError(f"{len(payload) - start} payload bytes are left over")
    words = words_from(payload)
    for tensor in decode_coded(coded, words, old):
        patch.update(tensor)
    return dict(sorted(patch.items()))


def _rows(index: int, spec: TensorSpec, book: Book, grid: Grid, reader: RowReader, start: int, available: int) -> Coded:
    """The chunks of one tensor that have changes. Checks every row against its chunk and the payload."""
    numbers, rows = reader.read(book, grid.count)
    if not len(numbers):
        raise FormatError(f"{spec.name}: is listed but has no changes")
    changes, nbytes = rows[:, : book.classes].sum(axis=1), rows[:, book.classes + BYTES]
    elements = np.fromiter(map(grid.elements, numbers.tolist()), np.int64, len(numbers))
    impossible = (changes <= 0) | (changes > elements) | (changes > 8 * nbytes)
    if impossible.any():
        number = numbers[impossible.argmax()]
        raise FormatError(f"{spec.name}, chunk {number}: {streams.PROBLEMS[streams.COUNTS]}")
    starts = start + np.concatenate([[0], np.cumsum(nbytes)])
    beyond = (starts > available) | (starts < 0)  # a hostile sum overflows to a negative number first
    if beyond.any():
        number = numbers[beyond.argmax() - 1]
        raise FormatError(f"{spec.name}, chunk {number}: its payload is missing")
    bounds = np.concatenate([[0], np.cumsum(changes)])
    return Coded(index, spec, book, grid, numbers, rows, starts, bounds)


def decode_coded(coded: Sequence[Coded], words: np.ndarray, old: OldBits | None) -> Iterator[Patch]:
    """The changes of each tensor. Chunks are decoded in parallel, each into its place in the arrays of its tensor."""
    arrays = [
        (np.empty(rows.bounds[-1], np.int64), np.empty(rows.bounds[-1], SIGNED[rows.spec.width])) for rows in coded
    ]
    jobs = [(number, *chunks) for number, rows in enumerate(coded) for chunks in rows.jobs()]
    held = [np.zeros(len(rows.numbers), bool) for rows in coded]

    def decode_some(job: tuple[int, int, int]) -> None:
        number, first, last = job
        for row in range(first, last):
            held[number][row] = _decode_chunk(coded[number], row, words, old, *arrays[number])

    each(decode_some, jobs)
    for rows, ours in zip(reversed(coded), reversed(held), strict=True):
        indices, diffs = arrays.pop()  # so that those in another order are not held twice
        if not ours.all():
            changes = np.repeat(ours, np.diff(rows.bounds))
            indices, diffs = indices[changes], diffs[changes]
        if ours.any():
            yield {rows.index: _ordered(indices, diffs, rows.grid.ascends)}


def _decode_chunk(
    coded: Coded, row: int, words: np.ndarray, old: OldBits | None, indices: np.ndarray, diffs: np.ndarray
) -> bool:
    """Decode a chunk into its place in the tensor's flat indices and differences.

    False if this process does not hold its old weights.
    """
    number, book, grid = int(coded.numbers[row]), coded.book, coded.grid
    classes = book.class_map(coded.spec.dtype)
    if classes is None or old is None:
        sizes, counted = one_class(book.classes, grid.elements(number)), None
    else:
        bits = old.rectangle(coded.index, *grid.slices(number))
        if bits is None:
            return False
        counted = kernels.count(bits, classes)
        sizes = counted.sizes
    counts, rest = coded.rows[row, : book.classes], coded.rows[row, book.classes :]
    shift = int(rest[SHIFT])
    shift = -(shift + 1) // 2 if shift & 1 else shift // 2
    own = slice(coded.bounds[row], coded.bounds[row + 1])
    ranks = np.empty(own.stop - own.start, np.int32)
    start, nbytes = int(coded.starts[row]), int(rest[BYTES])
    problem = streams.read(words, start, nbytes, counts, sizes, shift, book.codes, ranks, diffs[own])
    if problem != streams.FINE:
        raise FormatError(f"{coded.spec.name}, chunk {number}: {streams.PROBLEMS[problem]}")
    if counted is not None:
        ranks, diffs[own] = counted.place(ranks, diffs[own], counts)
    indices[own] = grid.indices(number, ranks)
    return True


def _ordered(indices: np.ndarray, diffs: np.ndarray, ascends: bool) -> TensorDelta:
    if not ascends:
        order = np.argsort(indices, kind="stable")  # merges the chunks, each of which ascends
        indices, diffs = indices[order], diffs[order]
    return TensorDelta(indices, diffs)


def _grid(spec: TensorSpec, record: np.ndarray) -> Grid:
    rows, cols = spec.matrix
    chunk_rows, chunk_cols = int(record[CHUNK_ROWS]), int(record[CHUNK_COLS])
    if not (1 <= chunk_rows <= rows and 1 <= chunk_cols <= cols and chunk_rows * chunk_cols <= MAX_ELEMENTS):
        raise FormatError(f"{spec.name}: chunks of {chunk_rows} x {chunk_cols} do not fit {rows} x {cols}")
    return Grid(rows, cols, chunk_rows, chunk_cols)


def decode_whole(spec: TensorSpec, mode: int, payload: np.ndarray) -> TensorDelta | TensorValues:
    """A dense or absolute record."""
    return _dense(spec, payload) if mode == DENSE else _values(spec, payload)


def _values(spec: TensorSpec, payload: np.ndarray) -> TensorValues:
    return TensorValues(_elements(spec, payload, np.dtype(UNSIGNED[spec.width])))


def _elements(spec: TensorSpec, payload: np.ndarray, kind: np.dtype) -> np.ndarray:
    """A number for every element of a tensor."""
    if len(payload) < spec.nbytes:
        raise FormatError(f"{spec.name}: {spec.nbytes} payload bytes are needed, {len(payload)} are left")
    return np.frombuffer(payload.tobytes(), kind.newbyteorder("<")).astype(kind, copy=False)


def _dense(spec: TensorSpec, payload: np.ndarray) -> TensorDelta:
    dense = _elements(spec, payload, np.dtype(SIGNED[spec.width]))
    indices = np.flatnonzero(dense)
    if len(indices) == 0:
        raise FormatError(f"{spec.name}: is listed but has no changes")
    return TensorDelta(indices, dense[indices])
