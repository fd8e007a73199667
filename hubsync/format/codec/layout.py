"""Shared by parts of the codec: the columns of a record, keys of chunks, and the interface to old weights."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

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


@runtime_checkable
class WholeOldBits(OldBits, Protocol):
    """Weights of which a process holds all, in tensors."""

    def whole(self, index: int) -> torch.Tensor:
        """Tensor `index`, in its own dtype. Not a copy."""


_NUMBER_BITS = 41  # a tensor has at most 2^40 elements


def key_of(tensor: int, number: int) -> int:
    """Key of a chunk: in the order of tensors, and of the chunks (by number in their grid) of a tensor."""
    return tensor << _NUMBER_BITS | number


def keys_of(tensors: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """`key_of` of many chunks, int64."""
    return tensors << _NUMBER_BITS | numbers


def parts_of(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tensors and numbers of chunks."""
    return keys >> _NUMBER_BITS, keys & ((1 << _NUMBER_BITS) - 1)


class Measured(NamedTuple):
    """Chunks whose bits are known.

    Attributes:
        keys: int64[n], ascending.
        columns: int64[n, classes + FIELDS], the columns of their rows.
    """

    keys: np.ndarray
    columns: np.ndarray
