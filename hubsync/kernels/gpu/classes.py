# mypy: disable-error-code="no-untyped-def"
"""Kernels of the encoder of `compact` parts: find the chunk and the rank of each change, count, and write gaps.

Chunks are rectangles of the old weights, which are read through their addresses. They are cut into segments of SEGMENT
elements in row-major order, the last one of a chunk smaller. Segments are counted over all chunks. `encode` explains
lists of changes; a *row* is one class of a chunk: its changes are a range of the list in class order.
`format.codec.device_classes` is the host side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hubsync.kernels.classes import CLASSES

from .encode import differences, log2, put_many, running_sums

SEGMENT = 1024
COPIES = 4  # of the histogram: programs of 16 classes add to different ones
MAGNITUDES = 32_769
PARAMETERS = 32  # Rice parameters whose cost is counted

# Columns of `spans`, int64[spans, SPAN_COLUMNS], ascending by the first: number of the first element, elements, flat
# index of the first one in the tensor, columns of the tensor's matrix, rows and columns of its chunks, its first chunk.
FIRST, COUNT, OFFSET, COLS, CHUNK_ROWS, CHUNK_COLS, FIRST_CHUNK = range(7)
SPAN_COLUMNS = 7

# Columns of `chunks`, int64[chunks, CHUNK_COLUMNS]: address of the first old weight, columns, elements from one row to
# the next, elements, first segment.
ADDRESS, WIDTH, STRIDE, SIZE, FIRST_SEGMENT = range(5)
CHUNK_COLUMNS = 5

# Columns of `rows` when they are written, int64[rows, ROW_COLUMNS]: where the changes begin, changes, where the gaps
# begin, the Rice parameter of the gaps, the class, and gaps. Those that `encode` reads are where it expects them.
ROW_COLUMNS = 6

_LOCATED = 512  # changes that `locate` reads together
_PACKED = 8  # elements whose classes are counted in the nibbles of a number
_RANKED = 16  # changes that `rank` compares with a segment together
_LOOKED = 128  # changes that `look` reads together
_WRITTEN = 128  # gaps that are written together
_JOINED = 4


def locate(numbers, spans, chunks, segments, places, none):
    """The segment (int32) of each change, and its position there (int16). Segment `none` for numbers in no span."""
    n = len(numbers)
    if n:
        _locate[(triton.cdiv(n, _LOCATED),)](
            numbers, spans, chunks, segments, places, n, len(spans), len(spans).bit_length(), none,
            SPAN_COLUMNS, CHUNK_COLUMNS, SEGMENT, _LOCATED, num_warps=4,
        )  # fmt: skip


def count(chunks, owner, first, counts, pieces, classes):
    """Count the elements of each class in `pieces` segments from `first` on.

    Args:
        owner: int32[segments], chunk of each.
        counts: int32[1 + CLASSES * pieces], filled from 1 on, class by class.
        classes: a `ClassMap`.
    """
    _count[(pieces,)](
        chunks, owner, first, counts, pieces, classes.low, classes.shift, classes.mask,
        CHUNK_COLUMNS, SEGMENT, CLASSES, _PACKED, num_warps=4,
    )  # fmt: skip


def rank(chunks, owner, changes, before, found, piece, classes):
    """Rank changes: `found` are int32 arrays for the rank and the row of each.

    Args:
        changes: int32[segments + 1], the changes of each segment; their old patterns and places.
        piece: the first segment, and the number of segments.
        before: int32[1 + CLASSES * pieces], the sums of `counts`, modulo 2^32.
    """
    _rank[(piece[1],)](
        chunks, owner, changes[0], before, *changes[1:], *found, *piece,
        classes.low, classes.shift, classes.mask, CHUNK_COLUMNS, SEGMENT, CLASSES, _RANKED, num_warps=4,
    )  # fmt: skip


def look(rows, ranks, old, new, gaps, costs, histogram):
    """List the gaps of rows, and count their bits for every Rice parameter, and magnitudes by class.

    Args:
        rows: int64[rows, 4]: where the changes begin, changes, elements, where the gaps begin.
        gaps: int32.
        costs: int32[rows, PARAMETERS].
        histogram: int32[CLASSES, COPIES, MAGNITUDES], zeroed: the copies add up to the counts.
    """
    _look[(len(rows),)](
        rows, ranks, old, new, gaps, costs, histogram, CLASSES, COPIES, MAGNITUDES, PARAMETERS, _LOOKED, num_warps=4
    )


def write_gaps(gaps, old, new, rows, begins, words):
    """Write low parts, quotients and signs of rows; `begins` int64[rows, 3] are their first bits."""
    _write_gaps[(len(rows),)](gaps, old, new, rows, begins, words, ROW_COLUMNS, _JOINED, _WRITTEN, num_warps=1)


# Arguments of the kernels are pointers and numbers of the compiled program, which have no Python types.


@triton.jit(do_not_specialize=["n", "count", "steps", "none"])
def _locate(
    numbers,
    spans,
    chunks,
    segments,
    places,
    n,
    count,
    steps,
    none,
    SPAN_COLUMNS: tl.constexpr,
    CHUNK_COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    N: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = i < n
    number = tl.load(numbers + i, mask=inside, other=0)
    own = tl.zeros([N], tl.int32)  # the last span that begins at or before the number
    end = own + count
    for _ in range(0, steps):
        middle = (own + end) >> 1
        begins_before = tl.load(spans + middle.to(tl.int64) * SPAN_COLUMNS) <= number
        own = tl.where(begins_before, middle, own)
        end = tl.where(begins_before, end, middle)
    span = spans + own.to(tl.int64) * SPAN_COLUMNS
    element = number - tl.load(span)
    found = inside & (element >= 0) & (element < tl.load(span + 1))
    flat = tl.where(found, element, 0) + tl.load(span + 2)
    cols = tl.load(span + 3)
    chunk_rows = tl.load(span + 4)
    chunk_cols = tl.load(span + 5)
    row = flat // cols
    col = flat - row * cols
    down = row // chunk_rows
    right = col // chunk_cols
    left = right * chunk_cols
    width = tl.minimum(chunk_cols, cols - left)
    position = (row - down * chunk_rows) * width + col - left
    chunk = tl.load(span + 6) + down * ((cols + chunk_cols - 1) // chunk_cols) + right
    segment = tl.load(chunks + chunk * CHUNK_COLUMNS + 4) + position // SEGMENT
    tl.store(segments + i, tl.where(found, segment, none).to(tl.int32), mask=inside)
    tl.store(places + i, (position % SEGMENT).to(tl.int16), mask=inside)


@triton.jit
def _class_of(bits, low, shift, mask, CLASSES: tl.constexpr):
    exponent = (bits.to(tl.int32) >> shift) & mask  # the mask also cuts off copies of the sign
    return tl.minimum(tl.maximum(exponent - low, 0), CLASSES - 1)


@triton.jit
def _classes(chunk, segment, lane, low, shift, mask, SEGMENT: tl.constexpr, CLASSES: tl.constexpr):
    """Classes of the elements of a segment, and which of them exist."""
    base = tl.load(chunk).to(tl.pointer_type(tl.int16))
    width = tl.load(chunk + 1).to(tl.int32)
    stride = tl.load(chunk + 2)
    size = tl.load(chunk + 3)
    position = (segment - tl.load(chunk + 4)).to(tl.int32) * SEGMENT + lane
    inside = position < size
    row = position // width
    bits = tl.load(base + (row * stride + (position - row * width)), mask=inside, other=0)
    return _class_of(bits, low, shift, mask, CLASSES), inside


@triton.jit(do_not_specialize=["first", "pieces", "low", "shift", "mask"])
def _count(
    chunks,
    owner,
    first,
    counts,
    pieces,
    low,
    shift,
    mask,
    CHUNK_COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    CLASSES: tl.constexpr,
    PACKED: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64) + first
    chunk = chunks + tl.load(owner + segment).to(tl.int64) * CHUNK_COLUMNS
    lane = tl.arange(0, SEGMENT // PACKED)[:, None] * PACKED + tl.arange(0, PACKED)[None, :]
    own, inside = _classes(chunk, segment, lane, low, shift, mask, SEGMENT, CLASSES)
    ones = tl.where(inside, tl.full([1, 1], 1, tl.int64) << (4 * own).to(tl.int64), 0)
    nibbles = tl.sum(ones, axis=1)  # up to PACKED of each class: no nibble overflows
    slot = counts + 1 + tl.program_id(0)
    for c in tl.static_range(CLASSES):
        tl.store(slot, tl.sum((nibbles >> (4 * c)) & 15, axis=0).to(tl.int32))
        slot += pieces


@triton.jit(do_not_specialize=["first", "pieces", "low", "shift", "mask"])
def _rank(
    chunks,
    owner,
    bounds,
    before,
    old,
    places,
    ranks,
    rows,
    first,
    pieces,
    low,
    shift,
    mask,
    CHUNK_COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,
    CLASSES: tl.constexpr,
    N: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64)
    segment = local + first
    begin = tl.load(bounds + segment)
    end = tl.load(bounds + segment + 1)
    if begin < end:
        number = tl.load(owner + segment)
        chunk = chunks + number.to(tl.int64) * CHUNK_COLUMNS
        lane = tl.arange(0, SEGMENT)
        own, inside = _classes(chunk, segment, lane, low, shift, mask, SEGMENT, CLASSES)
        own = tl.where(inside, own, CLASSES)
        start = tl.load(chunk + 4) - first  # of the chunk
        for at in range(begin, end, N):
            i = at + tl.arange(0, N)
            change = i < end
            place = tl.load(places + i, mask=change, other=0).to(tl.int32)
            of = _class_of(tl.load(old + i, mask=change, other=0), low, shift, mask, CLASSES)
            ahead = (own[None, :] == of[:, None]) & (lane[None, :] < place[:, None])
            sums = before + of.to(tl.int64) * pieces
            others = tl.load(sums + local) - tl.load(sums + start)
            tl.store(ranks + i, others + tl.sum(ahead.to(tl.int32), axis=1), mask=change)
            tl.store(rows + i, number * CLASSES + of, mask=change)


@triton.jit
def _look(
    rows,
    ranks,
    old,
    new,
    gaps,
    costs,
    histogram,
    CLASSES: tl.constexpr,
    COPIES: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    PARAMETERS: tl.constexpr,
    N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(rows + 4 * row)
    n = tl.load(rows + 4 * row + 1).to(tl.int32)
    size = tl.load(rows + 4 * row + 2).to(tl.int32)
    own_gaps = gaps + tl.load(rows + 4 * row + 3)
    own_ranks = ranks + start
    lane = tl.arange(0, N)
    parameter = tl.arange(0, PARAMETERS)
    quotients = tl.zeros([PARAMETERS], tl.int32)
    unchanged_are_listed = 2 * n > size
    listed = tl.minimum(n, size - n)
    for at in range(0, listed, N):
        i = at + lane
        inside = i < listed
        if unchanged_are_listed:
            here = _unchanged(own_ranks, n, i, inside)
            previous = _unchanged(own_ranks, n, i - 1, inside & (i > 0))
        else:
            here = tl.load(own_ranks + i, mask=inside, other=0)
            previous = tl.load(own_ranks + i - 1, mask=inside & (i > 0), other=0)
        gap = tl.where(inside, here - tl.where(i > 0, previous, -1) - 1, 0)
        tl.store(own_gaps + i, gap, mask=inside)
        quotients += tl.sum(gap[:, None] >> parameter[None, :], axis=0)
    tl.store(costs + row * PARAMETERS + parameter, quotients + listed * (parameter + 1))
    chunk = row // CLASSES
    own = histogram + ((row % CLASSES) * COPIES + chunk % COPIES) * MAGNITUDES
    ones = tl.zeros([N], tl.int32)
    for at in range(0, n, N):
        inside = at + lane < n
        magnitude = tl.abs(differences(old, new, start + at + lane, inside))
        ones += (magnitude == 1).to(tl.int32)
        tl.atomic_add(own + magnitude, tl.full([N], 1, tl.int32), mask=inside & (magnitude != 1), sem="relaxed")
    found = tl.sum(ones, axis=0)
    tl.atomic_add(own + 1, found, mask=found > 0, sem="relaxed")


@triton.jit
def _unchanged(ranks, n, number, inside):
    """Ranks of unchanged elements of a class: as many as changed ones lie before them, more than their number."""
    end = tl.where(inside, n, 0)
    before = end * 0  # changed elements before the unchanged one
    for _ in range(0, log2(n) + 1):
        middle = (before + end) >> 1
        is_open = before < end
        earlier = is_open & (tl.load(ranks + middle, mask=is_open, other=0) - middle <= number)
        end = tl.where(is_open & (earlier == 0), middle, end)
        before = tl.where(earlier, middle + 1, before)
    return before + number


@triton.jit
def _write_gaps(
    gaps, old, new, rows, begins, words, COLUMNS: tl.constexpr, JOINED: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(rows + row * COLUMNS)
    n = tl.load(rows + row * COLUMNS + 1)
    own_gaps = gaps + tl.load(rows + row * COLUMNS + 2)
    k = tl.load(rows + row * COLUMNS + 3)
    listed = tl.load(rows + row * COLUMNS + 5)
    mask = (1 + k * 0 << k) - 1
    low = tl.load(begins + row * 3)
    unary = tl.load(begins + row * 3 + 1)
    sign = tl.load(begins + row * 3 + 2)
    lane = tl.arange(0, N // JOINED)[:, None] * JOINED + tl.arange(0, JOINED)[None, :]
    for at in range(0, listed, N):
        i = at + lane
        inside = i < listed
        gap = tl.load(own_gaps + i, mask=inside, other=0).to(tl.int64)
        put_many(words, low + i * k, gap & mask, k, inside)
        bits = tl.where(inside, (gap >> k) + 1, 0)
        put_many(words, unary + running_sums(bits) - 1, inside.to(tl.int64), 1, inside)
        unary += tl.sum(tl.sum(bits, axis=1), axis=0)
    for at in range(0, n, N):
        i = at + lane
        inside = i < n
        negative = differences(old, new, start + i, inside) < 0
        put_many(words, sign + i, negative.to(tl.int64), 1, inside)
