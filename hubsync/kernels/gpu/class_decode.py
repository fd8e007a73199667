# mypy: disable-error-code="no-untyped-def"
"""Kernels of the decoder of `compact` parts: payload and old weights -> numbers and differences. docs/FORMAT.md.

A *row* is one class of a chunk; its changes are a range of the list of changes, its listed elements a range of another.
Segments of old weights, and the counts of classes in them, are those of `classes`; magnitudes are read as in `decode`.
`wrong` is set as there. `format.codec.device_decode_classes` is the host side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hubsync.kernels.classes import CLASSES

from .classes import CHUNK_COLUMNS, SEGMENT, _classes
from .decode import _bits, _class_magnitudes, _window
from .encode import CODES, running_sums

# Columns of `chunks`, int64[chunks, COLUMNS]: bit where the quotients begin, the bit behind the last one of the chunk,
# where the listed elements begin, and how many there are.
UNARY, END, LIST, LISTED = range(4)
COLUMNS = 4

# Columns of `rows`, int64[chunks * CLASSES, ROW_COLUMNS]: where the changes begin, changes, where the listed elements
# begin, listed elements, the Rice parameter of their gaps, bits where the low parts and the signs begin, elements, the
# row of `codes`, the bit behind the last one of the chunk, and where the listed elements of the chunk begin.
ROW_COLUMNS = 11

# Columns of `places`, int64[chunks, PLACE_COLUMNS]: first segment, segments, number of the first element, columns, and
# elements from one row of the tensor to the next.
PLACE_COLUMNS = 5

_WORDS = 32  # of quotients that `_unary` looks at together
_TOGETHER = 128  # changes or listed elements of a row
_LANES = 32  # changes that `_magnitudes` passes on together
_LOCATED = 512  # changes that `_locate` finds the segments of
_SELECTED = 8  # changes that `_select` compares with a segment together
_STEPS = 15  # to find one of 2^14 segments


def read(words, chunks, rows, codes, listed, outputs, wrong):
    """Read rows: `outputs` are ranks (int32) and differences (int16) of all changes, in the order of rows.

    Args:
        listed: listed elements of all rows. No row lists more elements than it has changes.
    """
    ranks, diffs = outputs
    count, total = len(chunks), len(ranks)
    ones = ranks.new_empty(max(1, listed))
    free = ranks.new_empty(max(1, listed))
    lists = ranks.new_empty((2, total))
    ends = chunks.new_empty(count)
    _unary[(count,)](words, chunks, ones, ends, wrong, COLUMNS, _WORDS, num_warps=4)
    _rows[(len(rows),)](words, rows, codes, ones, free, ranks, diffs, wrong, ROW_COLUMNS, CODES, _TOGETHER, num_warps=1)
    _magnitudes[(count,)](
        words, chunks, rows, codes, ends, lists, diffs, wrong, total,
        COLUMNS, ROW_COLUMNS, CODES, CLASSES, _LANES, num_warps=1,
    )  # fmt: skip


def locate(ranks, owner, places, before, pieces, found, wrong):
    """Find the segment of each change, and its rank there among the elements of its class: `found`, int32[n] both.

    Args:
        owner: int32[n], the row of each change.
        before: int32[1 + CLASSES * pieces], sums of the counts of the segments, class by class, modulo 2^32.
    """
    n = len(ranks)
    _locate[(triton.cdiv(n, _LOCATED),)](
        ranks, owner, places, before, pieces, *found, wrong, n, PLACE_COLUMNS, CLASSES, _STEPS, _LOCATED, num_warps=4
    )


def select(bounds, segments, weights, changes, places, outputs, classes):
    """Find the number of each change, in the order of segments: `outputs` are the numbers, int64[n], and `wrong`.

    Args:
        bounds: int32[segments + 1], the changes of each segment.
        segments: int32[segments], chunk of each.
        weights: `chunks` of `classes`.
        changes: int32[n] ranks in the segment, and uint8[n] classes.
    """
    _select[(len(segments),)](
        bounds, segments, weights, *changes, places, *outputs, classes.low, classes.shift, classes.mask,
        CHUNK_COLUMNS, PLACE_COLUMNS, SEGMENT, CLASSES, _SELECTED, num_warps=4,
    )  # fmt: skip


# Arguments of the kernels are pointers and numbers of the compiled program, which have no Python types.


@triton.jit
def _unary(words, chunks, ones, ends, wrong, COLUMNS: tl.constexpr, W: tl.constexpr):
    """Where the quotients of a chunk end, from their begin on, and the bit behind the last one."""
    chunk = tl.program_id(0).to(tl.int64)
    row = chunks + chunk * COLUMNS
    begin = tl.load(row)
    end = tl.load(row + 1)
    start = tl.load(row + 2)
    n = tl.load(row + 3)
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
        last = tl.maximum(last, tl.max(tl.max(tl.where(keep, place, -1), axis=1), axis=0))
        found += tl.sum(tl.sum(one, axis=1), axis=0)
        at += 32 * W
    tl.store(ends + chunk, last + 1)
    if found < n:
        tl.store(wrong, 1)


@triton.jit
def _rows(
    words, rows, codes, ones, free, ranks, diffs, wrong, COLUMNS: tl.constexpr, CODES: tl.constexpr, N: tl.constexpr
):
    """The ranks of a row's changes, and its usual difference with their signs."""
    row = rows + tl.program_id(0).to(tl.int64) * COLUMNS
    start = tl.load(row)
    n = tl.load(row + 1)
    list_ = tl.load(row + 2)
    listed = tl.load(row + 3)
    k = tl.load(row + 4)
    low = tl.load(row + 5)
    sign = tl.load(row + 6)
    size = tl.load(row + 7)
    usual = tl.load(codes + tl.load(row + 8) * CODES)
    end = tl.load(row + 9)
    first = tl.load(row + 10)
    lane = tl.arange(0, N)
    for begin in range(0, n, N):
        i = begin + lane
        negative = _window(words, sign + i, (i < n) & (sign + i < end)) & 1
        tl.store(diffs + start + i, tl.where(negative != 0, -usual, usual).to(tl.int16), mask=i < n)
    unchanged_are_listed = 2 * n > size
    position = n * 0 - 1
    for begin in range(0, listed, N):
        i = begin + lane
        inside = i < listed
        one = tl.load(ones + list_ + i, mask=inside, other=0)
        before = tl.load(ones + list_ + i - 1, mask=inside & (list_ + i > first), other=-1)
        at = low + i * k
        gap = ((one - before - 1).to(tl.int64) << k) | _bits(words, at, k, inside & (at + k <= end))
        step = tl.where(inside, gap + 1, 0)
        place = position + tl.cumsum(step, axis=0)
        position += tl.sum(step, axis=0)
        if unchanged_are_listed:  # the changed elements before it
            tl.store(free + list_ + i, (place - i).to(tl.int32), mask=inside)
        else:
            tl.store(ranks + start + i, place.to(tl.int32), mask=inside)
    if position >= size:
        tl.store(wrong, 1)
    if unchanged_are_listed:
        tl.debug_barrier()  # other threads read what one has written
        for begin in range(0, n, N):
            i = begin + lane
            inside = i < n
            below = tl.zeros([N], tl.int64)  # unchanged elements before the change
            above = below + tl.where(inside, listed, 0)
            for _ in range(0, 25):  # a chunk has 2^24 elements at most
                middle = (below + above) >> 1
                is_open = below < above
                earlier = is_open & (tl.load(free + list_ + middle, mask=is_open, other=0) <= i)
                above = tl.where(is_open & (earlier == 0), middle, above)
                below = tl.where(earlier, middle + 1, below)
            tl.store(ranks + start + i, (i + below).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["total"])
def _magnitudes(
    words,
    chunks,
    rows,
    codes,
    ends,
    lists,
    diffs,
    wrong,
    total,
    COLUMNS: tl.constexpr,
    ROW_COLUMNS: tl.constexpr,
    CODES: tl.constexpr,
    CLASSES: tl.constexpr,
    L: tl.constexpr,
):
    """The planes and tails of a chunk, class by class."""
    chunk = tl.program_id(0).to(tl.int64)
    end = tl.load(chunks + chunk * COLUMNS + 1)
    at = tl.load(ends + chunk)
    fine = at.to(tl.int32) * 0 + 1
    row = rows + chunk * CLASSES * ROW_COLUMNS
    for _ in range(0, CLASSES):
        start = tl.load(row)
        n = tl.load(row + 1)
        code = codes + tl.load(row + 8) * CODES
        at, fine = _class_magnitudes(words, at, end, lists, diffs, code, start, n, fine, total, L)
        row += ROW_COLUMNS
    left = end - at
    padding = _window(words, at, (left > 0) & (left < 8)) & ((1 << tl.minimum(tl.maximum(left, 0), 8)) - 1)
    if (fine == 0) | (left < 0) | (left >= 8) | (padding != 0):
        tl.store(wrong, 1)


@triton.jit(do_not_specialize=["pieces", "n"])
def _locate(
    ranks,
    owner,
    places,
    before,
    pieces,
    segments,
    within,
    wrong,
    n,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = i < n
    rank = tl.load(ranks + i, mask=inside, other=0)
    row = tl.load(owner + i, mask=inside, other=0).to(tl.int64)
    place = places + (row // CLASSES) * COLUMNS
    first = tl.load(place)
    sums = before + (row % CLASSES) * pieces + first
    base = tl.load(sums)
    own = tl.zeros([N], tl.int64)  # the last segment before which no more elements of the class lie
    end = own + tl.load(place + 1)
    for _ in range(0, STEPS):
        middle = (own + end) >> 1
        is_before = (middle > own) & (tl.load(sums + middle, mask=middle > own, other=0) - base <= rank)
        own = tl.where(is_before, middle, own)
        end = tl.where(is_before, end, tl.maximum(middle, own + 1))
    ahead = tl.load(sums + own) - base
    there = tl.load(sums + own + 1) - base
    tl.store(segments + i, (first + own).to(tl.int32), mask=inside)
    tl.store(within + i, rank - ahead, mask=inside)
    outside = inside & ((rank < ahead) | (rank >= there))
    if tl.max(outside.to(tl.int32), axis=0) != 0:
        tl.store(wrong, 1)


@triton.jit(do_not_specialize=["low", "shift", "mask"])
def _select(
    bounds,
    owner,
    weights,
    within,
    classes,
    places,
    numbers,
    wrong,
    low,
    shift,
    mask,
    CHUNK_COLUMNS: tl.constexpr,
    PLACE_COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    CLASSES: tl.constexpr,
    N: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds + segment)
    end = tl.load(bounds + segment + 1)
    if begin < end:
        number = tl.load(owner + segment).to(tl.int64)
        lane = tl.arange(0, SEGMENT)
        own, exists = _classes(weights + number * CHUNK_COLUMNS, segment, lane, low, shift, mask, SEGMENT, CLASSES)
        own = tl.where(exists, own, CLASSES)
        place = places + number * PLACE_COLUMNS
        offset = (segment - tl.load(place)) * SEGMENT
        first = tl.load(place + 2)
        width = tl.load(place + 3)
        cols = tl.load(place + 4)
        for at in range(begin, end, N):
            i = at + tl.arange(0, N)
            inside = i < end
            rank = tl.load(within + i, mask=inside, other=0)
            of = tl.load(classes + i, mask=inside, other=0).to(tl.int32)
            hit = (own[None, :] == of[:, None]).to(tl.int32)
            chosen = (hit != 0) & (tl.cumsum(hit, axis=1) == rank[:, None] + 1)
            position = offset + tl.sum(tl.where(chosen, lane[None, :], 0), axis=1)
            row = position // width
            tl.store(numbers + i, first + row * cols + position - row * width, mask=inside)
            missing = inside & (tl.sum(chosen.to(tl.int32), axis=1) != 1)
            if tl.max(missing.to(tl.int32), axis=0) != 0:
                tl.store(wrong, 1)
