# mypy: disable-error-code="no-untyped-def"
"""Numbers for the elements of many tensors, so that one launch reaches all of them.

Tensors are reached through a table of addresses in device memory. They are cut into tiles of `tile` elements, the last
one of a tensor smaller. Tiles are counted over all tensors, and element i of tile t has the number `t * tile + i`. So
numbers ascend with the element in each tensor, and a bit for each number is a word-aligned run of bits for each tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl

TILE = 4096

RAW, TO_BF16, TO_F16 = 0, 1, 2  # how the published pattern of a live element is made: its bits, or from float32

_BY_HAND = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter cuts bits off instead of rounding


def kind_of(live: torch.dtype, published: torch.dtype) -> int | None:
    """How kernels read the published patterns, 16 bits each, of a live tensor; None if they cannot."""
    if live == published and live.itemsize == 2:
        return RAW
    if live == torch.float32:
        return {torch.bfloat16: TO_BF16, torch.float16: TO_F16}.get(published)
    return None


class Numbering:
    """The numbers of the elements of some tensors.

    Args:
        tensors: flat contiguous live tensors on one device.
        kinds: `kind_of` each.
        tile: elements of a tile; a power of 2, and a multiple of 256.

    Attributes:
        first: int64[tensors + 1], number of the first element of each, and the end of all numbers.
        tiles: number of tiles.
        address: int64[tensors, 4] on the device: address, elements, kind and first tile.
        owner: int32[tiles] on the device: tensor of each tile.
        addresses: of the tensors.
        is_aligned: whether all of them are multiples of 16.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], kinds: Sequence[int], tile: int = TILE):
        self.tile = tile
        self.device = tensors[0].device
        self._sizes = np.array([tensor.numel() for tensor in tensors], np.int64)
        self._kinds = np.array(kinds, np.int64)
        counts = -(-self._sizes // tile)
        first = np.concatenate([[0], np.cumsum(counts)])
        self.first = first * tile
        self.tiles = int(first[-1])
        self._first_tiles = first[:-1]
        self.owner = torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int32), counts)).to(self.device)
        self.addresses: list[int] = []
        self.address = torch.empty((len(counts), 4), dtype=torch.int64, device=self.device)
        self.is_aligned = False
        self.refresh(tensors)

    def refresh(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """Take the addresses of the same tensors again: training may replace their memory. None: it is not read."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if addresses == self.addresses:
            return
        columns = [np.array(addresses, np.int64), self._sizes, self._kinds, self._first_tiles]
        table = torch.from_numpy(np.stack(columns, axis=1))
        if self.device.type == "cuda":
            table = table.pin_memory()  # else the copy waits for the device
        self.addresses = []  # an interrupt from here on: unknown, so that the next call writes all of them again
        self.is_aligned = not any(address % 16 for address in addresses)
        self.address.copy_(table, non_blocking=True)
        self.addresses = addresses

    def size_of(self, tensor: int) -> int:
        """Elements of a tensor."""
        return int(self._sizes[tensor])

    def addresses_of(self, tensors: np.ndarray, elements: np.ndarray) -> np.ndarray:
        """Addresses of elements of tensors (int64 both), for questions of alignment."""
        return np.array(self.addresses, np.int64)[tensors] + elements * np.where(self._kinds[tensors] == RAW, 2, 4)

    def ranges(self, tensors: Sequence[int]) -> list[tuple[int, int]]:
        """The tiles of these tensors, as few ranges (first, end) as possible."""
        bounds = sorted((int(self.first[t]) // self.tile, int(self.first[t + 1]) // self.tile) for t in tensors)
        bounds = [(first, end) for first, end in bounds if first < end]
        cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(bounds)) if a[1] != b[0]), len(bounds)]
        return [(bounds[a][0], bounds[b - 1][1]) for a, b in pairwise(cuts) if a < b]


@triton.jit
def tile_of(address, owner, tile, TILE: tl.constexpr):
    """(address of the tensor, first element of the tile, its elements, kind)."""
    at = address + tl.load(owner + tile).to(tl.int64) * 4
    start = (tile - tl.load(at + 3)) * TILE
    return tl.load(at), start, tl.minimum(tl.load(at + 1) - start, TILE), tl.load(at + 2)


@triton.jit
def rounded(x, kind):
    """Patterns (int16) of float32 numbers, rounded as torch rounds them on a GPU."""
    if _BY_HAND:
        whole = x.to(tl.int32, bitcast=True)
        as_bf16 = ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).to(tl.int16)
        as_bf16 = tl.where((whole & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, as_bf16)
    else:
        as_bf16 = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    as_f16 = x.to(tl.float16).to(tl.int16, bitcast=True)
    return tl.where(kind == 1, as_bf16, as_f16)


@triton.jit
def patterns(base, kind, i, size, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Published patterns (int16) of the elements `i` = 0, 1, ... from address `base` on; 0 from `size` on."""
    if kind == 0:
        raw = base.to(tl.pointer_type(tl.int16)) + i
        if size >= BLOCK:
            if ALIGNED:
                raw = tl.multiple_of(raw, 16)
            bits = tl.load(raw)
        else:
            bits = tl.load(raw, mask=i < size, other=0)
    else:
        single = base.to(tl.pointer_type(tl.float32)) + i
        if size >= BLOCK:
            if ALIGNED:
                single = tl.multiple_of(single, 16)
            bits = rounded(tl.load(single), kind)
        else:
            bits = rounded(tl.load(single, mask=i < size, other=0.0), kind)
    return bits


@triton.jit
def address_in(base, kind, element):
    """Address of an element of a tensor."""
    return base + element * tl.where(kind == 0, 2, 4)
