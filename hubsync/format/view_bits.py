"""Old weights for encoding and decoding compact deltas: a whole view, and weights with a patch applied."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import torch

from hubsync.kernels import Bits
from hubsync.kernels.bits import advance, bits_of, integers_of

from .codec import OldBits
from .digest import Digest, digest_change, tensor_seed
from .patch import Patch, TensorDelta, TensorValues, changes_of
from .table import TensorTable

_INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


class ViewBits:
    """`OldBits` of a whole view: name -> contiguous tensor in its served dtype, on the CPU or a GPU.

    The mapping may be lazy (a checkpoint, an anchor): the last tensor used is kept.
    """

    def __init__(self, table: TensorTable, tensors: Mapping[str, torch.Tensor]):
        self._table = table
        self._tensors = tensors
        self._last: tuple[int, torch.Tensor] | None = None
        self._opening = threading.Lock()  # several chunks are decoded in parallel

    def rectangle(self, index: int, rows: slice, cols: slice) -> Bits:
        spec, tensor = self._table[index], self.whole(index)
        if tensor.device.type == "cpu":
            return bits_of(tensor).reshape(spec.matrix)[rows, cols]
        return tensor.detach().reshape(spec.matrix).view(_INTEGERS[spec.width])[rows, cols]

    def whole(self, index: int) -> torch.Tensor:
        """Tensor `index`. Not a copy."""
        with self._opening:
            if self._last is None or self._last[0] != index:
                self._last = index, self._tensors[self._table[index].name]
            return self._last[1]


class Advanced:
    """`OldBits` after a patch, to decode the next delta of a chain. Holds O(changes).

    The patch must have been decoded against `old`, so that both hold the same rectangles.
    """

    def __init__(self, table: TensorTable, old: OldBits, patch: Patch):
        self._table = table
        self._old = old
        self._patch = patch

    def rectangle(self, index: int, rows: slice, cols: slice) -> Bits | None:
        bits = self._old.rectangle(index, rows, cols)
        delta = self._patch.get(index)
        if bits is None or delta is None:
            return bits
        if isinstance(delta, TensorValues):
            return _like(delta.patterns.reshape(self._table[index].matrix)[rows, cols], bits)
        row, col, diffs = _inside(delta, self._table[index].matrix[1], rows, cols)
        if isinstance(bits, np.ndarray):
            bits = bits.copy()
            bits[row, col] = advance(bits[row, col], diffs)
            return bits
        bits = bits.clone()
        at = torch.from_numpy(row).to(bits.device), torch.from_numpy(col).to(bits.device)
        before = bits[at].cpu().numpy()
        after = advance(before.view(f"u{before.itemsize}"), diffs).view(before.dtype)
        bits[at] = torch.from_numpy(after).to(bits.device)
        return bits


def digest_after(table: TensorTable, tensors: Mapping[str, torch.Tensor], digest: Digest, patch: Patch) -> Digest:
    """Digest of a view after a patch. Costs O(changes); the tensors are not changed.

    Args:
        tensors: the view before the patch.
        digest: its digest.
    """
    for index, delta in patch.items():
        spec = table[index]
        digest += digest_change(
            tensor_seed(spec.name), *changes_of(delta, bits_of(tensors[spec.name].detach().to("cpu")))
        )
    return digest


def _like(patterns: np.ndarray, bits: Bits) -> Bits:
    """Patterns in the memory and the type of `bits`."""
    if isinstance(bits, np.ndarray):
        return patterns
    return integers_of(patterns).to(bits.device)


def _inside(delta: TensorDelta, width: int, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns of the changes inside a rectangle, counted from its corner, and their differences."""
    first, last = np.searchsorted(delta.indices, [rows.start * width, rows.stop * width])
    row, col = np.divmod(delta.indices[first:last], width)
    chosen = (col >= cols.start) & (col < cols.stop)
    return row[chosen] - rows.start, col[chosen] - cols.start, delta.diffs[first:last][chosen]
