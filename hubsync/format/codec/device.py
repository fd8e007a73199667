"""The chunks of a `DevicePatch` for the encoder: counted and written on the device, for all tensors in one launch.

The host reads three results: what the chunks would cost, for the book; their sizes; the payload. Python code runs once
for a patch, never once for a tensor or a chunk. The bits are those of `streams.write`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from hubsync import kernels
from hubsync.format.device_patch import COUNT, FIRST, OFFSET, TENSOR, DevicePatch
from hubsync.format.table import DTYPES, TensorTable

from .book import GAP, MAX_K, MAX_PLANES, NO_PLANE, PLANES, TAIL, USUAL, Book
from .costs import DISTANCES, MAGNITUDES, MAX_GAP_K
from .grid import contiguous_sizes
from .layout import Measured, keys_of, parts_of
from .rows import zigzag

Kind = tuple[str, bool]
"""What has a book of its own: a dtype, coded by class or not."""


@dataclass(frozen=True, eq=False)
class _Cut:
    """The chunks of all spans, as arrays of one entry for each chunk: int64, ascending by key.

    Attributes:
        keys: of the chunk (`layout.key_of`).
        group: the dtype, as a number into `dtypes`.
        first: number of the first element of the chunk. It has no number if the span begins later.
        size: elements of the chunk.
        low, high: numbers of its elements in the span.
    """

    dtypes: list[str]
    keys: np.ndarray
    group: np.ndarray
    first: np.ndarray
    size: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, table: TensorTable, spans: np.ndarray) -> _Cut:
        spans = spans[spans[:, COUNT] > 0]
        spans = spans[np.argsort(spans[:, TENSOR])]
        index, offset = spans[:, TENSOR], spans[:, OFFSET]
        rows, cols = table.columns.rows[index], table.columns.cols[index]
        codes, group = np.unique(table.columns.dtype[index], return_inverse=True)
        chunk_rows, chunk_cols = contiguous_sizes(rows, cols)
        across = -(-cols // chunk_cols)

        def number_of(flat: np.ndarray) -> np.ndarray:
            row, col = np.divmod(flat, cols)
            return row // chunk_rows * across + col // chunk_cols

        begins = number_of(offset)
        counts = number_of(offset + spans[:, COUNT] - 1) - begins + 1
        of = np.repeat(np.arange(len(spans)), counts)  # the span of each chunk
        number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts - begins, counts)
        down, right = np.divmod(number, across[of])
        top, left = down * chunk_rows[of], right * chunk_cols[of]
        start = top * cols[of] + left  # flat index: chunks are runs of elements
        size = np.minimum(chunk_rows[of], rows[of] - top) * np.minimum(chunk_cols[of], cols[of] - left)
        base = (spans[:, FIRST] - offset)[of]  # number of the tensor's element 0, had it one
        low = np.maximum(start, offset[of])
        high = np.minimum(start + size, (offset + spans[:, COUNT])[of])
        keys = keys_of(index[of], number)
        return cls([DTYPES[code] for code in codes], keys, group[of], base + start, size, base + low, base + high)


class DeviceChunks:
    """The chunks of a `DevicePatch` that have changes."""

    def __init__(self, table: TensorTable, patch: DevicePatch):
        self.patch = patch
        self._table = table
        self._cut = cut = _Cut.of(table, patch.spans)
        self._gpu: Any = import_module("hubsync.kernels.gpu.encode")
        with launching_on(patch.numbers.device):
            bounds, quotients, self._histogram = self._look()
        self._starts, self._counts = bounds[0], bounds[1] - bounds[0]
        is_crowded = 2 * self._counts > cut.size  # its unchanged elements are listed: rare, and left to the host
        self._is_coded = (self._counts > 0) & ~is_crowded
        self._crowded = np.flatnonzero(is_crowded)
        self._costs = quotients[:, :MAX_GAP_K] + self._counts[:, None] * np.arange(1, MAX_GAP_K + 1)

    def _look(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranges int64[2, chunks] in the list, sums of quotients, and magnitudes int64[dtypes, ...]."""
        patch, cut, gpu = self.patch, self._cut, self._gpu
        chunks, device = len(cut.keys), patch.numbers.device
        edges = to_device(np.stack([cut.first, cut.size, cut.group, cut.low, cut.high]), device)
        bounds = torch.searchsorted(patch.numbers, edges[3:])
        quotients = torch.zeros((chunks, gpu.PARAMETERS), dtype=torch.int32, device=device)
        histogram = torch.zeros((len(cut.dtypes), gpu.COPIES, gpu.MAGNITUDES), dtype=torch.int32, device=device)
        if chunks:
            gpu.look(patch.numbers, patch.old, patch.new, bounds, edges, quotients, histogram)
        found = to_host(bounds, histogram.sum(1), quotients)
        return found[0], found[2], found[1]

    def first_tensors(self) -> dict[Kind, int]:
        """Each kind that has changes -> index of its first tensor with changes."""
        has_changes = self._counts > 0
        own = {dtype: self._cut.keys[has_changes & (self._cut.group == g)] for g, dtype in enumerate(self._cut.dtypes)}
        return {(dtype, False): int(parts_of(keys[0])[0]) for dtype, keys in own.items() if len(keys)}

    def sizes(self, tensors: np.ndarray) -> np.ndarray:
        """int64[n, 2], chunk_rows and chunk_cols of these tensors."""
        columns = self._table.columns
        return np.stack(contiguous_sizes(columns.rows[tensors], columns.cols[tensors]), axis=1)

    def group(self, kind: Kind, low: int) -> DeviceGroup:
        """The chunks of one dtype, but for crowded ones."""
        number = self._cut.dtypes.index(kind[0])
        own = np.flatnonzero(self._is_coded & (self._cut.group == number))
        table = np.zeros((len(own), self._gpu.COLUMNS), np.int64)
        table[:, self._gpu.START], table[:, self._gpu.COUNT] = self._starts[own], self._counts[own]
        table[:, self._gpu.FIRST] = self._cut.first[own]
        return DeviceGroup(self.patch, self._cut.keys[own], table, self._costs[own], self._histogram[number])

    def crowded(self, kind: Kind) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """(table index, number, positions, differences) of each chunk with more than half of its elements changed."""
        own = self._crowded[self._cut.group[self._crowded] == self._cut.dtypes.index(kind[0])]
        if not len(own):
            return
        counts = self._counts[own]
        numbers, diffs = self.patch.listed(self._starts[own], self._starts[own] + counts)
        stop = np.cumsum(counts)
        index, number = parts_of(self._cut.keys[own])
        for c, (start, end) in enumerate(zip(stop - counts, stop, strict=True)):
            positions = (numbers[start:end] - self._cut.first[own[c]]).astype(np.int32)
            yield int(index[c]), int(number[c]), positions, diffs[start:end]


class DeviceGroup:
    """The chunks of one dtype on the device, each with fewer than half of its elements changed.

    Args:
        table: int64[chunks, COLUMNS], of the kernels.
        costs: int64[chunks, MAX_GAP_K], bits of the gaps for each Rice parameter.
        histogram: number of changes of each magnitude.
    """

    def __init__(
        self, patch: DevicePatch, keys: np.ndarray, table: np.ndarray, costs: np.ndarray, histogram: np.ndarray
    ):
        self._patch, self._keys, self._table, self._costs, self._histogram = patch, keys, table, costs, histogram
        self._gpu: Any = import_module("hubsync.kernels.gpu.encode")

    # --- what the chunks would cost ---

    def gap_cost(self) -> np.ndarray:
        return self._costs.sum(axis=0, keepdims=True)

    def lists(self) -> np.ndarray:
        return np.array([len(self._keys)])

    def magnitude_counts(self) -> np.ndarray:
        return self._histogram[None, :MAGNITUDES]

    def distance_counts(self, usual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, beyond = distances_of(self._histogram, int(usual[0]))
        return found[None], beyond[:, None]

    # --- their bits ---

    def measure(self, book: Book) -> Measured:
        """Choose shifts, and find the bytes of the chunks."""
        gpu, table, code = self._gpu, self._table, book.codes[0]
        shifts = _best_shifts(self._costs, int(code[GAP]))
        table[:, gpu.GAP] = np.clip(code[GAP] + shifts, 0, MAX_K)
        codes = kernel_codes(book)
        gaps = self._costs[np.arange(len(table)), table[:, gpu.GAP]] + table[:, gpu.COUNT]  # and the signs
        bits = np.zeros((len(table), MAX_PLANES + 1), np.int64)
        if len(table):
            device = self._patch.numbers.device
            with launching_on(device):
                self._codes = to_device(codes, device)
                on_device = torch.zeros(bits.shape, dtype=torch.int64, device=device)
                chunks = to_device(table, device)
                gpu.measure_magnitudes(self._patch.old, self._patch.new, chunks, self._codes, on_device)
                (bits,) = to_host(on_device)
        self._ends = gaps[:, None] + np.cumsum(bits, axis=1) - bits
        self._nbytes = (gaps + bits.sum(axis=1) + 7) >> 3
        columns = np.stack([table[:, gpu.COUNT], zigzag(shifts), self._nbytes], axis=1)
        return Measured(self._keys, columns)

    def payload(self, is_kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(keys, end of the bytes, bytes) of those chunks of `measure` that are kept."""
        keys, nbytes = self._keys[is_kept], self._nbytes[is_kept]
        ends = np.cumsum(nbytes)
        if not len(keys):
            return keys, ends, np.zeros(0, np.uint8)
        begins = 8 * (ends - nbytes)
        sections = np.concatenate([begins[:, None], begins[:, None] + self._ends[is_kept]], axis=1)
        device, total = self._patch.numbers.device, int(ends[-1])
        with launching_on(device):
            chunks, sections = to_device(self._table[is_kept], device), to_device(sections, device)
            words = torch.zeros(total // 4 + 2, dtype=torch.int32, device=device)
            patch = self._patch
            self._gpu.write(patch.numbers, patch.old, patch.new, chunks, self._codes, sections, words)
            (payload,) = to_host(words.view(torch.uint8)[:total])
        return keys, ends, payload


def can_encode(patch: DevicePatch) -> bool:
    """Whether the kernels run where the changes are."""
    return kernels.on_gpu(patch.numbers)


def kernel_codes(book: Book) -> np.ndarray:
    """int32[classes, CODES], the codes of magnitudes as kernels read them."""
    planes = np.append(book.codes[:, PLANES:] == NO_PLANE, np.ones((book.classes, 1), bool), axis=1).argmax(axis=1)
    columns = [book.codes[:, USUAL], book.codes[:, TAIL], planes, *book.codes[:, PLANES:].T]
    return np.stack(columns, axis=1).astype(np.int32)


def distances_of(histogram: np.ndarray, usual: int) -> tuple[np.ndarray, np.ndarray]:
    """`fit.Counts.distance_counts` of one class, from the number of changes of each magnitude."""
    magnitudes = np.flatnonzero(histogram)
    counts, distances = histogram[magnitudes], _folded(magnitudes, usual)
    found = np.bincount(distances, counts, minlength=DISTANCES)[:DISTANCES].astype(np.int64)
    counts, far = counts[distances >= DISTANCES], distances[distances >= DISTANCES]
    k = np.arange(MAX_K + 1)[:, None]
    exponents = np.frexp(far + (1 << k))[1] - 1 - k  # exactly, unlike a logarithm
    return found, np.stack([2 * exponents + k + 1, (far >> k) + k + 1]) @ counts


def _folded(magnitudes: np.ndarray, usual: int) -> np.ndarray:
    """`book.fold` of many."""
    near = np.where(magnitudes > usual, 2 * (magnitudes - usual) - 1, 2 * (usual - magnitudes))
    return np.where(magnitudes >= 2 * usual, magnitudes - 1, near)


def _best_shifts(costs: np.ndarray, k: int) -> np.ndarray:
    """`costs.best_shift` of chunks of one class that list their changed elements: int64[chunks]."""
    shifts = np.array(sorted(range(-MAX_GAP_K, MAX_GAP_K), key=lambda shift: (abs(shift), shift)))
    bits = costs[:, np.clip(k + shifts, 0, MAX_GAP_K - 1)] + 2 * np.abs(shifts)
    return np.minimum(shifts[np.argmin(bits, axis=1)], MAX_GAP_K - 1 - k)


@contextmanager
def launching_on(device: torch.device) -> Iterator[None]:
    """Launch kernels on this device: a thread begins with device 0."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def to_host(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Copies of device tensors by one transfer, into page-locked memory on a GPU. Wider elements come first."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    if joined.device.type == "cuda":
        held = torch.empty(joined.shape, dtype=torch.uint8, pin_memory=True)
        held.copy_(joined, non_blocking=True)
        torch.cuda.current_stream(joined.device).synchronize()
        joined = held
    arrays, start = [], 0
    for tensor, part in zip(tensors, parts, strict=True):
        own = joined[start : start + len(part)].numpy()
        start += len(part)
        arrays.append(own.view(_NUMPY[tensor.dtype]).reshape(tensor.shape))
    return arrays


def host_memory(nbytes: int) -> np.ndarray:
    """uint8[nbytes], not zeroed. Where a GPU is in use it is page-locked, and freed memory is used again.

    New pages would cost more than the copy into them.
    """
    is_locked = torch.cuda.is_initialized()
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_locked).numpy()


_NUMPY = {torch.int16: np.int16, torch.uint8: np.uint8, torch.int32: np.int32, torch.int64: np.int64}
