"""Live bits: this rank's old patterns in rectangles of checkpoint tensors, for decoding compact deltas."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hubsync.errors import ReplicaRefused
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels import Bits
from hubsync.kernels.bits import UNSIGNED

from .live import INTEGERS, LiveStorage
from .regions import Block, Region

_PIECE = 1 << 22  # elements copied at a time where they are in no strided order


class LiveBits:
    """`hubsync.format.codec.OldBits` of live memory.

    A tensor that lies there in one run of elements is not copied. Any other is put together in checkpoint order when it
    is requested, on its own device, one tensor at a time.

    Args:
        table: the run's tensor table.
        storages: live memory, by `Region.storage`.
        regions: this rank's part of each tensor, by table index.
        masters: tensors that are kept whole, by table index.
    """

    def __init__(
        self,
        table: TensorTable,
        storages: Sequence[LiveStorage],
        regions: Sequence[Sequence[Region]],
        masters: Mapping[int, torch.Tensor],
    ):
        self._table = table
        self._storages = storages
        self._regions = regions
        self._masters = masters
        self._last: tuple[int, torch.Tensor, torch.Tensor | None] | None = None
        self._gathering = threading.Lock()  # several chunks are decoded in parallel

    def rectangle(self, index: int, rows: slice, cols: slice) -> Bits | None:
        spec = self._table[index]
        if not self._regions[index] and index not in self._masters:
            return None
        with self._gathering:
            if self._last is None or self._last[0] != index:
                self._last = None  # before the next one takes its memory
                self._last = (index, *self._tensor(index))
            _, flat, held = self._last
        if held is not None:
            inside = held.view(spec.matrix)[rows, cols]
            if not inside.any():
                return None
            if not inside.all():
                raise ReplicaRefused(
                    f"{spec.name}: this worker holds only a part of a chunk of the delta; publish with "
                    "encoding='fast', or with a tensor parallel size that divides the tensor as the chunks do"
                )
        bits = flat.view(spec.matrix)[rows, cols]
        return bits.numpy().view(UNSIGNED[spec.width]) if bits.device.type == "cpu" else bits

    def _tensor(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(flat patterns, mask of the held elements; None if all are held)."""
        spec = self._table[index]
        if index in self._masters:
            master = self._masters[index]
            return master.reshape(-1).view(INTEGERS[master.element_size()]), None
        regions = self._regions[index]
        first = self._storages[regions[0].storage]
        if first.relayout is None and regions[0].contiguous and regions[0].numel == spec.numel:
            start, end = regions[0].target_extent
            return first.bits[start:end], None
        flat = torch.zeros(spec.numel, dtype=first.bits.dtype, device=first.bits.device)
        held = None if _cover(regions, spec) else torch.zeros(spec.numel, dtype=torch.bool)
        for region in regions:
            for piece in region.pieces(_PIECE):
                _put(flat, piece, self._storages[piece.storage].gather(piece))
                if held is not None:
                    _put(held, piece, torch.ones(piece.numel, dtype=torch.bool))
        return flat, held


def _cover(regions: Sequence[Region], spec: TensorSpec) -> bool:
    """Do the regions hold all elements? Some may be copies of others."""
    return sum(region.numel for region in {region.source_key: region for region in regions}.values()) == spec.numel


def _put(flat: torch.Tensor, piece: Region, values: torch.Tensor) -> None:
    """Write the piece's elements, in block order, to their places in checkpoint order."""
    if isinstance(piece, Block):
        flat.as_strided(piece.sizes, piece.source_strides, piece.source).copy_(values.view(piece.sizes))
    else:
        flat[torch.from_numpy(piece.indices(np.arange(piece.numel))).to(flat.device)] = values
