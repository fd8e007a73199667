"""Shared by encoder and decoder: the columns of a record, and the interface to old weights."""

from __future__ import annotations

from typing import Protocol

from hubsync.kernels import Bits

DENSE, CODED, ABSOLUTE = 0, 1, 2  # modes

TENSOR, CHUNK_ROWS, CHUNK_COLS, CODE = range(4)  # columns of a record
RECORD_COLUMNS = 4


class OldBits(Protocol):
    """The weights that a delta applies to. A process may hold a part of them."""

    def rectangle(self, index: int, rows: slice, cols: slice) -> Bits | None:
        """Patterns [rows, cols] of a rectangle of tensor `index`, seen as its `TensorSpec.matrix`.

        None if this process holds nothing of it. Raises a HubsyncError if it holds a part of it.
        """
