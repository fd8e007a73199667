"""What encoder and decoder share: the columns of a record, and how old weights are asked for."""

from __future__ import annotations

from typing import Protocol

from hubsync.kernels import Bits

DENSE, CODED = 0, 1  # modes

TENSOR, CHUNK_ROWS, CHUNK_COLS, CODE = range(4)  # columns of a record
RECORD_COLUMNS = 4


class OldBits(Protocol):
    """The weights that a delta applies to, as far as this process holds them."""

    def rectangle(self, index: int, rows: slice, cols: slice) -> Bits | None:
        """Patterns of a rectangle of tensor `index`, seen as its `TensorSpec.matrix`, [rows, cols].

        None if this process holds nothing of it. An error (a HubsyncError) if it holds some of it but not all.
        """
