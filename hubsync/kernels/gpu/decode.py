# mypy: disable-error-code="no-untyped-def"
"""Kernels of the decoder of `fast` parts: payload -> numbers and differences. docs/FORMAT.md.

A program takes one chunk, so every launch is over all chunks of all tensors. Every number that a chunk states is
checked against its bound before it is used to address anything; `wrong` is set if one breaks it, or if the bits of a
chunk are not used exactly. What is wrong is not found out here: the decoder of the CPU reads such a part again.
`format.codec.device_decode` is the host side, and has checked the chunk rows. Bits are counted from the lowest one of
the first byte; words have 32 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .encode import CODES, log2, running_sums

# Columns of `chunks`, int64[chunks, COLUMNS]: first bit and the bit behind the last one, where the list of the chunk
# begins, its changes (at least one, at most half of its elements), the number of its first element, its elements, the
# Rice parameter of its gaps, and its row of `codes`.
BEGIN, END, START, COUNT, FIRST, SIZE, GAP, BOOK = range(8)
COLUMNS = 8

_WORDS = 32  # of quotients that `_ones` looks at together
_PLACED = 512  # changes that `_place` places together
_LANES = 32  # changes that `_magnitudes` passes on together
_LARGEST = tl.constexpr(32_768)  # magnitude of a difference of 16 bits
_DIGITS = tl.constexpr(33)  # behind a unary exponent


def decode(
    words: torch.Tensor, chunks: torch.Tensor, codes: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers (int64, ascending in each chunk), differences (int16), and int32[1], not 0 if a chunk is malformed.

    Args:
        words: int32, with three spare ones at the end.
        codes: int32[books, CODES]: usual magnitude, tail, number of planes, and the planes.
        count: changes of all chunks.
    """
    device = words.device
    numbers = torch.empty(count, dtype=torch.int64, device=device)
    diffs = torch.empty(count, dtype=torch.int16, device=device)
    wrong = torch.zeros(1, dtype=torch.int32, device=device)
    if not count:
        return numbers, diffs, wrong
    ones = torch.empty(count, dtype=torch.int32, device=device)
    ends = torch.empty(len(chunks), dtype=torch.int64, device=device)
    lists = torch.empty((2, count), dtype=torch.int32, device=device)
    grid = (len(chunks),)
    _ones[grid](words, chunks, codes, ones, diffs, ends, wrong, COLUMNS, CODES, _WORDS, num_warps=4)
    _magnitudes[grid](words, chunks, codes, ends, lists, diffs, wrong, count, COLUMNS, CODES, _LANES, num_warps=1)
    _place[grid](words, chunks, ones, numbers, wrong, COLUMNS, _PLACED, num_warps=4)
    return numbers, diffs, wrong


def prepare(device: torch.device) -> None:
    """Compile the kernels. The chunk is the example of docs/FORMAT.md."""
    words = torch.tensor([0xE335_1132 - (1 << 32), 0x6C, 0, 0, 0], dtype=torch.int32, device=device)
    chunks = torch.tensor([[0, 40, 0, 5, 0, 64, 3, 0]], dtype=torch.int64, device=device)
    codes = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32, device=device)
    numbers, diffs, wrong = decode(words, chunks, codes, 5)
    assert (numbers.tolist(), diffs.tolist(), int(wrong)) == ([2, 9, 30, 31, 57], [1, -1, 5, -1, 1], 0)


# Arguments of the kernels are pointers and numbers of the compiled program, which have no Python types.


@triton.jit
def _window(words, at, inside):
    """33 bits or more from bit `at` on, as int64; the bits above them mean nothing."""
    word = words + (at >> 5)
    low = tl.load(word, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(word + 1, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    return (low | (high << 32)) >> (at & 31)


@triton.jit
def _bits(words, at, count, inside):
    """`count` bits from `at` on, at most 33."""
    return _window(words, at, inside) & ((1 + count.to(tl.int64) * 0 << count) - 1)


@triton.jit
def _next_one(words, at, end):
    """Position of the first one from `at` on; `end` or more if there is none before `end`."""
    x = _window(words, at, at < end) & 0xFFFFFFFF
    while (x == 0) & (at < end):
        at += 32
        x = _window(words, at, at < end) & 0xFFFFFFFF
    return tl.where(x == 0, end, at + log2(tl.maximum(x & -x, 1)).to(tl.int64))


@triton.jit
def _ones(
    words,
    chunks,
    codes,
    ones,
    diffs,
    ends,
    wrong,
    COLUMNS: tl.constexpr,
    CODES: tl.constexpr,
    W: tl.constexpr,
):
    """Where the quotients of a chunk end, and the bit behind the last one. Each change gets the usual difference."""
    chunk = tl.program_id(0).to(tl.int64)
    row = chunks + chunk * COLUMNS
    end = tl.load(row + 1)
    start = tl.load(row + 2)
    n = tl.load(row + 3)
    usual = tl.load(codes + tl.load(row + 7) * CODES)
    sign = tl.load(row) + n * tl.load(row + 6)
    begin = sign + n
    found = n * 0
    at = begin
    last = begin - 1
    word = tl.arange(0, W)
    bit = tl.arange(0, 32)
    while (found < n) & (at < end):
        first = at + 32 * word
        place = first[:, None] + bit[None, :]
        x = _window(words, first, first < end)
        one = tl.where(place < end, (x[:, None] >> bit[None, :]) & 1, 0).to(tl.int32)
        rank = found + running_sums(one) - 1
        keep = (one != 0) & (rank < n)
        tl.store(ones + start + rank, (place - begin).to(tl.int32), mask=keep)
        negative = _window(words, sign + rank, keep) & 1
        tl.store(diffs + start + rank, tl.where(negative != 0, -usual, usual).to(tl.int16), mask=keep)
        last = tl.maximum(last, tl.max(tl.max(tl.where(keep, place, -1), axis=1), axis=0))
        found += tl.sum(tl.sum(one, axis=1), axis=0)
        at += 32 * W
    tl.store(ends + chunk, last + 1)
    if found < n:
        tl.store(wrong, 1)


@triton.jit(do_not_specialize=["total"])
def _magnitudes(
    words,
    chunks,
    codes,
    ends,
    lists,
    diffs,
    wrong,
    total,
    COLUMNS: tl.constexpr,
    CODES: tl.constexpr,
    L: tl.constexpr,
):
    """The planes and the tail of a chunk, number by number: each one's place depends on the one before it."""
    chunk = tl.program_id(0).to(tl.int64)
    row = chunks + chunk * COLUMNS
    end = tl.load(row + 1)
    start = tl.load(row + 2)
    n = tl.load(row + 3)
    code = codes + tl.load(row + 7) * CODES
    at = tl.load(ends + chunk)
    fine = at.to(tl.int32) * 0 + 1
    at, fine = _class_magnitudes(words, at, end, lists, diffs, code, start, n, fine, total, L)
    left = end - at
    padding = _window(words, at, (left > 0) & (left < 8)) & ((1 << tl.minimum(tl.maximum(left, 0), 8)) - 1)
    if (fine == 0) | (left < 0) | (left >= 8) | (padding != 0):
        tl.store(wrong, 1)


@triton.jit
def _class_magnitudes(words, at, end, lists, diffs, code, start, n, fine, total, L: tl.constexpr):
    """The planes and the tail of `n` changes from `start` on. Returns (position behind them, 0 if they are malformed).

    They are malformed if `fine` is 0. `lists` is int32[2, total], scratch.
    """
    usual = tl.load(code).to(tl.int64)
    tail = tl.load(code + 1)
    planes = tl.load(code + 2)
    diffs += start
    count = n  # changes that no plane has ended
    plane = planes * 0
    while (plane < planes) & (count > 0) & (fine != 0):
        earlier = lists + start + total * (plane & 1)
        later = lists + start + total * (1 - (plane & 1))
        code_of = tl.load(code + 3 + plane)
        rest, at, fine = _plane(words, at, end, earlier, later, diffs, usual, plane, code_of, count, L)
        count = rest
        plane += 1
        tl.debug_barrier()  # other threads read what one has written
    earlier = lists + start + total * (plane & 1)
    at, fine = _tail(words, at, end, earlier, diffs, usual, plane, tail, count, fine)
    return at, fine


@triton.jit
def _plane(words, at, end, earlier, later, diffs, usual, plane, code, count, L: tl.constexpr):
    """One plane: of the `count` changes `earlier` (all if it is the first) those that go on, to `later`.

    Returns (number of them, position behind the plane, 0 if it is malformed).
    """
    k = (code & 127).to(tl.int64)
    listing_rest = code >= 128
    fine = plane * 0 + (at < end).to(tl.int32)
    some = _bits(words, at, k * 0 + 1, at < end) != 0
    at += 1
    lane = tl.arange(0, L)
    rest = count * 0
    listed = count * 0 - 1
    while (listed < count) & (fine != 0):
        previous = listed
        listed = count
        if some:
            one = _next_one(words, at, end)
            listed = previous + 1 + ((one - at) << k) + _bits(words, one + 1, k, one + 1 + k <= end)
            if (one + 1 + k > end) | (listed > count):
                fine = plane * 0
                listed = count
            at = one + 1 + k
        # Those between the listed ones end here or go on, and the listed one does the other.
        for begin in range(previous + 1, listed, L):
            i = begin + lane
            inside = i < listed
            change = i.to(tl.int32)
            if plane > 0:
                change = tl.load(earlier + i, mask=inside, other=0)
            if not listing_rest:
                tl.store(later + rest + (i - previous - 1), change, mask=inside)
            elif plane > 0:
                _set(diffs, change, _unfold(plane.to(tl.int64) + i * 0, usual), inside)
        if not listing_rest:
            rest += listed - previous - 1
        if listed < count:
            change = listed.to(tl.int32)
            if plane > 0:
                change = tl.load(earlier + listed)
            if listing_rest:
                tl.store(later + rest, change)
                rest += 1
            elif plane > 0:
                _set(diffs, change, _unfold(plane.to(tl.int64), usual), fine != 0)
    return rest, at, fine


@triton.jit
def _tail(words, at, end, earlier, diffs, usual, planes, code, count, fine):
    """The magnitudes of `count` changes. Returns (position behind them, 0 if they are malformed)."""
    k = (code & 127).to(tl.int64)
    rice = code >= 128
    done = count * 0
    while (done < count) & (fine != 0):
        one = _next_one(words, at, end)
        quotient = one - at
        digits = tl.where(rice, k, quotient + k)
        too_large = (digits > _DIGITS) | (rice & (quotient > (2 * _LARGEST) >> k))
        digits = tl.minimum(digits, _DIGITS)
        inside = (one + 1 + digits <= end) & (too_large == 0)
        value = _bits(words, one + 1, digits, inside)
        power = k * 0 + 1
        value += tl.where(rice, quotient << k, (power << digits) - (power << k))
        magnitude = _unfold(value + planes, usual)
        change = done.to(tl.int32)
        if planes > 0:
            change = tl.load(earlier + done)
        negative = tl.load(diffs + change) < 0
        inside = inside & ((magnitude < _LARGEST) | ((magnitude == _LARGEST) & negative))
        if inside:
            tl.store(diffs + change, tl.where(negative, -magnitude, magnitude).to(tl.int16))
        else:
            fine = planes * 0
        at = one + 1 + digits
        done += 1
    return at, fine


@triton.jit
def _unfold(distance, usual):
    """`book.unfold`: the magnitude of a distance."""
    near = usual + tl.where((distance & 1) != 0, (distance + 1) >> 1, -(distance >> 1))
    return tl.where(distance > 2 * usual - 2, distance + 1, near)


@triton.jit
def _set(diffs, change, magnitude, inside):
    """Give differences another magnitude that fits, and keep their signs."""
    negative = tl.load(diffs + change, mask=inside, other=0) < 0
    tl.store(diffs + change, tl.where(negative, -magnitude, magnitude).to(tl.int16), mask=inside)


@triton.jit
def _place(words, chunks, ones, numbers, wrong, COLUMNS: tl.constexpr, N: tl.constexpr):
    """The number of each change: one more than the sum of the gaps up to it."""
    row = chunks + tl.program_id(0).to(tl.int64) * COLUMNS
    low = tl.load(row)
    start = tl.load(row + 2)
    n = tl.load(row + 3)
    first = tl.load(row + 4)
    k = tl.load(row + 6)
    position = n * 0 - 1
    for begin in range(0, n, N):
        i = begin + tl.arange(0, N)
        inside = i < n
        one = tl.load(ones + start + i, mask=inside, other=0)
        before = tl.load(ones + start + i - 1, mask=inside & (i > 0), other=-1)
        gap = ((one - before - 1).to(tl.int64) << k) | _bits(words, low + i * k, k, inside)
        step = tl.where(inside, gap + 1, 0)
        tl.store(numbers + start + i, first + position + tl.cumsum(step, axis=0), mask=inside)
        position += tl.sum(step, axis=0)
    if position >= tl.load(row + 5):
        tl.store(wrong, 1)
