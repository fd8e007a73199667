"""Delta parts that take the most memory for their size: each one uses a rule of docs/FORMAT.md to the limit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hubsync.format.codec import CLASSES_OF, Encoded
from hubsync.format.codec.book import FIELDS, LIST_REST, MAX_PLANES, NO_PLANE, PLANES, USUAL, Book
from hubsync.format.codec.layout import CODED, DENSE
from hubsync.format.codec.rows import RowWriter
from hubsync.format.encoding import Encoding
from hubsync.format.parts import FORMAT, _serialize
from hubsync.format.table import WIDTHS, TensorSpec, TensorTable

Made = tuple[TensorTable, bytes]
_NO_OLD_WEIGHTS = 255  # `low`: all elements are of class 0


def stated_bound() -> int:
    """The bound of docs/FORMAT.md, in bytes of memory for a byte of a part."""
    text = (Path(__file__).parents[2] / "docs" / "FORMAT.md").read_text()
    found = re.search(r"\(hubsync: (\d+) bytes for a byte", text)
    assert found is not None
    return int(found[1])


def made(size: int) -> dict[str, Made]:
    """Name -> (table, part) of about `size` bytes each."""
    few: dict[str, Callable[[], Made]] = {
        "one change for each chunk": lambda: one_each("F32", size // 2, Encoding.FAST),
        "one change for each chunk, bf16": lambda: one_each("BF16", size // 2, Encoding.FAST),
        "one change for each chunk, compact": lambda: one_each("F32", size // 4, Encoding.COMPACT),
        "a bit for each change": lambda: all_changed(8 * size // 1024, 1024, 8 * size // 1024, 1024),
        "a bit for each change, two planes": lambda: all_changed(8 * size // 1024, 1024, 8 * size // 1024, 1024, 2),
        "a bit for each change, tiles": lambda: all_changed(8 * size // 1024, 1024, 8 * size // 1024, 128),
        "a bit for each change, small tiles": lambda: all_changed(size // 256 * 4, 128, 4, 4),
        "one change for each tensor": lambda: scalars(size // 18),
        "dense": lambda: dense("F8_E4M3", size),
        "books that nothing uses": lambda: dense("F8_E4M3", 8, books=size // 12),
    }
    return {name: make() for name, make in few.items()}


def one_each(dtype: str, chunks: int, encoding: Encoding) -> Made:
    """Chunks of one element, which changes: under two bytes each."""
    rows = np.zeros((chunks, CLASSES_OF[encoding] + FIELDS), np.int64)
    rows[:, 0] = rows[:, -1] = 1  # changes of class 0, bytes
    table = TensorTable([TensorSpec("w", (1, chunks), dtype)])
    record = [0, 1, 1, CODED]
    return table, _part(table, [record], [(np.arange(chunks), rows)], np.full(chunks, 2, np.uint8), encoding)


def all_changed(rows: int, cols: int, chunk_rows: int, chunk_cols: int, planes: int = 1) -> Made:
    """Every element changes by the same step: a sign each, and `planes` bits for each chunk."""
    elements, chunks = chunk_rows * chunk_cols, (rows // chunk_rows) * (cols // chunk_cols)
    nbytes = -(-(elements + planes) // 8)
    columns = np.zeros((chunks, 1 + FIELDS), np.int64)
    columns[:, 0], columns[:, -1] = elements, nbytes
    table = TensorTable([TensorSpec("w", (rows, cols), "F32")])
    record = [0, chunk_rows, chunk_cols, CODED]
    payload = np.zeros(chunks * nbytes, np.uint8)
    return table, _part(table, [record], [(np.arange(chunks), columns)], payload, Encoding.FAST, planes)


def scalars(count: int) -> Made:
    """Tensors of one element, which changes."""
    table = TensorTable([TensorSpec(f"w{number}", (), "F32") for number in range(count)])
    row = np.array([[1, 0, 1]], np.int64)
    records = [[number, 1, 1, CODED] for number in range(count)]
    return table, _part(table, records, [(np.zeros(1, np.int64), row)] * count, np.full(count, 2, np.uint8))


def dense(dtype: str, elements: int, books: int = 1) -> Made:
    table = TensorTable([TensorSpec("w", (elements,), dtype)])
    payload = np.full(elements * WIDTHS[dtype] // 8, 1, np.uint8)
    return table, _part(table, [[0, 0, 0, DENSE]], [], payload, books=books)


def _part(
    table: TensorTable,
    records: list[list[int]],
    rows: list[tuple[np.ndarray, np.ndarray]],
    payload: np.ndarray,
    encoding: Encoding = Encoding.FAST,
    planes: int = 0,
    books: int = 1,
) -> bytes:
    book = _book(CLASSES_OF[encoding], planes)
    writer = RowWriter()
    for numbers, columns in rows:
        writer.append(book, numbers, columns, len(numbers))
    encoded = Encoded(
        tensors=np.array(records, np.uint32),
        books=np.tile(book.pack(), (books, 1)),
        chunks=writer.data(),
        payload=payload,
    )
    return _serialize(encoded, {"format": FORMAT, "encoding": encoding.value, "table_hash": table.hash})


def _book(classes: int, planes: int) -> Book:
    """The shortest codes. Of `planes` planes, all changes end in the last one, and no list has an entry."""
    codes = np.zeros((classes, PLANES + MAX_PLANES), np.uint8)
    codes[:, USUAL], codes[:, PLANES:] = 1, NO_PLANE
    codes[:, PLANES : PLANES + planes] = 0
    if planes:
        codes[:, PLANES + planes - 1] = LIST_REST
    return Book(_NO_OLD_WEIGHTS, np.array([1] + [0] * classes + [1], np.uint8), codes)
