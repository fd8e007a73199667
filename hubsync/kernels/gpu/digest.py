# mypy: disable-error-code="no-untyped-def"
"""Digests (`hubsync.format.digest`) of all tensors in one launch: of live elements, and of changes.

All 64-bit numbers are passed as signed ones; arithmetic is modulo 2^64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from .listing import Listed
from .numbering import Numbering, address_in, patterns, rounded

_BLOCKS = 64  # blocks of one program
_PIECE = 1 << 20  # elements whose changes one program adds up
_CHANGES = 512  # of them at a time


@dataclass(frozen=True)
class Constants:
    """What `hubsync.format.digest` is made of, on the device.

    Attributes:
        places: int64[2, block], the place factors; `block` elements share a block factor.
        stride: between the keys of two blocks.
        multipliers: of the rounds that make block factors.
    """

    places: torch.Tensor
    stride: int
    multipliers: tuple[int, int, int]

    @property
    def block(self) -> int:
        return self.places.shape[1]


class Digests:
    """Digests of spans: each a run of elements of one live tensor and of one published tensor.

    Args:
        numbering: the live tensors.
        spans: int64[n, 4]: live tensor, first element in it, elements, flat index of the first one as published.
        keys: int64[n], the key of block 0 of each published tensor.
        constants: of the digest.
        numbers: int64[n], number of the first element of each span in lists of changes; default is that of `numbering`.

    Attributes:
        owners: int64[pieces], ascending: the span of each piece that one program reads.
        piece: elements of a piece at most.
    """

    def __init__(
        self,
        numbering: Numbering,
        spans: np.ndarray,
        keys: np.ndarray,
        constants: Constants,
        numbers: np.ndarray | None = None,
    ):
        self._numbering = numbering
        self._constants = constants
        self._spans = len(spans)
        live, start, size, flat = spans.T
        self._live, self._begins = live, start - flat  # where element 0 of the published tensor would be
        device = numbering.device

        def rows(run: int) -> tuple[np.ndarray, np.ndarray]:
            """Pieces of spans that end where a multiple of `run` does: span, and elements before it in its span."""
            skip = flat % run
            counts = np.where(size > 0, -(-(skip + size) // run), 0)
            owner = np.repeat(np.arange(len(spans)), counts)
            number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            return owner, np.maximum(number * run - skip[owner], 0)

        self.piece = _BLOCKS * constants.block
        owner, done = rows(self.piece)
        self.owners = owner
        ends = np.append(np.where(owner[1:] == owner[:-1], done[1:], size[owner[:-1]]), size[owner[-1:]])
        columns = [live[owner], start[owner] + done, ends - done, flat[owner] + done, keys[owner]]
        self._rows = torch.from_numpy(np.stack(columns, axis=1)).to(device)
        self._owner = torch.from_numpy(owner).to(device)
        owner, done = rows(_PIECE)
        numbers = numbering.first[live] + start if numbers is None else numbers
        number = numbers[owner] + done
        ends = np.append(np.where(owner[1:] == owner[:-1], done[1:], size[owner[:-1]]), size[owner[-1:]])
        ends = number + ends - done
        self._pieces = torch.from_numpy(np.stack([number, flat[owner] + done, keys[owner]], axis=1)).to(device)
        self._piece_owner = torch.from_numpy(owner).to(device)
        self._first_numbers = torch.from_numpy(number).to(device)
        self._end_numbers = torch.from_numpy(ends).to(device)

    def live(self) -> torch.Tensor:
        """int64[spans, 2] on the device: both lanes of the digest of the live elements of each span."""
        return self._added(self._owner, self.sums(0, len(self.owners)))

    def sums(self, first: int, end: int) -> torch.Tensor:
        """int64[end - first, 2] on the device: both lanes of the digest of some pieces of spans (`owners`)."""
        numbers, constants = self._numbering, self._constants
        sums = torch.empty((end - first, 2), dtype=torch.int64, device=numbers.device)
        if len(sums):
            _digest[(len(sums),)](
                numbers.address, self._rows, constants.places, sums, first, constants.stride, *constants.multipliers,
                self.is_aligned, constants.block,
            )  # fmt: skip
        return sums

    @property
    def is_aligned(self) -> bool:
        """Do all whole blocks of the published tensors begin at multiples of 16 bytes in the live ones?"""
        return not (self._numbering.addresses_of(self._live, self._begins) % 16).any()

    def changes(self, listed: Listed) -> tuple[torch.Tensor, torch.Tensor]:
        """By span, on the device: what changes add to both lanes, int64[spans, 2], and their number, int64[spans]."""
        constants = self._constants
        begins = torch.searchsorted(listed.numbers, self._first_numbers)
        ends = torch.searchsorted(listed.numbers, self._end_numbers)
        sums = torch.empty((len(self._pieces), 2), dtype=torch.int64, device=listed.numbers.device)
        if len(self._pieces):
            _digest_changes[(len(self._pieces),)](
                listed.numbers, listed.old, listed.new, begins, ends, self._pieces, constants.places, sums,
                constants.stride, *constants.multipliers, constants.block, _CHANGES,
            )  # fmt: skip
        counts = torch.zeros(self._spans, dtype=torch.int64, device=sums.device)
        return self._added(self._piece_owner, sums), counts.index_add_(0, self._piece_owner, ends - begins)

    def _added(self, owner: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        out = torch.zeros((self._spans, 2), dtype=torch.int64, device=sums.device)
        return out.index_add_(0, owner, sums)


@triton.jit
def _shifted(z, COUNT: tl.constexpr):
    return (z >> COUNT) & ((1 << (64 - COUNT)) - 1)


@triton.jit
def _factors(number, key, stride, m1, m2, m3):
    """The factors of a block in both lanes: splitmix64 and one round more."""
    z = number * stride + key
    z = (z ^ _shifted(z, 30)) * m1
    z = (z ^ _shifted(z, 27)) * m2
    a = z ^ _shifted(z, 31)
    z = a * m3
    return a | 1, (z ^ _shifted(z, 33)) | 1


@triton.jit
def _spread(bits):
    y = (bits.to(tl.int32) & 0xFFFF) + 1
    return y.to(tl.int64) * (2 * y + 1).to(tl.int64)


@triton.jit(do_not_specialize=["first"])
def _digest(address, rows, places, sums, first, stride, m1, m2, m3, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One row: up to `_BLOCKS` blocks of one tensor. The same place of several blocks is added up first."""
    program = tl.program_id(0)
    row = rows + (first + program).to(tl.int64) * 5
    live = address + tl.load(row) * 4
    kind = tl.load(live + 2)
    base = address_in(tl.load(live), kind, tl.load(row + 1))
    size = tl.load(row + 2)
    flat = tl.load(row + 3)
    key = tl.load(row + 4)
    place = tl.arange(0, BLOCK)
    in_a = tl.zeros([BLOCK], tl.int64)
    in_b = tl.zeros([BLOCK], tl.int64)
    number = flat // BLOCK
    skip = flat % BLOCK  # not 0: the row begins inside a block
    done = size * 0
    if skip > 0:
        inside = (place >= skip) & (place - skip < size)
        bits = _masked(base, kind, place - skip, inside)
        a, b = _factors(number, key, stride, m1, m2, m3)
        spread = tl.where(inside, _spread(bits), 0)
        in_a += spread * a
        in_b += spread * b
        done = tl.minimum(size, BLOCK - skip)
        number += 1
    for _ in range(0, (size - done) // BLOCK):
        here = address_in(base, kind, done)
        bits = patterns(here, kind, place, BLOCK, ALIGNED, BLOCK)
        a, b = _factors(number, key, stride, m1, m2, m3)
        spread = _spread(bits)
        in_a += spread * a
        in_b += spread * b
        done += BLOCK
        number += 1
    if done < size:
        inside = place < size - done
        bits = _masked(address_in(base, kind, done), kind, place, inside)
        a, b = _factors(number, key, stride, m1, m2, m3)
        spread = tl.where(inside, _spread(bits), 0)
        in_a += spread * a
        in_b += spread * b
    in_a *= tl.load(places + place)
    in_b *= tl.load(places + BLOCK + place)
    tl.store(sums + 2 * program.to(tl.int64), tl.sum(in_a, axis=0))
    tl.store(sums + 2 * program.to(tl.int64) + 1, tl.sum(in_b, axis=0))


@triton.jit
def _masked(base, kind, i, inside):
    """Patterns of a part of a block."""
    if kind == 0:
        bits = tl.load(base.to(tl.pointer_type(tl.int16)) + i, mask=inside, other=0)
    else:
        bits = rounded(tl.load(base.to(tl.pointer_type(tl.float32)) + i, mask=inside, other=0.0), kind)
    return bits


@triton.jit
def _digest_changes(
    numbers,
    olds,
    news,
    begins,
    ends,
    pieces,
    places,
    sums,
    stride,
    m1,
    m2,
    m3,
    BLOCK: tl.constexpr,
    CHANGES: tl.constexpr,
):
    """One piece of a span: what its changes add to the digest."""
    program = tl.program_id(0)
    piece = pieces + program.to(tl.int64) * 3
    first = tl.load(piece)
    flat = tl.load(piece + 1)
    key = tl.load(piece + 2)
    begin = tl.load(begins + program)
    count = tl.load(ends + program) - begin
    in_a = tl.zeros([CHANGES], tl.int64)
    in_b = tl.zeros([CHANGES], tl.int64)
    for done in range(0, count, CHANGES):
        i = done + tl.arange(0, CHANGES)
        inside = i < count
        at = flat + tl.load(numbers + begin + i, mask=inside, other=0) - first
        old = tl.load(olds + begin + i, mask=inside, other=0)
        new = tl.load(news + begin + i, mask=inside, other=0)
        spread = _spread(new) - _spread(old)  # 0 outside
        place = tl.where(inside, at % BLOCK, 0)
        a, b = _factors(at // BLOCK, key, stride, m1, m2, m3)
        in_a += spread * tl.load(places + place) * a
        in_b += spread * tl.load(places + BLOCK + place) * b
    tl.store(sums + 2 * program.to(tl.int64), tl.sum(in_a, axis=0))
    tl.store(sums + 2 * program.to(tl.int64) + 1, tl.sum(in_b, axis=0))
