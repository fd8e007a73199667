# mypy: disable-error-code="no-untyped-def"
"""Kernels for weights on a GPU, in Triton. Imported only for a tensor on a GPU.

Weights are flat contiguous integer tensors (uint8, int16, int32). They stay on their device; returned arrays have the
size of the changes. Every kernel also runs in Triton's interpreter (`TRITON_INTERPRET=1`, on tensors in main memory).
Tests without a GPU use it.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from .classes import CLASSES, ClassMap

_COMPARED = 4096  # elements that one program compares
_COUNTED = 1024  # elements whose classes are counted together

Blocks = torch.Tensor
"""int64[blocks, CLASSES]: elements of each class in all earlier blocks."""


def changes(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Elements that differ: (int64 indices, ascending; old patterns; new patterns), on the device."""
    programs = triton.cdiv(old.numel(), _COMPARED)
    counts = torch.empty(programs, dtype=torch.int64, device=old.device)
    if programs:
        _count_unequal[(programs,)](old, new, counts, old.numel(), _COMPARED)
    ends = counts.cumsum(0)
    found = int(ends[-1]) if programs else 0
    indices = torch.empty(found, dtype=torch.int64, device=old.device)
    before, after = old.new_empty(found), old.new_empty(found)
    if found:
        _list_unequal[(programs,)](old, new, ends - counts, counts, indices, before, after, old.numel(), _COMPARED)
    return indices, before, after


def digest_sums(
    flat: torch.Tensor, places: torch.Tensor, keys: tuple[int, ...], start: int, indices: torch.Tensor | None
) -> tuple[int, int]:
    """The two sums of `hubsync.format.digest` modulo 2^64. All 64-bit numbers are passed and returned as signed.

    Args:
        places: int64[2, n], the place factors.
        keys: the key of block 0, the stride between blocks, and three multipliers.
        start: flat index of the first element, unless `indices` (int64) gives one for each element.
    """
    block = places.shape[1]
    before = 0 if indices is not None else start % block  # programs take whole blocks of the tensor
    programs = triton.cdiv(before + flat.numel(), block) if flat.numel() else 0
    sums = torch.zeros((max(1, programs), 2), dtype=torch.int64, device=flat.device)
    if programs:
        mask = (1 << (8 * flat.element_size())) - 1
        at = flat if indices is None else indices
        _digest[(programs,)](
            flat, at, places, sums, flat.numel(), before, start // block, *keys, mask, indices is not None, block
        )
    a, b = sums.sum(0).tolist()
    return a, b


def scatter(flat: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` to the elements at `indices` (int64, each once)."""
    if indices.numel():
        _scatter[(triton.cdiv(indices.numel(), _COUNTED),)](flat, indices, values, indices.numel(), _COUNTED)


def count(bits: torch.Tensor, classes: ClassMap) -> tuple[np.ndarray, Blocks]:
    """Number of elements of each class: int64[CLASSES], and by blocks for `place`."""
    programs = triton.cdiv(bits.numel(), _COUNTED)
    counts = torch.empty((programs, CLASSES), dtype=torch.int64, device=bits.device)
    _count_classes[(programs,)](bits, counts, bits.numel(), classes.low, classes.shift, classes.mask, CLASSES, _COUNTED)
    ends = counts.cumsum(0)
    return ends[-1].cpu().numpy(), ends - counts


def rank(bits: torch.Tensor, positions: np.ndarray, classes: ClassMap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes and ranks of the elements at `positions` (int32, ascending). A rank counts elements of the same class.

    Returns:
        (sizes, class_of, ranks): int64[CLASSES] elements of each class, uint8[n] and int32[n].
    """
    sizes, before = count(bits, classes)
    at = torch.from_numpy(positions).to(bits.device)
    class_of = torch.empty(len(at), dtype=torch.uint8, device=bits.device)
    ranks = torch.empty(len(at), dtype=torch.int32, device=bits.device)
    if len(at):
        _rank[(len(at),)](
            bits, before, at, class_of, ranks, classes.low, classes.shift, classes.mask, CLASSES, _COUNTED
        )
    return sizes, class_of.cpu().numpy(), ranks.cpu().numpy()


def place(
    bits: torch.Tensor, before: Blocks, ranks: np.ndarray, diffs: np.ndarray, bounds: np.ndarray, classes: ClassMap
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `rank`: positions of elements given by class and rank, ascending, and their differences in that order.

    Args:
        ranks: int32[n], those of class c are `bounds[c] .. bounds[c + 1]`, ascending and below the size of the class.
        diffs: signed[n] in the same order.
    """
    class_of = torch.from_numpy(np.repeat(np.arange(CLASSES, dtype=np.int64), np.diff(bounds))).to(bits.device)
    sought = torch.from_numpy(ranks.astype(np.int64)).to(bits.device)
    block = torch.empty_like(sought)
    for c in range(CLASSES):
        own = slice(int(bounds[c]), int(bounds[c + 1]))
        block[own] = torch.searchsorted(before[:, c].contiguous(), sought[own], right=True) - 1
    positions = torch.empty_like(sought)
    if len(sought):
        _place[(len(sought),)](
            bits, before, block, class_of, sought, positions, bits.numel(),
            classes.low, classes.shift, classes.mask, CLASSES, _COUNTED,
        )  # fmt: skip
    positions, order = positions.sort()
    return positions.cpu().numpy().astype(np.int32), diffs[order.cpu().numpy()]


# Arguments of the kernels are pointers and numbers of the compiled program, which have no Python types.


@triton.jit
def _count_unequal(old, new, counts, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    unequal = tl.load(old + at, mask=inside, other=0) != tl.load(new + at, mask=inside, other=0)
    tl.store(counts + tl.program_id(0), tl.sum(unequal.to(tl.int64), axis=0))


@triton.jit
def _list_unequal(old, new, starts, counts, indices, before, after, numel, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    if tl.load(counts + program) != 0:
        at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        a = tl.load(old + at, mask=inside, other=0)
        b = tl.load(new + at, mask=inside, other=0)
        unequal = a != b
        slot = tl.load(starts + program) + tl.cumsum(unequal.to(tl.int64), axis=0) - 1
        tl.store(indices + slot, at, mask=unequal)
        tl.store(before + slot, a, mask=unequal)
        tl.store(after + slot, b, mask=unequal)


@triton.jit
def _digest(
    flat,
    indices,
    places,
    sums,
    numel,
    before,
    first,
    key,
    stride,
    m1,
    m2,
    m3,
    mask,
    SCATTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    i = program * BLOCK + lane - before
    inside = (i >= 0) & (i < numel)
    y = (tl.load(flat + i, mask=inside, other=0).to(tl.int64) & mask) + 1
    spread = y * (2 * y + 1)
    if SCATTERED:
        at = tl.load(indices + i, mask=inside, other=0)
        place = at % BLOCK
        number = at // BLOCK
    else:
        place = lane
        number = first + program
    z = (number * stride + key).to(tl.uint64, bitcast=True)
    z = ((z ^ (z >> 30)).to(tl.int64, bitcast=True) * m1).to(tl.uint64, bitcast=True)
    z = ((z ^ (z >> 27)).to(tl.int64, bitcast=True) * m2).to(tl.uint64, bitcast=True)
    a = (z ^ (z >> 31)).to(tl.int64, bitcast=True)
    z = (a * m3).to(tl.uint64, bitcast=True)
    b = (z ^ (z >> 33)).to(tl.int64, bitcast=True)
    in_a = spread * tl.load(places + place) * (a | 1)
    in_b = spread * tl.load(places + BLOCK + place) * (b | 1)
    tl.store(sums + 2 * tl.program_id(0), tl.sum(tl.where(inside, in_a, 0), axis=0))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(tl.where(inside, in_b, 0), axis=0))


@triton.jit
def _scatter(flat, indices, values, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = tl.load(indices + i, mask=inside, other=0)
    tl.store(flat + at, tl.load(values + i, mask=inside, other=0), mask=inside)


@triton.jit
def _class_of(bits, low, shift, mask, CLASSES: tl.constexpr):
    exponent = (bits.to(tl.int32) >> shift) & mask  # the mask also cuts off copies of the sign
    return tl.minimum(tl.maximum(exponent - low, 0), CLASSES - 1)


@triton.jit
def _count_classes(bits, counts, numel, low, shift, mask, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    own = _class_of(tl.load(bits + at, mask=inside, other=0), low, shift, mask, CLASSES)
    own = tl.where(inside, own, CLASSES)
    for c in range(CLASSES):
        tl.store(counts + tl.program_id(0) * CLASSES + c, tl.sum((own == c).to(tl.int64), axis=0))


@triton.jit
def _rank(bits, before, positions, class_of, ranks, low, shift, mask, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    position = tl.load(positions + i)
    own = _class_of(tl.load(bits + position), low, shift, mask, CLASSES)
    block = position // BLOCK
    at = block * BLOCK + tl.arange(0, BLOCK)
    others = _class_of(tl.load(bits + at, mask=at < position, other=0), low, shift, mask, CLASSES)
    inside = tl.sum(((others == own) & (at < position)).to(tl.int64), axis=0)
    tl.store(class_of + i, own.to(tl.uint8))
    tl.store(ranks + i, (tl.load(before + block * CLASSES + own) + inside).to(tl.int32))


@triton.jit
def _place(
    bits,
    before,
    blocks,
    class_of,
    ranks,
    positions,
    numel,
    low,
    shift,
    mask,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    block = tl.load(blocks + i)
    own = tl.load(class_of + i)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    found = (_class_of(tl.load(bits + at, mask=inside, other=0), low, shift, mask, CLASSES) == own) & inside
    ahead = tl.load(ranks + i) - tl.load(before + block * CLASSES + own)
    here = found & (tl.cumsum(found.to(tl.int64), axis=0) == ahead + 1)
    tl.store(positions + i, tl.sum(tl.where(here, at, 0), axis=0))
