"""A part decoded on a GPU: all chunks of all tensors in a few launches, into one list that stays there.

The host reads records, code books and chunk rows, and checks them as `decode` does. The payload goes to the device
once. Python code runs once for a part, never once for a tensor or a chunk. What the kernels do not decode is decoded by
the CPU: tensors of other widths, dense and absolute records, chunks that are no run of elements, and crowded ones, of
which more than half of the elements change. `device_decode_classes` decodes the chunks of `compact` parts that need old
weights. A part that breaks a rule of docs/FORMAT.md is left to `decode` as a whole: its errors are the only ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch

from hubsync.errors import FormatError
from hubsync.format.patch import Patch, compose, invert
from hubsync.format.table import DTYPES, TensorTable

from . import device_decode_classes
from .bitio import words_from
from .book import CLASSES_OF, FIELDS, GAP, MAX_K, Book, columns
from .decode import Coded, decode_coded, decode_whole
from .device import kernel_codes, launching_on, to_device
from .device_decode_classes import RankedChunks, decode_ranked
from .grid import MAX_ELEMENTS, Grid
from .layout import ABSOLUTE, CHUNK_COLS, CHUNK_ROWS, CODE, CODED, DENSE, TENSOR, OldBits
from .rows import BYTES, SHIFT, read_rows

_SPARE = 16  # bytes behind the payload
_MOST_BYTES = 1 << 27  # of a chunk on a device: its bits are counted in 31


class Held(Protocol):
    """What a process holds of a view on a GPU.

    Attributes:
        device: the GPU.
        followed: bool[tensors], the tensors whose changes it can use there. Of others it wants a `Patch`.
    """

    device: torch.device
    followed: np.ndarray

    def holds(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """bool[n]: whether it holds any of the elements `first .. end` (int64[n], numbers as in `DeviceDelta`)."""

    def addresses(self, tensors: np.ndarray) -> np.ndarray:
        """int64[n]: where these followed tensors begin in its memory; 0 of those of which it holds nothing, and -1 of
        those that do not lie there whole and in one run."""


@dataclass(frozen=True, eq=False)
class DeviceDelta:
    """The changes of a view, those of most tensors on a device.

    Attributes:
        numbers: int64[n] on the device, strictly ascending. Element i of tensor t has the number `i` plus the elements
            of all tensors before t in the table.
        diffs: int16[n] on the device, signed steps, not zero.
        host: the other tensors.
    """

    numbers: torch.Tensor
    diffs: torch.Tensor
    host: Patch

    def inverted(self) -> DeviceDelta:
        """The changes that undo these. FormatError if there are new values of a whole tensor."""
        return DeviceDelta(self.numbers, -self.diffs, invert(self.host))


def composed(table: TensorTable, deltas: Sequence[DeviceDelta]) -> DeviceDelta | None:
    """The changes of at least one delta, one after the other, as `patch.compose` gives them.

    None if one has changes of a tensor on the device and another has some on the host.
    """
    if len(deltas) == 1:
        return deltas[0]
    numbers, order = torch.sort(torch.cat([delta.numbers for delta in deltas]))
    diffs = torch.cat([delta.diffs for delta in deltas])[order]
    indices = np.array(sorted({index for delta in deltas for index in delta.host}), np.int64)
    edges = first_numbers(table)[np.stack([indices, indices + 1])]
    bounds = torch.searchsorted(numbers, torch.from_numpy(edges).to(numbers.device))
    if bool((bounds[0] != bounds[1]).any()):
        return None
    numbers, owner = torch.unique_consecutive(numbers, return_inverse=True)
    sums = torch.zeros(len(numbers), dtype=torch.int32, device=numbers.device).index_add_(0, owner, diffs.int())
    moved = (sums & 0xFFFF).nonzero().squeeze(1)  # others have their old value again
    host = reduce(compose, (delta.host for delta in deltas))
    return DeviceDelta(numbers[moved], sums[moved].to(torch.int16), host)


def first_numbers(table: TensorTable) -> np.ndarray:
    """int64[tensors + 1]: number of the first element of each tensor, and the end of all numbers."""
    return np.concatenate([[0], np.cumsum(table.columns.numel)])


def prepare(device: torch.device) -> None:
    """Compile what decoding needs, which may take seconds."""
    read_rows(np.zeros(0, np.uint8), np.zeros((0, 1 + FIELDS), np.uint8), np.zeros(0, np.int64))
    with launching_on(device):
        import_module("hubsync.kernels.gpu.decode").prepare(device)
        device_decode_classes.prepare(device)


def decode_on_device(
    table: TensorTable,
    tensors: np.ndarray,
    books: np.ndarray,
    chunks: np.ndarray,
    payload: np.ndarray,
    held: Held,
    old: OldBits | None = None,
) -> DeviceDelta | None:
    """Decode the content of a part; None if it is malformed, which `decode` explains, or needs old weights.

    Chunks on the device of which `held` holds nothing are left out, unread. Uses the current stream, and waits for it.

    Args:
        books: with as many columns as one of `CLASSES_OF` has.
        old: the weights that the part applies to, if those are the held ones. Not needed with one class.
    """
    try:
        classes = next(number for number in CLASSES_OF.values() if columns(number) == books.shape[1])
        records = _Records.of(table, tensors, books, classes)
        cut = _CodedChunks.of(records, chunks, len(payload))
        followed = (held.followed & (table.columns.width == 16))[records.index]
        there = cut.is_plain & followed
        first = first_numbers(table)[records.index[cut.owner]] + cut.first
        on_device = there[cut.owner] & held.holds(first, first + cut.elements)
        with launching_on(held.device):
            addresses = np.where(records.is_ranked & followed, held.addresses(records.index), -1)
            others = ~there & (addresses < 0)
            if old is None and records.is_ranked.any():
                return None
            words = _words(payload, held.device)
            codes = _codes(records, held.device)
            listed = _decode(cut, np.flatnonzero(on_device), first, words, codes)
            ranked = _ranked(table, cut, first, addresses)
            if listed is not None and len(ranked):
                listed = _added(listed, decode_ranked(ranked, records.books, list(DTYPES), words, codes))
            host = _decode_others(table, cut, np.flatnonzero(others), payload, old)
    except FormatError:
        return None
    return None if listed is None else DeviceDelta(*listed, host)


@dataclass(frozen=True, eq=False)
class _Records:
    """The records of a part, as arrays of one entry for each: int64, checked against their bounds.

    Attributes:
        books: the code books of the part.
        classes: of each book.
        index: the tensor.
        is_coded: bool. Others are dense or absolute.
        is_ranked: bool, coded by classes of old weights.
        rows, cols: of the tensor as a matrix.
        nbytes: of the payload of a record that is not coded; else 0.
        across, chunks: chunks in a row of the grid, and in all; 0 if it is not coded.
    """

    books: list[Book]
    classes: int
    index: np.ndarray
    mode: np.ndarray
    book: np.ndarray
    is_coded: np.ndarray
    is_ranked: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    chunk_rows: np.ndarray
    chunk_cols: np.ndarray
    nbytes: np.ndarray
    across: np.ndarray
    chunks: np.ndarray

    @classmethod
    def of(cls, table: TensorTable, tensors: np.ndarray, books: np.ndarray, classes: int) -> _Records:
        """FormatError, without a reason, for what `decode` does not accept."""
        known = [Book.unpack(row, classes) for row in books]
        records = tensors.astype(np.int64)
        index, mode, book = records[:, TENSOR], records[:, CODE] & 0xFF, records[:, CODE] >> 8
        chunk_rows, chunk_cols = records[:, CHUNK_ROWS], records[:, CHUNK_COLS]
        _require((index < len(table)).all() and len(np.unique(index)) == len(index))
        rows, cols = table.columns.rows[index], table.columns.cols[index]
        is_coded = mode == CODED
        is_whole = ((mode == DENSE) | (mode == ABSOLUTE)) & (chunk_rows == 0) & (chunk_cols == 0) & (book == 0)
        fits = (chunk_rows >= 1) & (chunk_rows <= rows) & (chunk_cols >= 1) & (chunk_cols <= cols)
        fits &= (chunk_rows * chunk_cols <= MAX_ELEMENTS) & (book < len(known))
        _require((is_whole | (is_coded & fits)).all())
        across = np.where(is_coded, -(-cols // np.maximum(chunk_cols, 1)), 0)
        chunks = across * -(-rows // np.maximum(chunk_rows, 1))
        nbytes = np.where(is_coded, 0, table.columns.nbytes[index])
        is_ranked = is_coded & (classes > 1)
        for record in np.flatnonzero(is_ranked).tolist():
            is_ranked[record] = known[book[record]].class_map(table[int(index[record])].dtype) is not None
        return cls(
            known, classes, index, mode, book, is_coded, is_ranked, rows, cols, chunk_rows, chunk_cols, nbytes, across,
            chunks,
        )  # fmt: skip

    def of_books(self, column: int) -> np.ndarray:
        """A column of `Book.codes`, for each record."""
        values = np.array([book.codes[0, column] for book in self.books] or [0], np.int64)
        return values[np.where(self.is_coded, self.book, 0)]

    @property
    def orders(self) -> np.ndarray:
        """uint8[T, columns of a chunk row]"""
        orders = np.stack([book.orders for book in self.books] or [np.zeros(self.classes + FIELDS, np.uint8)])
        return orders[np.where(self.is_coded, self.book, 0)]


@dataclass(frozen=True, eq=False)
class _CodedChunks:
    """The chunks that have changes, as arrays of one entry for each: int64, checked against their bounds.

    Attributes:
        begin: for each record, where its payload begins.
        is_plain: bool, for each record: it is coded, and all of its chunks can be decoded on a device.
        owner: ascending, the record of the chunk.
        number: in the grid of the tensor.
        rows: [C, classes + FIELDS], as in the part.
        changes: of all classes.
        start: where the payload of the chunk begins.
        first, elements: flat index of its first element, and how many it has.
        shift: of its Rice parameters.
        k: that of its gaps if it has one class, and its changes are listed.
    """

    records: _Records
    begin: np.ndarray
    is_plain: np.ndarray
    owner: np.ndarray
    number: np.ndarray
    rows: np.ndarray
    changes: np.ndarray
    start: np.ndarray
    first: np.ndarray
    elements: np.ndarray
    shift: np.ndarray
    k: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Changes of each class."""
        return self.rows[:, : self.records.classes]

    @property
    def nbytes(self) -> np.ndarray:
        return self.rows[:, self.records.classes + BYTES]

    @classmethod
    def of(cls, records: _Records, chunks: np.ndarray, available: int) -> _CodedChunks:
        """Of chunk rows, and the size of the payload. FormatError, without a reason, for what `decode` refuses."""
        owner, number, rows = read_rows(chunks, records.orders, records.chunks)
        classes, is_ranked = records.classes, records.is_ranked[owner]
        counts, nbytes = rows[:, :classes], rows[:, classes + BYTES]
        bounds = np.searchsorted(owner, np.arange(len(records.index) + 1))
        _require((nbytes <= available).all() and (np.diff(bounds) > 0)[records.is_coded].all())
        height, width = records.chunk_rows[owner], records.chunk_cols[owner]
        down, right = np.divmod(number, records.across[owner])
        top, left, cols = down * height, right * width, records.cols[owner]
        elements = np.minimum(height, records.rows[owner] - top) * np.minimum(width, cols - left)
        _require(((counts >= 0) & (counts <= elements[:, None])).all() and not counts[~is_ranked, 1:].any())
        changes = counts.sum(axis=1)
        _require(((changes > 0) & (changes <= elements) & (changes <= 8 * nbytes)).all())

        ends = np.concatenate([[0], np.cumsum(nbytes)])  # of the chunks, if there were no other records
        _require((ends >= 0).all() and (ends <= available).all())  # sums of hostile numbers become negative
        of_record = records.nbytes + np.diff(ends[bounds])
        begin = np.concatenate([[0], np.cumsum(of_record)])
        _require((begin >= 0).all() and (begin <= available).all() and begin[-1] == available)
        start = begin[owner] + ends[:-1] - ends[bounds[owner]]

        shift = rows[:, classes + SHIFT]
        shift = np.where(shift & 1, -((shift + 1) // 2), shift // 2)
        k = np.clip(records.of_books(GAP)[owner] + shift, 0, MAX_K)
        is_crowded = 2 * changes > elements
        _require((is_ranked | is_crowded | (changes * (k + 1) <= 8 * nbytes)).all() and (nbytes <= _MOST_BYTES).all())
        is_plain = (
            records.is_coded & ~records.is_ranked & ((records.chunk_cols == records.cols) | (records.chunk_rows == 1))
        )
        is_plain[owner[is_crowded]] = False
        first = top * cols + left
        return cls(records, begin, is_plain, owner, number, rows, changes, start, first, elements, shift, k)


def _require(fine: bool | np.bool_) -> None:
    if not fine:
        raise FormatError("malformed")


def _words(payload: np.ndarray, device: torch.device) -> torch.Tensor:
    """The payload on a device, int32, with spare words behind it."""
    words = torch.zeros((len(payload) + 3 & ~3) + _SPARE, dtype=torch.uint8, device=device)
    words[: len(payload)].copy_(torch.from_numpy(payload))  # without the interpreter's lock
    return words.view(torch.int32)


def _codes(records: _Records, device: torch.device) -> torch.Tensor:
    """Of all books, class by class, as the kernels read them."""
    if not records.books:
        return torch.empty(0, dtype=torch.int32, device=device)
    return to_device(np.concatenate([kernel_codes(book) for book in records.books]), device)


def _decode(
    cut: _CodedChunks, own: np.ndarray, first: np.ndarray, words: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Numbers and differences of these chunks, of one class; None if one is malformed."""
    device = words.device
    if not len(own):
        return torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int16, device=device)
    gpu: Any = import_module("hubsync.kernels.gpu.decode")
    own = own[np.argsort(first[own])]
    counts = cut.changes[own]
    table = np.zeros((len(own), gpu.COLUMNS), np.int64)
    table[:, gpu.BEGIN] = 8 * cut.start[own]
    table[:, gpu.END] = 8 * (cut.start[own] + cut.nbytes[own])
    table[:, gpu.START], table[:, gpu.COUNT] = np.cumsum(counts) - counts, counts
    table[:, gpu.FIRST], table[:, gpu.SIZE] = first[own], cut.elements[own]
    table[:, gpu.GAP], table[:, gpu.BOOK] = cut.k[own], cut.records.classes * cut.records.book[cut.owner[own]]
    numbers, diffs, wrong = gpu.decode(words, to_device(table, device), codes, int(counts.sum()))
    return None if bool(wrong) else (numbers, diffs)


def _ranked(table: TensorTable, cut: _CodedChunks, first: np.ndarray, addresses: np.ndarray) -> RankedChunks:
    """The chunks that are coded by classes of old weights which are held."""
    own = np.flatnonzero((addresses > 0)[cut.owner])
    of, records = cut.owner[own], cut.records
    left = cut.number[own] % records.across[of] * records.chunk_cols[of]
    return RankedChunks(
        begin=8 * cut.start[own],
        end=8 * (cut.start[own] + cut.nbytes[own]),
        counts=cut.counts[own],
        shift=cut.shift[own],
        book=records.book[of],
        dtype=table.columns.dtype[records.index[of]],
        first=first[own],
        width=np.minimum(records.chunk_cols[of], records.cols[of] - left),
        size=cut.elements[own],
        cols=records.cols[of],
        address=addresses[of] + 2 * cut.first[own],
    )


def _added(
    listed: tuple[torch.Tensor, torch.Tensor], ranked: tuple[list[torch.Tensor], list[torch.Tensor]] | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both, in ascending order."""
    if ranked is None:
        return None
    numbers, order = torch.sort(torch.cat([listed[0], *ranked[0]]))
    return numbers, torch.cat([listed[1], *ranked[1]])[order]


def _decode_others(
    table: TensorTable, cut: _CodedChunks, records: np.ndarray, payload: np.ndarray, old: OldBits | None
) -> Patch:
    """The changes of the tensors of these records, decoded by the CPU."""
    patch: Patch = {}
    coded, of = [], cut.records
    for record in records.tolist():
        index = int(of.index[record])
        spec = table[index]
        if not of.is_coded[record]:
            begin = int(cut.begin[record])
            patch[index] = decode_whole(spec, int(of.mode[record]), payload[begin : begin + spec.nbytes])
            continue
        own = slice(*np.searchsorted(cut.owner, [record, record + 1]).tolist())
        grid = Grid(*spec.matrix, int(of.chunk_rows[record]), int(of.chunk_cols[record]))
        starts = np.append(cut.start[own], cut.begin[record + 1])
        bounds = np.concatenate([[0], np.cumsum(cut.changes[own])])
        book = of.books[int(of.book[record])]
        coded.append(Coded(index, spec, book, grid, cut.number[own], cut.rows[own], starts, bounds))
    if coded:
        for tensor in decode_coded(coded, words_from(payload), old):
            patch.update(tensor)
    return dict(sorted(patch.items()))
