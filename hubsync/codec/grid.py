"""How a tensor is cut into chunks: a grid of rectangles over the tensor seen as 2-D (`TensorSpec.matrix`).

Chunks are numbered row-major over the grid, elements row-major inside a chunk. The *place* of an element is its number
in that order, chunk after chunk. In a contiguous grid (full-width row blocks, or pieces of single rows) places are the
flat indices of the tensor; any other grid only permutes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit

CHUNK_ELEMENTS = 1 << 20  # large enough that a chunk's header costs nothing, small enough to decode in cache


@dataclass(frozen=True)
class Grid:
    """A grid of `chunk_rows` x `chunk_cols` rectangles over `rows` x `cols` elements; the last ones may be smaller."""

    rows: int
    cols: int
    chunk_rows: int
    chunk_cols: int

    @classmethod
    def default(cls, rows: int, cols: int) -> Grid:
        """Chunks of about a million elements: full-width row blocks, or pieces of a row where rows are longer."""
        chunk_cols = max(1, min(cols, CHUNK_ELEMENTS))
        chunk_rows = max(1, min(rows, CHUNK_ELEMENTS // chunk_cols)) if chunk_cols == cols else 1
        return cls(rows, cols, chunk_rows, chunk_cols)

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.rows // self.chunk_rows) * -(-self.cols // self.chunk_cols)

    @property
    def contiguous(self) -> bool:
        return self.chunk_cols == self.cols or self.chunk_rows == 1

    @cached_property
    def starts(self) -> np.ndarray:
        """int64[count + 1]: place of each chunk's first element, then the number of elements."""
        return _starts(self.rows, self.cols, self.chunk_rows, self.chunk_cols, self.count)

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Flat indices (int64) -> places, in the same order."""
        if self.contiguous:
            return indices
        row, col = np.divmod(indices, self.cols)
        grid_row, grid_col = row // self.chunk_rows, col // self.chunk_cols
        top, left = grid_row * self.chunk_rows, grid_col * self.chunk_cols
        height = np.minimum(self.chunk_rows, self.rows - top)
        width = np.minimum(self.chunk_cols, self.cols - left)
        return top * self.cols + height * left + (row - top) * width + (col - left)

    def indices(self, places: np.ndarray) -> np.ndarray:
        """Places (int64) -> flat indices, in the same order; inverse of `places`."""
        if self.contiguous:
            return places
        top = places // (self.chunk_rows * self.cols) * self.chunk_rows
        height = np.minimum(self.chunk_rows, self.rows - top)
        inside = places - top * self.cols
        left = inside // (height * self.chunk_cols) * self.chunk_cols
        width = np.minimum(self.chunk_cols, self.cols - left)
        row, col = np.divmod(inside - height * left, width)
        return (top + row) * self.cols + left + col


@njit(nogil=True, cache=True)
def _starts(rows: int, cols: int, chunk_rows: int, chunk_cols: int, count: int) -> np.ndarray:
    starts = np.zeros(count + 1, np.int64)
    chunk = 0
    for top in range(0, rows, chunk_rows):
        for left in range(0, cols, chunk_cols):
            elements = min(chunk_rows, rows - top) * min(chunk_cols, cols - left)
            starts[chunk + 1] = starts[chunk] + elements
            chunk += 1
    return starts
