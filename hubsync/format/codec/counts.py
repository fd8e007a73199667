"""How many elements of each tensor change, from a part without its payload. docs/FORMAT.md is the specification."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hubsync.errors import FormatError
from hubsync.format.table import TensorTable

from .book import CLASSES_OF, FIELDS, Book, columns
from .layout import CHUNK_COLS, CHUNK_ROWS, CODE, CODED, TENSOR
from .rows import read_rows


class ChangeCounts(NamedTuple):
    """Changes of each tensor of a table.

    Attributes:
        changed: int64[tensors], of those that are coded; 0 of others.
        whole: bool[tensors], stored with a number for every element (dense or absolute): how many of them changed
            is not known.
    """

    changed: np.ndarray
    whole: np.ndarray


def counts_of(table: TensorTable, tensors: np.ndarray, books: np.ndarray, chunks: np.ndarray) -> ChangeCounts:
    """Of the records, code books and chunk rows of a part. FormatError for impossible ones."""
    classes = next((number for number in CLASSES_OF.values() if columns(number) == books.shape[1]), None)
    if classes is None:
        raise FormatError(f"code books of {books.shape[1]} bytes")
    known = [Book.unpack(row, classes) for row in books]
    records = tensors.astype(np.int64)
    index, is_coded, book = records[:, TENSOR], records[:, CODE] & 0xFF == CODED, records[:, CODE] >> 8
    if (index >= len(table)).any() or len(np.unique(index)) != len(index):
        raise FormatError("a tensor is listed twice or is not in the table")
    height, width = records[is_coded, CHUNK_ROWS], records[is_coded, CHUNK_COLS]
    if (np.minimum(height, width) < 1).any() or (book[is_coded] >= len(known)).any():
        raise FormatError("a record has an impossible chunk or code book")
    coded = index[is_coded]
    grid = -(-table.columns.rows[coded] // height) * -(-table.columns.cols[coded] // width)
    orders = np.stack([b.orders for b in known] or [np.zeros(classes + FIELDS, np.uint8)])
    owners, _, rows = read_rows(chunks, orders[book[is_coded]], grid)
    changed, whole = np.zeros(len(table), np.int64), np.zeros(len(table), bool)
    np.add.at(changed, coded[owners], rows[:, :classes].sum(axis=1))
    whole[index[~is_coded]] = True
    if (changed < 0).any() or (changed > table.columns.numel).any():
        raise FormatError("more elements change than a tensor has")
    return ChangeCounts(changed, whole)
