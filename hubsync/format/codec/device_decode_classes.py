"""Chunks of a `compact` part, decoded on a GPU against the old weights that lie there: all in a few launches.

What `device_decode` has checked is sound: chunk rows, and that the bytes of chunks lie inside the payload. The rest is
checked by the kernels, or here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import numpy as np
import torch

from hubsync.kernels.classes import CLASSES, ClassMap

from .book import FIELDS, GAP, MAX_K, MAX_PLANES, NO_PLANE, PLANES, USUAL, Book
from .device import kernel_codes, to_device

_TOGETHER = 1 << 20  # segments that are decoded together: bounds the memory for their counts


@dataclass(frozen=True, eq=False)
class RankedChunks:
    """Chunks whose changes are ranked by class: arrays of one entry for each, int64.

    Attributes:
        begin, end: first bit of the payload, and the bit behind the last one.
        counts: [C, CLASSES], changes.
        shift: of the Rice parameters of gaps.
        book: number of the code book.
        dtype: number of the dtype, the same for all chunks of a book.
        first: number of the first element.
        width, size: columns, and elements.
        cols: columns of the tensor, or the distance from one row to the next.
        address: of the first old weight.
    """

    begin: np.ndarray
    end: np.ndarray
    counts: np.ndarray
    shift: np.ndarray
    book: np.ndarray
    dtype: np.ndarray
    first: np.ndarray
    width: np.ndarray
    size: np.ndarray
    cols: np.ndarray
    address: np.ndarray

    def __len__(self) -> int:
        return len(self.begin)

    def only(self, chunks: np.ndarray) -> RankedChunks:
        return RankedChunks(*(getattr(self, field.name)[chunks] for field in fields(self)))


def decode_ranked(
    chunks: RankedChunks, books: list[Book], dtypes: list[str], words: torch.Tensor, codes: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Numbers and differences, in no order, in one or more pieces; None if a chunk is malformed.

    Args:
        dtypes: by number.
        words: the payload, int32, with three spare ones at the end.
        codes: int32[books * CLASSES, ...], of the kernels.
    """
    numbers, diffs = [], []
    wrong = torch.zeros(1, dtype=torch.int32, device=words.device)
    for own in _pieces(chunks):
        part = chunks.only(own)
        number = int(part.book[0])
        piece = _Piece(part, books[number], dtypes[int(part.dtype[0])], CLASSES * number, words.device)
        found = piece.decode(words, codes, wrong)
        if found is None:
            return None
        numbers.append(found[0])
        diffs.append(found[1])
    return None if bool(wrong) else (numbers, diffs)


def prepare(device: torch.device) -> None:
    """Compile the kernels: decode one weight, whose change is +1."""
    codes = np.zeros((CLASSES, PLANES + MAX_PLANES), np.uint8)
    codes[:, USUAL], codes[:, PLANES:] = 1, NO_PLANE
    book = Book(0, np.zeros(CLASSES + FIELDS, np.uint8), codes)
    weight = torch.zeros(1, dtype=torch.int16, device=device)
    one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
    counts = np.zeros((1, CLASSES), np.int64)
    counts[0, 0] = 1
    chunk = RankedChunks(none, 8 * one, counts, none, none, none, none, one, one, one, weight.data_ptr() * one)
    words = torch.tensor([0b10, 0, 0, 0], dtype=torch.int32, device=device)  # the sign, and a distance of 0
    found = decode_ranked(chunk, [book], ["BF16"], words, to_device(kernel_codes(book), device))
    assert found is not None
    assert (found[0][0].tolist(), found[1][0].tolist()) == ([0], [1])


def _pieces(chunks: RankedChunks) -> Iterator[np.ndarray]:
    """Chunks of one book and dtype each, and of a bounded number of segments."""
    gpu: Any = import_module("hubsync.kernels.gpu.classes")
    kinds = chunks.book << 8 | chunks.dtype
    segments = -(-chunks.size // gpu.SEGMENT)
    for kind in np.unique(kinds):
        own = np.flatnonzero(kinds == kind)
        group = (np.cumsum(segments[own]) - 1) // _TOGETHER
        yield from np.split(own, np.flatnonzero(np.diff(group)) + 1)


class _Piece:
    """Some chunks of one book and dtype."""

    def __init__(self, chunks: RankedChunks, book: Book, dtype: str, first_code: int, device: torch.device):
        self._chunks, self._book, self._first_code = chunks, book, first_code
        self._classes = ClassMap.of(dtype, book.low)
        self._weights: Any = import_module("hubsync.kernels.gpu.classes")
        self._gpu: Any = import_module("hubsync.kernels.gpu.class_decode")
        segments = -(-chunks.size // self._weights.SEGMENT)
        self._segments = int(segments.sum())
        first = np.cumsum(segments) - segments
        columns = [chunks.address, chunks.width, chunks.cols, chunks.size, first]
        self._table = to_device(np.stack(columns, axis=1), device)
        self._places = to_device(np.stack([first, segments, chunks.first, chunks.width, chunks.cols], axis=1), device)
        numbers = torch.arange(len(chunks), dtype=torch.int32, device=device)
        self._owner = numbers.repeat_interleave(to_device(segments, device), output_size=self._segments)
        self._edges = to_device(np.append(first, self._segments), device)
        self._device = device

    def decode(
        self, words: torch.Tensor, codes: torch.Tensor, wrong: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        device, pieces, total = self._device, self._segments, int(self._chunks.counts.sum())
        before = self._count()
        at = self._edges[:, None] + pieces * torch.arange(CLASSES, device=device)
        sums = before[at]
        laid_out = self._laid_out((sums[1:] - sums[:-1]).long())
        if laid_out is None:
            return None
        tables, listed, counts = laid_out
        ranks = torch.empty(total, dtype=torch.int32, device=device)
        diffs = torch.empty(total, dtype=torch.int16, device=device)
        self._gpu.read(words, *tables, codes, listed, (ranks, diffs), wrong)
        rows = torch.arange(counts.numel(), dtype=torch.int32, device=device)
        owner = rows.repeat_interleave(counts.reshape(-1), output_size=total)
        segments, within = torch.empty_like(ranks), torch.empty_like(ranks)
        self._gpu.locate(ranks, owner, self._places, before, pieces, (segments, within), wrong)
        segments, order = segments.sort(stable=True)
        edges = torch.arange(pieces + 1, dtype=torch.int32, device=device)
        bounds = torch.searchsorted(segments, edges, out_int32=True)
        changes = within[order], (owner[order] % CLASSES).to(torch.uint8)
        numbers = torch.empty(total, dtype=torch.int64, device=device)
        self._gpu.select(bounds, self._owner, self._table, changes, self._places, (numbers, wrong), self._classes)
        return numbers, diffs[order]

    def _count(self) -> torch.Tensor:
        """int32[1 + CLASSES * segments]: elements of each class before each segment, class by class, modulo 2^32."""
        counts = torch.zeros(1 + CLASSES * self._segments, dtype=torch.int32, device=self._device)
        self._weights.count(self._table, self._owner, 0, counts, self._segments, self._classes)
        return counts.cumsum(0, dtype=torch.int32)

    def _laid_out(self, sizes: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], int, torch.Tensor] | None:
        """Where the sections of chunks are. None if they do not fit.

        Args:
            sizes: int64[C, CLASSES], elements.

        Returns:
            ((chunks, rows) for the kernels, number of listed elements, counts).
        """
        chunks, device = self._chunks, self._device
        counts, begin, end = (to_device(array, device) for array in (chunks.counts, chunks.begin, chunks.end))
        is_crowded = 2 * counts > sizes
        listed = torch.where(is_crowded, sizes - counts, counts)
        usual = to_device(self._book.codes[:, GAP].astype(np.int64), device).expand_as(counts)
        shifted = (usual + to_device(chunks.shift, device)[:, None]).clamp(0, MAX_K)
        k = torch.where(is_crowded, usual, shifted)
        low = begin[:, None] + _before(listed * k)
        sign = begin + (listed * k).sum(1)
        unary, all_listed = sign + counts.sum(1), listed.sum(1)
        fits = (listed >= 0).all() & (unary + all_listed <= end).all()
        if not bool(fits):
            return None
        start, first = _before(counts.reshape(-1)).view_as(counts), _before(listed.reshape(-1)).view_as(counts)
        codes = self._first_code + torch.arange(CLASSES, device=device).expand_as(counts)
        signs = sign[:, None] + _before(counts)
        whole = (side[:, None].expand_as(counts) for side in (end, first[:, 0]))
        rows = torch.stack([start, counts, first, listed, k, low, signs, sizes, codes, *whole], dim=2)
        table = torch.stack([unary, end, first[:, 0], all_listed], dim=1)
        return (table, rows.flatten(0, 1)), int(all_listed.sum()), counts


def _before(values: torch.Tensor) -> torch.Tensor:
    """Sums of the values before each one, along the last dimension."""
    return values.cumsum(-1) - values
