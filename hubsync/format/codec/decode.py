"""Records, code books, chunk rows and payload -> a patch. docs/FORMAT.md is the specification.

Nothing is trusted: every number is checked against its bound before use. Memory is O(bytes of the part), because each
change takes at least a bit of payload, plus one chunk of old weights for each thread.
"""

from __future__ import annotations

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


@dataclass(frozen=True, eq=False)
class _ChunkJob:
    """One chunk to decode. Its payload begins at byte `start`."""

    index: int
    spec: TensorSpec
    book: Book
    grid: Grid
    number: int
    counts: np.ndarray
    rest: np.ndarray
    start: int


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
    jobs: list[_ChunkJob] = []
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
            read = _dense if mode == DENSE else _values
            patch[index] = read(spec, payload[start : start + spec.nbytes])
            start += spec.nbytes
        elif mode == CODED and book < len(known):
            own = _jobs(index, spec, known[book], _grid(spec, record), reader, start, len(payload))
            jobs += own
            start = own[-1].start + int(own[-1].rest[BYTES])
        else:
            raise FormatError(f"{spec.name}: unknown mode {mode}, or code book {book} of {len(known)}")
    reader.finish()
    if start != len(payload):
        raise FormatError(f"{len(payload) - start} payload bytes are left over")
    words = words_from(payload)
    found = each(lambda job: _decode_chunk(job, words, old), jobs)
    patch.update(_assemble(jobs, found))
    return dict(sorted(patch.items()))


def _jobs(
    index: int, spec: TensorSpec, book: Book, grid: Grid, reader: RowReader, start: int, available: int
) -> list[_ChunkJob]:
    """The chunks of one tensor that have changes. Checks every row against its chunk and the payload."""
    numbers, rows = reader.read(book, grid.count)
    jobs = []
    for number, row in zip(numbers.tolist(), rows, strict=True):
        counts, rest = row[: book.classes], row[book.classes :]
        changes, nbytes = int(counts.sum()), int(rest[BYTES])
        if not 0 < changes <= grid.elements(number) or changes > 8 * nbytes:
            raise FormatError(f"{spec.name}, chunk {number}: {streams.PROBLEMS[streams.COUNTS]}")
        if nbytes > available - start:
            raise FormatError(f"{spec.name}, chunk {number}: its payload is missing")
        jobs.append(_ChunkJob(index, spec, book, grid, number, counts, rest, start))
        start += nbytes
    if not jobs:
        raise FormatError(f"{spec.name}: is listed but has no changes")
    return jobs


def _decode_chunk(job: _ChunkJob, words: np.ndarray, old: OldBits | None) -> tuple[np.ndarray, np.ndarray] | None:
    """(flat indices, differences) of a chunk; None if this process does not hold its old weights."""
    classes = job.book.class_map(job.spec.dtype)
    if classes is None or old is None:
        sizes, counted = one_class(job.book.classes, job.grid.elements(job.number)), None
    else:
        bits = old.rectangle(job.index, *job.grid.slices(job.number))
        if bits is None:
            return None
        counted = kernels.count(bits, classes)
        sizes = counted.sizes
    changes = int(job.counts.sum())
    ranks, diffs = np.empty(changes, np.int32), np.empty(changes, SIGNED[job.spec.width])
    shift = int(job.rest[SHIFT])
    shift = -(shift + 1) // 2 if shift & 1 else shift // 2
    start, nbytes = job.start, int(job.rest[BYTES])
    problem = streams.read(words, start, nbytes, job.counts, sizes, shift, job.book.codes, ranks, diffs)
    if problem != streams.FINE:
        raise FormatError(f"{job.spec.name}, chunk {job.number}: {streams.PROBLEMS[problem]}")
    if counted is not None:
        ranks, diffs = counted.place(ranks, diffs, job.counts)
    return job.grid.indices(job.number, ranks), diffs


def _assemble(jobs: list[_ChunkJob], found: list[tuple[np.ndarray, np.ndarray] | None]) -> Patch:
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    ascends = {job.index: job.grid.ascends for job in jobs}
    for job, part in zip(jobs, found, strict=True):
        if part is not None:
            parts.setdefault(job.index, []).append(part)
    indices = list(parts)
    return dict(zip(indices, each(lambda index: _joined(parts[index], ascends[index]), indices), strict=True))


def _joined(parts: list[tuple[np.ndarray, np.ndarray]], ascends: bool) -> TensorDelta:
    indices = np.concatenate([part[0] for part in parts])
    diffs = np.concatenate([part[1] for part in parts])
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
