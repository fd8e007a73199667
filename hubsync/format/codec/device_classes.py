"""The chunks of a `DevicePatch` for the encoder, by class: ranked, counted and written on the device.

As `device`: all tensors in the same launches, few results for the host, and the bits of `streams.write`. Old weights
are read where they are, twice: to count the elements of each class, and to rank the changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hubsync.format.device_patch import COUNT, FIRST, OFFSET, TENSOR, DevicePatch
from hubsync.format.table import DTYPES, TensorTable
from hubsync.kernels.classes import CLASSES, ClassMap

from .book import GAP, MAX_K, MAX_PLANES, Book
from .costs import MAGNITUDES, MAX_GAP_K
from .device import Kind, distances_of, kernel_codes, launching_on, to_device, to_host
from .grid import tile_sizes
from .layout import Measured, WholeOldBits, keys_of, parts_of
from .rows import zigzag

_TOGETHER = 1 << 20  # segments that are ranked together: bounds the memory for their counts
_SHIFTS = sorted(range(-MAX_GAP_K, MAX_GAP_K), key=lambda shift: (abs(shift), shift))  # the first of equals is best


@dataclass(frozen=True, eq=False)
class _Tiles:
    """The chunks of all tensors that have a span: those of one kind after the other, each in ascending order.

    Attributes:
        kinds: kind -> its chunks.
        keys: int64[chunks], of the chunk (`layout.key_of`).
        spans, chunks: for the kernels; addresses are missing.
        tensors: int64[chunks], of each chunk.
        offsets: int64[chunks], flat index of the first element.
    """

    kinds: dict[Kind, slice]
    keys: np.ndarray
    spans: np.ndarray
    chunks: np.ndarray
    tensors: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, table: TensorTable, spans: np.ndarray, gpu: Any) -> _Tiles:
        spans = spans[spans[:, COUNT] > 0]
        index, columns = spans[:, TENSOR], table.columns
        kind = 2 * columns.dtype[index] + (columns.rows[index] > 1)
        order = np.lexsort([index, kind])
        spans, index, kind = spans[order], index[order], kind[order]
        rows, cols = columns.rows[index], columns.cols[index]
        chunk_rows, chunk_cols = tile_sizes(rows, cols)
        across = -(-cols // chunk_cols)
        counts = -(-rows // chunk_rows) * across
        first = np.cumsum(counts) - counts

        of = np.repeat(np.arange(len(spans)), counts)  # the span of each chunk
        number = np.arange(len(of)) - first[of]
        down, right = np.divmod(number, across[of])
        top, left = down * chunk_rows[of], right * chunk_cols[of]
        width = np.minimum(chunk_cols[of], cols[of] - left)
        size = np.minimum(chunk_rows[of], rows[of] - top) * width
        segments = -(-size // gpu.SEGMENT)
        offsets = top * cols[of] + left
        chunks = np.stack([offsets, width, cols[of], size, np.cumsum(segments) - segments], axis=1)
        places = [spans[:, FIRST], spans[:, COUNT], spans[:, OFFSET], cols, chunk_rows, chunk_cols, first]
        codes, starts = np.unique(kind[of], return_index=True)
        bounds = pairwise([*starts.tolist(), len(of)])
        kinds = {
            (DTYPES[code >> 1], bool(code & 1)): slice(*own) for code, own in zip(codes.tolist(), bounds, strict=True)
        }
        by_number = np.stack(places, axis=1)[np.argsort(spans[:, FIRST])]
        return cls(kinds, keys_of(index[of], number), by_number, chunks, index[of], offsets)


class ClassedChunks:
    """The chunks of a `DevicePatch` that have changes.

    Args:
        weights: the old weights, by table index, for each span; contiguous, where the changes are.
    """

    def __init__(self, table: TensorTable, patch: DevicePatch, weights: dict[int, torch.Tensor]):
        self.patch = patch
        self._table, self._weights = table, weights
        self._gpu: Any = import_module("hubsync.kernels.gpu.classes")
        self._tiles = tiles = _Tiles.of(table, patch.spans, self._gpu)
        addresses = np.zeros(len(table), np.int64)
        addresses[list(weights)] = [tensor.data_ptr() for tensor in weights.values()]
        tiles.chunks[:, self._gpu.ADDRESS] = addresses[tiles.tensors] + 2 * tiles.offsets
        with launching_on(patch.numbers.device):
            self._bounds = self._sort()
        self.counts = np.diff(self._bounds)

    def _sort(self) -> np.ndarray:
        """Bring the changes into the order of chunks. int64[chunks + 1]: the changes of each."""
        patch, tiles, gpu = self.patch, self._tiles, self._gpu
        n, device = len(patch.numbers), patch.numbers.device
        sizes = -(-tiles.chunks[:, gpu.SIZE] // gpu.SEGMENT)
        self.segments = int(sizes.sum())
        self.chunks = to_device(tiles.chunks, device)
        chunk = torch.arange(len(sizes), dtype=torch.int32, device=device)
        self.owner = chunk.repeat_interleave(to_device(sizes, device), output_size=self.segments)
        segments = torch.empty(n, dtype=torch.int32, device=device)
        places = torch.empty(n, dtype=torch.int16, device=device)
        if len(tiles.spans):
            spans = to_device(tiles.spans, device)
            gpu.locate(patch.numbers, spans, self.chunks, segments, places, self.segments)
        else:
            segments.zero_()  # as many as `none`
        segments, order = segments.sort(stable=True)
        self.places, self.old, self.new = places[order], patch.old[order], patch.new[order]
        edges = torch.arange(self.segments + 1, dtype=torch.int32, device=device)
        self.bounds = torch.searchsorted(segments, edges, out_int32=True)
        starts = np.append(tiles.chunks[:, gpu.FIRST_SEGMENT], self.segments)
        (bounds,) = to_host(self.bounds[to_device(starts, device)])
        return bounds.astype(np.int64)

    def first_tensors(self) -> dict[Kind, int]:
        """Each kind that has changes -> index of its first tensor with changes."""
        own = {kind: self._keys(kind) for kind in self._tiles.kinds}
        return {kind: int(parts_of(keys[0])[0]) for kind, keys in own.items() if len(keys)}

    def sizes(self, tensors: np.ndarray) -> np.ndarray:
        """int64[n, 2], chunk_rows and chunk_cols of these tensors."""
        columns = self._table.columns
        return np.stack(tile_sizes(columns.rows[tensors], columns.cols[tensors]), axis=1)

    def _own(self, kind: Kind) -> np.ndarray:
        """Chunks of a kind that have changes, as numbers into the tiles."""
        chunks = self._tiles.kinds[kind]
        return chunks.start + np.flatnonzero(self.counts[chunks])

    def _keys(self, kind: Kind) -> np.ndarray:
        return self._tiles.keys[self._own(kind)]

    def keys(self, kind: Kind) -> np.ndarray:
        """int64, ascending: of the chunks of a kind that have changes."""
        return self._keys(kind)

    def exponents(self, kind: Kind, keys: np.ndarray, sample: int) -> np.ndarray:
        """int64[256], changes by the exponent of their old pattern, from about `sample` of each of these chunks."""
        own = self._own(kind)
        own = own[np.isin(self._tiles.keys[own], keys)]
        steps = -(-self.counts[own] // sample)
        starts, stops = self._bounds[own], self._bounds[own + 1]
        at = [np.arange(*cut) for cut in zip(starts, stops, steps, strict=True)]
        weights = np.repeat(steps, [len(some) for some in at])
        if not at:
            return np.zeros(256, np.int64)
        (old,) = to_host(self.old[to_device(np.concatenate(at), self.old.device)])
        exponents = ClassMap.of(kind[0], 0).exponents(old.view(np.uint16))
        return np.bincount(exponents, weights, minlength=256).astype(np.int64)

    def group(self, kind: Kind, low: int) -> ClassedGroup:
        """The chunks of one kind, in class order."""
        with launching_on(self.patch.numbers.device):
            return self._group(kind, ClassMap.of(kind[0], low))

    def _group(self, kind: Kind, classes: ClassMap) -> ClassedGroup:
        chunks, device, gpu = self._tiles.kinds[kind], self.old.device, self._gpu
        ranks = torch.empty(len(self.old), dtype=torch.int32, device=device)
        rows = torch.empty_like(ranks)
        changes = self.bounds, self.old, self.places
        found = []
        starts = np.append(self._tiles.chunks[:, gpu.FIRST_SEGMENT], self.segments)
        for first, end in _pieces(starts[chunks.start : chunks.stop + 1]):
            pieces = end - first
            counts = torch.zeros(1 + CLASSES * pieces, dtype=torch.int32, device=device)
            gpu.count(self.chunks, self.owner, first, counts, pieces, classes)
            before = counts.cumsum(0, dtype=torch.int32)  # differences are right modulo 2^32
            gpu.rank(self.chunks, self.owner, changes, before, (ranks, rows), (first, pieces), classes)
            own = starts[(starts >= first) & (starts <= end)] - first
            at = to_device(own[:, None] + pieces * np.arange(CLASSES), device)
            sums = before[at]
            found.append(sums[1:] - sums[:-1])
        first, end = (int(self._bounds[side]) for side in (chunks.start, chunks.stop))
        rows, order = rows[first:end].sort(stable=True)
        edges = torch.arange(CLASSES * chunks.start, CLASSES * chunks.stop + 1, dtype=torch.int32, device=device)
        bounds = torch.searchsorted(rows, edges)
        table = torch.stack([bounds[:-1], bounds[1:] - bounds[:-1], torch.cat(found).reshape(-1).long()], dim=1)
        own = self._own(kind)
        table = table.view(-1, CLASSES, 3)[to_device(own - chunks.start, device)]
        patterns = (side[first:end][order] for side in (ranks, self.old, self.new))
        return ClassedGroup(self._tiles.keys[own], table.view(-1, 3), *patterns)


class ClassedGroup:
    """The chunks of one kind on the device.

    Args:
        keys: int64[chunks].
        rows: int64[chunks * CLASSES, 3]: where the changes of a class of a chunk begin, changes, elements.
        ranks: int32[n], of the changes in class order.
        old, new: int16[n], their patterns.
    """

    def __init__(self, keys: np.ndarray, rows: torch.Tensor, ranks: torch.Tensor, old: torch.Tensor, new: torch.Tensor):
        self._keys, self._old, self._new = keys, old, new
        self._gpu: Any = import_module("hubsync.kernels.gpu.classes")
        self._magnitudes: Any = import_module("hubsync.kernels.gpu.encode")
        self._starts, self._counts, sizes = rows.unbind(1)
        self._listed = torch.minimum(self._counts, sizes - self._counts)
        self._first = self._listed.cumsum(0) - self._listed
        self._is_shifted = 2 * self._counts <= sizes
        self._gaps = torch.empty_like(ranks)
        device, gpu = ranks.device, self._gpu
        costs = torch.empty((len(rows), gpu.PARAMETERS), dtype=torch.int32, device=device)
        histogram = torch.zeros((CLASSES, gpu.COPIES, gpu.MAGNITUDES), dtype=torch.int32, device=device)
        if len(rows):
            table = torch.cat([rows, self._first[:, None]], dim=1)
            gpu.look(table, ranks, old, new, self._gaps, costs, histogram)
        self._costs = costs[:, :MAX_GAP_K].contiguous()
        by_chunk = self._costs.view(-1, CLASSES, MAX_GAP_K)
        lists = (self._counts.view(-1, CLASSES) > 0).sum(0)
        self._gap_cost, self._lists, self._histogram = to_host(by_chunk.sum(0), lists, histogram.sum(1))

    # --- what the chunks would cost ---

    def gap_cost(self) -> np.ndarray:
        return self._gap_cost

    def lists(self) -> np.ndarray:
        return self._lists

    def magnitude_counts(self) -> np.ndarray:
        return self._histogram[:, :MAGNITUDES]

    def distance_counts(self, usual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [distances_of(own, int(center)) for own, center in zip(self._histogram, usual, strict=True)]
        return np.stack([own for own, _ in found]), np.stack([beyond for _, beyond in found], axis=1)

    # --- their bits ---

    def measure(self, book: Book) -> Measured:
        """Choose shifts, and find the bytes of the chunks."""
        device, chunks = self._old.device, len(self._keys)
        with launching_on(device):
            usual = to_device(np.tile(book.codes[:, GAP].astype(np.int64), chunks), device)
            shifts = self._best_shifts(book.codes[:, GAP].astype(np.int64))
            shifted = (usual + shifts.repeat_interleave(CLASSES)).clamp(0, MAX_K)
            k = torch.where(self._is_shifted, shifted, usual)
            self._codes = to_device(kernel_codes(book), device)
            bits = torch.zeros((len(k), MAX_PLANES + 1), dtype=torch.int64, device=device)
            book_rows = torch.arange(CLASSES, device=device).repeat(chunks)
            columns = [self._starts, self._counts, self._first, k, book_rows, self._listed]
            self._table = torch.stack(columns, dim=1)
            if chunks:
                self._magnitudes.measure_magnitudes(self._old, self._new, self._table, self._codes, bits)
            gaps = self._costs.gather(1, k[:, None])[:, 0].long()
            self._sections, ends = self._laid_out(gaps, self._listed * k, bits)
            nbytes = (ends + 7) >> 3
            counts, shift, self._nbytes = to_host(self._counts.view(-1, CLASSES), shifts, nbytes)
        return Measured(self._keys, np.concatenate([counts, np.stack([zigzag(shift), self._nbytes], axis=1)], axis=1))

    def _best_shifts(self, k: np.ndarray) -> torch.Tensor:
        """`costs.best_shift` of the chunks: int64[chunks]."""
        device = self._costs.device
        shifts = np.array(_SHIFTS)
        parameters = to_device(np.clip(k[:, None] + shifts, 0, MAX_GAP_K - 1), device)
        costs = (self._costs * self._is_shifted[:, None]).view(-1, CLASSES, MAX_GAP_K)  # the others do not depend on it
        bits = to_device(2 * np.abs(shifts), device).repeat(len(costs), 1)
        for c in range(CLASSES):
            bits += costs[:, c].index_select(1, parameters[c])
        order = torch.arange(len(shifts), device=device)
        best = (bits * len(shifts) + order).argmin(dim=1)
        return to_device(shifts, device)[best].clamp(max=MAX_GAP_K - 1 - int(k.max()))

    def _laid_out(
        self, gaps: torch.Tensor, low: torch.Tensor, magnitudes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the sections of each row begin in its chunk: low parts, quotients, signs, magnitudes.

        Args:
            gaps: int64[rows], bits of the gaps.
            low: int64[rows], bits of their low parts.
            magnitudes: int64[rows, MAX_PLANES + 1], bits of each section.

        Returns:
            int64[chunks, CLASSES, 3 + MAX_PLANES + 1], int64[chunks] the end of the chunk.
        """
        per_class = [part.view(-1, CLASSES) for part in (low, self._counts, gaps - low)]
        parts = torch.cat([*per_class, magnitudes.view(len(self._keys), -1)], dim=1)
        ends = parts.cumsum(1)
        begins = ends - parts
        low, sign, unary, rest = begins.split([CLASSES, CLASSES, CLASSES, parts.shape[1] - 3 * CLASSES], dim=1)
        sections = torch.cat(
            [torch.stack([low, unary, sign], dim=2), rest.reshape(len(rest), CLASSES, MAX_PLANES + 1)], dim=2
        )
        return sections, ends[:, -1]

    def payload(self, is_kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(keys, end of the bytes, bytes) of those chunks of `measure` that are kept."""
        keys, nbytes = self._keys[is_kept], self._nbytes[is_kept]
        ends = np.cumsum(nbytes)
        if not len(keys):
            return keys, ends, np.zeros(0, np.uint8)
        device, total = self._old.device, int(ends[-1])
        with launching_on(device):
            own = to_device(np.flatnonzero(is_kept), device)
            begins = (self._sections[own] + to_device(8 * (ends - nbytes), device)[:, None, None]).flatten(0, 1)
            table = self._table.view(-1, CLASSES, self._table.shape[1])[own].flatten(0, 1)
            words = torch.zeros(total // 4 + 2, dtype=torch.int32, device=device)
            self._gpu.write_gaps(self._gaps, self._old, self._new, table, begins[:, :3].contiguous(), words)
            behind = begins[:, 2:].contiguous()  # the column before the magnitudes is not read
            self._magnitudes.write_magnitudes(self._old, self._new, table, self._codes, behind, words)
            (payload,) = to_host(words.view(torch.uint8)[:total])
        return keys, ends, payload


def old_weights(patch: DevicePatch, old: object) -> dict[int, torch.Tensor] | None:
    """The old weights of the tensors on the device by table index; None if they are not all there."""
    if not isinstance(old, WholeOldBits):
        return None
    indices = patch.spans[patch.spans[:, COUNT] > 0, TENSOR].tolist()
    found = {index: old.whole(index) for index in indices}
    there = patch.numbers.device
    return found if all(own.device == there and own.is_contiguous() for own in found.values()) else None


def _pieces(starts: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of segments, each with whole chunks. `starts` are the first segments of chunks, and the end of all."""
    cuts = np.unique(np.searchsorted(starts, np.arange(starts[0], starts[-1], _TOGETHER)))
    return list(pairwise([*starts[cuts[cuts < len(starts) - 1]].tolist(), int(starts[-1])]))
