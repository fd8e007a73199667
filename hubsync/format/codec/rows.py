"""Chunk rows: a row for each chunk, as one string of bits. Specified in docs/FORMAT.md.

A chunk without changes is a single 0. Any other chunk is a 1, then the columns of its row as Exp-Golomb numbers with
the orders of the code book: the number of changes of each class, then SHIFT and BYTES.
"""

from __future__ import annotations

import numpy as np

from hubsync.errors import FormatError
from hubsync.kernels.compiled import compiled

from .bitio import exponent_of, get, next_one, put, put_unary, words_from, words_of
from .book import FIELDS, Book

SHIFT, BYTES = range(FIELDS)  # columns of a row, behind the counts of the classes
_LARGEST = 40  # bits of a column


def zigzag(values: np.ndarray) -> np.ndarray:
    """Signed -> unsigned: 0, -1, 1, -2, ... -> 0, 1, 2, 3, ..."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


class RowWriter:
    """Appends the rows of one tensor after the other."""

    def __init__(self) -> None:
        self._words: list[tuple[np.ndarray, int]] = []

    def append(self, book: Book, numbers: np.ndarray, rows: np.ndarray, chunks: int) -> None:
        """Args:
        numbers: int64[r], ascending, the chunks (of `chunks`) that have changes.
        rows: int64[r, classes + FIELDS], the columns of their rows.
        """
        bits = _row_bits(rows, book.orders, chunks)
        words = words_of(-(-bits // 8))
        _write(words, book.orders, numbers, rows, chunks)
        self._words.append((words, bits))

    def data(self) -> np.ndarray:
        """uint8[bytes]"""
        total = sum(bits for _, bits in self._words)
        out = words_of(-(-total // 8))
        position = 0
        for words, bits in self._words:
            _append(out, position, words, bits)
            position += bits
        return out.view(np.uint8)[: -(-total // 8)]


class RowReader:
    """Reads the rows of one tensor after the other. FormatError for an impossible row.

    A row with changes takes more than `classes` bits, so memory stays proportional to the data.
    """

    def __init__(self, data: np.ndarray):
        self._words = words_from(data)
        self._position, self._end = 0, 8 * len(data)

    def read(self, book: Book, chunks: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers, rows) of the next `chunks` chunks, as `RowWriter.append` takes them."""
        left = self._end - self._position
        if chunks > left:
            raise FormatError(f"{chunks} chunk rows are needed, {left} bits are left")
        columns = len(book.orders)
        most = min(chunks, left // (columns + 1) + 1)
        numbers, rows = np.empty(most, np.int64), np.empty((most, columns), np.int64)
        used, self._position = _read(self._words, self._position, self._end, book.orders, chunks, numbers, rows)
        if used < 0:
            raise FormatError("the table of chunk rows ends too early, or has an impossible number")
        return numbers[:used].copy(), rows[:used].copy()

    def finish(self) -> None:
        """Raise FormatError unless everything has been read."""
        left = self._end - self._position
        if left >= 8 or (left and get(self._words, self._position, left)):
            raise FormatError(f"{left} bits of chunk rows are left over")


def read_rows(data: np.ndarray, orders: np.ndarray, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of many tensors at once. FormatError unless they are all that there is, and possible.

    Args:
        orders: uint8[tensors, columns], of the code book of each tensor.
        chunks: int64[tensors], their numbers of chunks.

    Returns:
        (owners, numbers, rows): int64[r], the tensor of each chunk that has changes; and as `RowReader.read`.
    """
    reader = RowReader(data)
    bits, columns = 8 * len(data), orders.shape[1]
    if chunks.max(initial=0) > bits or chunks.sum() > bits:
        raise FormatError(f"{chunks.sum()} chunk rows are needed, there are {bits} bits")
    most = min(int(chunks.sum()), bits // (columns + 1) + 1)
    owners, numbers = np.empty(most, np.int64), np.empty(most, np.int64)
    rows = np.empty((most, columns), np.int64)
    used, reader._position = _read_many(reader._words, bits, orders, chunks, owners, numbers, rows)
    if used < 0:
        raise FormatError("the table of chunk rows ends too early, or has an impossible number")
    reader.finish()
    return owners[:used], numbers[:used], rows[:used]


@compiled
def _row_bits(rows: np.ndarray, orders: np.ndarray, chunks: int) -> int:
    bits = chunks
    for r in range(len(rows)):
        for f in range(len(orders)):
            bits += 2 * exponent_of(rows[r, f], orders[f]) + orders[f] + 1
    return bits


@compiled
def _write(words: np.ndarray, orders: np.ndarray, numbers: np.ndarray, rows: np.ndarray, chunks: int) -> None:
    position, r = 0, 0
    for chunk in range(chunks):
        if r == len(numbers) or numbers[r] != chunk:
            position += 1
            continue
        put(words, position, 1)
        position += 1
        for f in range(len(orders)):
            k = np.int64(orders[f])
            exponent = exponent_of(rows[r, f], k)
            position = put_unary(words, position, exponent)
            put(words, position, rows[r, f] + (1 << k) - (1 << (exponent + k)))
            position += exponent + k
        r += 1


@compiled
def _append(out: np.ndarray, position: int, words: np.ndarray, bits: int) -> None:
    for first in range(0, bits, 32):
        put(out, position + first, get(words, first, min(32, bits - first)))


@compiled
def _read(
    words: np.ndarray,
    position: int,
    end: int,
    orders: np.ndarray,
    chunks: int,
    numbers: np.ndarray,
    rows: np.ndarray,
) -> tuple[int, int]:
    used = 0
    for chunk in range(chunks):
        if position >= end:
            return -1, position
        position += 1
        if get(words, position - 1, 1) == 0:
            continue
        if used == len(numbers):
            return -1, position
        for f in range(len(orders)):
            k = np.int64(orders[f])
            one = next_one(words, position, end)
            bits = one - position + k
            if one < 0 or bits > _LARGEST or one + 1 + bits > end:
                return -1, position
            rows[used, f] = get(words, one + 1, bits) + (1 << bits) - (1 << k)
            position = one + 1 + bits
        numbers[used] = chunk
        used += 1
    return used, position


@compiled
def _read_many(
    words: np.ndarray,
    end: int,
    orders: np.ndarray,
    chunks: np.ndarray,
    owners: np.ndarray,
    numbers: np.ndarray,
    rows: np.ndarray,
) -> tuple[int, int]:
    total, position = 0, 0
    for tensor in range(len(chunks)):
        used, position = _read(words, position, end, orders[tensor], chunks[tensor], numbers[total:], rows[total:])
        if used < 0:
            return -1, position
        owners[total : total + used] = tensor
        total += used
    return total, position
