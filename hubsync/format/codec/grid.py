"""Chunks of a tensor: a grid of rectangles over its `TensorSpec.matrix`.

Chunks are numbered row-major over the grid, elements row-major inside a chunk (their *position*).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubsync.kernels.compiled import compiled

MAX_ELEMENTS = 1 << 24  # of a chunk: bounds the memory of a decoder apart from its output
_USUAL = 1 << 20  # large enough that the row of a chunk is negligible, small enough to decode in cache
_SMALL = 1 << 17  # smaller chunks would cost more than they help (benchmarks/README.md)
_PARTS = (8, 4, 2)


@dataclass(frozen=True)
class Grid:
    """A grid of `chunk_rows` x `chunk_cols` rectangles over `rows` x `cols` elements; the last ones may be smaller."""

    rows: int
    cols: int
    chunk_rows: int
    chunk_cols: int

    @classmethod
    def contiguous(cls, rows: int, cols: int) -> Grid:
        """Chunks of about a million elements: full-width row blocks, or pieces of a row where rows are longer."""
        chunk_cols = max(1, min(cols, _USUAL))
        chunk_rows = max(1, min(rows, _USUAL // chunk_cols)) if chunk_cols == cols else 1
        return cls(rows, cols, chunk_rows, chunk_cols)

    @classmethod
    def tiles(cls, rows: int, cols: int, smallest: int = _SMALL) -> Grid:
        """Tiles that make up the row and column slices of 2, 4 or 8 tensor parallel ranks.

        Both dimensions are cut, because ranks may slice either: into 8 where that leaves chunks of at least `smallest`
        elements, else into 4, 2 or not at all.
        """
        parts = next((p for p in _PARTS if rows * cols >= smallest * p * p), 1)
        chunk_rows, chunk_cols = _part(rows, parts), _part(cols, parts)
        if chunk_rows > 1:
            chunk_rows = _smaller(chunk_rows, max(1, _USUAL // chunk_cols))
        return cls(rows, cols, chunk_rows, chunk_cols if chunk_rows > 1 else _smaller(chunk_cols, _USUAL))

    @property
    def across(self) -> int:
        """Chunks in one row of the grid."""
        return -(-self.cols // self.chunk_cols)

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.rows // self.chunk_rows) * self.across

    @property
    def ascends(self) -> bool:
        """Whether the elements, chunk by chunk, are in the order of the tensor."""
        return self.chunk_cols == self.cols or self.chunk_rows == 1

    def slices(self, number: int) -> tuple[slice, slice]:
        """Rows and columns of a chunk."""
        down, across = divmod(number, self.across)
        top, left = down * self.chunk_rows, across * self.chunk_cols
        return (
            slice(top, min(top + self.chunk_rows, self.rows)),
            slice(left, min(left + self.chunk_cols, self.cols)),
        )

    def elements(self, number: int) -> int:
        rows, cols = self.slices(number)
        return (rows.stop - rows.start) * (cols.stop - cols.start)

    def split(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Sort flat indices (int64, ascending) by chunk.

        Returns:
            (numbers, bounds, order, positions): int64[m] the chunks with any index, ascending. Chunk `numbers[i]` has
            the elements `bounds[i] .. bounds[i + 1]` of the other two: int64[n] numbers in `indices`, and int32[n]
            positions, ascending.
        """
        chunk_of, positions = np.empty(len(indices), np.int64), np.empty(len(indices), np.int32)
        _split(indices, self.rows, self.cols, self.chunk_rows, self.chunk_cols, chunk_of, positions)
        order = np.arange(len(indices)) if self.ascends else np.argsort(chunk_of, kind="stable")
        chunk_of, positions = chunk_of[order], positions[order]
        starts = np.flatnonzero(np.diff(chunk_of, prepend=-1))
        return chunk_of[starts], np.append(starts, len(indices)), order, positions

    def indices(self, number: int, positions: np.ndarray) -> np.ndarray:
        """Flat indices (int64) of positions (int32, ascending) in a chunk."""
        rows, cols = self.slices(number)
        if self.ascends:
            return positions.astype(np.int64) + (rows.start * self.cols + cols.start)
        return _indices(positions, rows.start, cols.start, cols.stop - cols.start, self.cols)


def contiguous_sizes(rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(chunk_rows, chunk_cols) of `Grid.contiguous` for many tensors, int64."""
    chunk_cols = np.clip(cols, 1, _USUAL)
    chunk_rows = np.where(chunk_cols == cols, np.clip(_USUAL // chunk_cols, 1, np.maximum(1, rows)), 1)
    return chunk_rows, chunk_cols


def tile_sizes(rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(chunk_rows, chunk_cols) of `Grid.tiles` for many tensors, int64. They have few different shapes."""
    shapes, of = np.unique(np.stack([rows, cols], axis=1), axis=0, return_inverse=True)
    grids = [Grid.tiles(*shape) for shape in shapes.tolist()]
    sizes = np.array([(grid.chunk_rows, grid.chunk_cols) for grid in grids], np.int64).reshape(-1, 2)
    return sizes[of.reshape(-1), 0], sizes[of.reshape(-1), 1]


def _part(size: int, parts: int) -> int:
    """Size of a part, for the largest number of equal parts that divides `parts`."""
    while size % parts:
        parts //= 2
    return size // parts


def _smaller(size: int, limit: int) -> int:
    """The largest divisor of `size` within the limit; the limit itself if no divisor is near it."""
    fewest = -(-size // limit)
    divisor = next((d for d in range(fewest, 4 * fewest + 1) if size % d == 0), None)
    return limit if divisor is None else size // divisor


@compiled
def _split(
    indices: np.ndarray,
    rows: int,
    cols: int,
    chunk_rows: int,
    chunk_cols: int,
    chunk_of: np.ndarray,
    positions: np.ndarray,
) -> None:
    across = -(-cols // chunk_cols)
    row, row_start = 0, 0
    for i in range(len(indices)):
        if indices[i] >= row_start + cols:
            row = indices[i] // cols
            row_start = row * cols
        col = indices[i] - row_start
        down, right = row // chunk_rows, col // chunk_cols
        left = right * chunk_cols
        width = min(chunk_cols, cols - left)
        chunk_of[i] = down * across + right
        positions[i] = (row - down * chunk_rows) * width + col - left


@compiled
def _indices(positions: np.ndarray, top: int, left: int, width: int, cols: int) -> np.ndarray:
    out = np.empty(len(positions), np.int64)
    row_start, flat_start = 0, top * cols + left
    for i in range(len(positions)):
        down = (positions[i] - row_start) // width
        row_start += down * width
        flat_start += down * cols
        out[i] = flat_start + positions[i] - row_start
    return out
