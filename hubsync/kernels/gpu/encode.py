# mypy: disable-error-code="no-untyped-def"
"""Kernels of the encoder of `fast` parts: count what each chunk would cost, and write its bits. docs/FORMAT.md.

A list of changes is `numbers` (int64, ascending), `old` and `new` (int16 patterns). The changes of a chunk are a range
of it, and a program takes one chunk, so every launch is over all chunks of all tensors. `format.codec.device` is the
host side. Bits are counted from the lowest one of the first byte; words have 32 bits. `classes` has the kernels for
`compact` parts, whose magnitudes are written here.
"""

from __future__ import annotations

import triton
import triton.language as tl

COPIES = 32  # of the histogram: thousands of programs add to the same few magnitudes
MAGNITUDES = 32_769  # 0 .. 32768, all that a difference of 16 bits can have
PARAMETERS = 32  # Rice parameters whose cost is counted

# Columns of `chunks`, int64[chunks, COLUMNS]: where the list of a chunk begins, its changes, the number of its first
# element, the Rice parameter of its gaps, and its row of `codes`.
START, COUNT, FIRST, GAP, BOOK = range(5)
COLUMNS = 5

# Columns of `codes`, int32[books, CODES]: usual magnitude, tail, number of planes, and the planes.
CODES = 8
MAX_PLANES = 5

_LOOKED = 256  # changes that `look` reads together
_COMPARED = 64  # changes that `magnitudes` reads together: it compares each with each
_WRITTEN = 512  # changes that `gaps` writes together
_JOINED = 4  # of them in a row: their bits are joined before they are written


def look(numbers, old, new, bounds, edges, quotients, histogram):
    """Count, for each chunk, the quotients of its gaps for every Rice parameter; for each book, all magnitudes.

    Chunks without changes, or with more than half of their elements changed, are left out.

    Args:
        bounds: int64[2, chunks], the range of each chunk in the list.
        edges: int64[3, chunks], number of the first element, elements, row of the book.
        quotients: int32[chunks, PARAMETERS], zeroed: their sums.
        histogram: int32[books, COPIES, MAGNITUDES], zeroed: the copies add up to the counts.
    """
    chunks = bounds.shape[1]
    _look[(chunks,)](
        numbers, old, new, bounds, edges, quotients, histogram, chunks,
        COPIES, MAGNITUDES, PARAMETERS, _LOOKED, num_warps=4,
    )  # fmt: skip


def measure_magnitudes(old, new, chunks, codes, bits):
    """Bits of each section of magnitudes, int64[chunks, MAX_PLANES + 1]: those of the planes, the tail, and zeros."""
    _magnitudes[(len(chunks), MAX_PLANES + 1)](
        old, new, chunks, codes, bits, bits, chunks.shape[1], CODES, MAX_PLANES + 1, False, _COMPARED, num_warps=1
    )


def write(numbers, old, new, chunks, codes, begins, words):
    """Write the chunks.

    Args:
        begins: int64[chunks, MAX_PLANES + 2], the first bit of the chunk, and of each section of magnitudes.
        words: int32, zeroed, with a spare one at the end.
    """
    _gaps[(len(chunks),)](
        numbers, old, new, chunks, begins, words, COLUMNS, MAX_PLANES + 2, _JOINED, _WRITTEN, num_warps=4
    )  # fmt: skip
    write_magnitudes(old, new, chunks, codes, begins, words)


def write_magnitudes(old, new, chunks, codes, begins, words):
    """The sections of magnitudes. `chunks` may have more columns; the first one of `begins` is not read."""
    _magnitudes[(len(chunks), MAX_PLANES + 1)](
        old, new, chunks, codes, begins, words, chunks.shape[1], CODES, MAX_PLANES + 2, True, _COMPARED, num_warps=1
    )


# Arguments of the kernels are pointers and numbers of the compiled program, which have no Python types.


@triton.jit(do_not_specialize=["chunks"])
def _look(
    numbers,
    old,
    new,
    bounds,
    edges,
    quotients,
    histogram,
    chunks,
    COPIES: tl.constexpr,
    MAGNITUDES: tl.constexpr,
    PARAMETERS: tl.constexpr,
    N: tl.constexpr,
):
    chunk = tl.program_id(0)
    start = tl.load(bounds + chunk)
    n = tl.load(bounds + chunks + chunk) - start
    first = tl.load(edges + chunk)
    size = tl.load(edges + chunks + chunk)
    if (n > 0) & (2 * n <= size):
        own = histogram + (tl.load(edges + 2 * chunks + chunk) * COPIES + chunk % COPIES) * MAGNITUDES
        lane = tl.arange(0, N)
        parameter = tl.arange(0, PARAMETERS)
        sums = tl.zeros([PARAMETERS], tl.int32)
        ones = tl.zeros([N], tl.int32)
        for begin in range(0, n, N):
            i = begin + lane
            inside = i < n
            gap = _gap(numbers, start, i, inside, first).to(tl.int32)
            sums += tl.sum(gap[:, None] >> parameter[None, :], axis=0)
            magnitude = tl.abs(differences(old, new, start + i, inside))
            ones += (magnitude == 1).to(tl.int32)  # by far most of them: counted here
            tl.atomic_add(own + magnitude, tl.full([N], 1, tl.int32), mask=inside & (magnitude != 1), sem="relaxed")
        tl.store(quotients + chunk.to(tl.int64) * PARAMETERS + parameter, sums)
        tl.atomic_add(own + 1, tl.sum(ones, axis=0), sem="relaxed")


@triton.jit
def _gap(numbers, start, i, inside, first):
    """Elements between a change and the one before it in the chunk, int64; 0 outside."""
    number = tl.load(numbers + start + i, mask=inside, other=0)
    previous = tl.load(numbers + start + i - 1, mask=inside & (i > 0), other=0)
    return tl.where(inside, number - tl.where(i > 0, previous, first - 1) - 1, 0)


@triton.jit
def _ordered(bits):
    """Patterns (int16) -> integers in the order of the numbers, int32."""
    pattern = bits.to(tl.int32) & 0xFFFF
    return pattern ^ tl.where(pattern >= 0x8000, 0xFFFF, 0x8000)


@triton.jit
def differences(old, new, at, inside):
    """Signed steps from old to new patterns, int32."""
    before = _ordered(tl.load(old + at, mask=inside, other=0))
    after = _ordered(tl.load(new + at, mask=inside, other=0))
    return (after - before).to(tl.int16).to(tl.int32)


@triton.jit
def _magnitudes(
    old,
    new,
    chunks,
    codes,
    begins,
    out,
    COLUMNS: tl.constexpr,
    CODES: tl.constexpr,
    SECTIONS: tl.constexpr,
    WRITE: tl.constexpr,
    N: tl.constexpr,
):
    """Write one section of magnitudes of a chunk to the words `out`, or store its bits there."""
    row = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    start = tl.load(chunks + row * COLUMNS)
    n = tl.load(chunks + row * COLUMNS + 1)
    code = codes + tl.load(chunks + row * COLUMNS + 4) * CODES
    usual = tl.load(code)
    planes = tl.load(code + 2)
    if WRITE:
        begin = tl.load(begins + row * SECTIONS + 1 + section)
        out_at = out
    else:
        begin = start * 0
        out_at = out + row * SECTIONS + section
    if section < planes:
        _plane(old + start, new + start, n, usual, section, tl.load(code + 3 + section), begin, out_at, WRITE, N)
    elif section == planes:
        _tail(old + start, new + start, n, usual, planes, tl.load(code + 1), begin, out_at, WRITE, N)


@triton.jit
def _plane(old, new, n, usual, plane, code, begin, out, WRITE: tl.constexpr, N: tl.constexpr):
    """List the changes of distance `plane`, or the larger ones, among those that no earlier plane has ended."""
    k = code & 127
    listing_rest = (code >> 7) & 1
    lane = tl.arange(0, N)
    earlier = lane[None, :] < lane[:, None]
    reached = n.to(tl.int32) * 0  # changes that no earlier plane has ended
    last = reached - 1  # number of the last listed one among them
    length = begin * 0  # bits of the list
    for at in range(0, n, N):
        inside = at + lane < n
        distance = _distances(old, new, at + lane, inside, usual)
        here = (inside & (distance >= plane)).to(tl.int32)
        number = reached + tl.cumsum(here, axis=0) - 1
        listed = (here != 0) & ((distance > plane).to(tl.int32) == listing_rest)
        before = tl.max(tl.where(listed[None, :] & earlier, number[None, :], -1), axis=1)
        gap = tl.where(listed, number - tl.maximum(before, last) - 1, 0)
        bits = tl.where(listed, (gap >> k) + 1 + k, 0)
        if WRITE:
            one = begin + length + (tl.cumsum(bits, axis=0) - k)  # behind the flag
            low = gap & ((1 << k) - 1)
            put_bits(out, one, 1 | (low.to(tl.int64) << 1), listed)
        length += tl.sum(bits, axis=0)
        reached += tl.sum(here, axis=0)
        last = tl.maximum(last, tl.max(tl.where(listed, number, -1), axis=0))
    gap = reached - 1 - last  # behind the last listed one
    if WRITE:
        first = tl.zeros([1], tl.int64)
        put_bits(out, begin + first, first + 1, first + last >= 0)
        low = gap & ((1 << k) - 1)
        put_bits(out, begin + 1 + length + (gap >> k) + first, (1 | (low.to(tl.int64) << 1)) + first, first + last >= 0)
    else:
        listing = 1 + length + (gap >> k) + 1 + k
        tl.store(out, tl.where(reached == 0, 0, tl.where(last < 0, 1, listing)))


@triton.jit
def _tail(old, new, n, usual, planes, code, begin, out, WRITE: tl.constexpr, N: tl.constexpr):
    """Code the distances that no plane has ended, less the number of planes, one by one."""
    k = code & 127
    rice = code >= 128
    lane = tl.arange(0, N)
    length = begin * 0
    for at in range(0, n, N):
        inside = at + lane < n
        distance = _distances(old, new, at + lane, inside, usual)
        coded = inside & (distance >= planes)
        value = tl.where(coded, distance - planes, 0)
        exponent = log2(value + (1 << k)) - k
        zeros = tl.where(rice, value >> k, exponent)
        digits = tl.where(rice, k, exponent + k)
        low = tl.where(rice, value & ((1 << k) - 1), value + (1 << k) - (1 << (exponent + k)))
        bits = tl.where(coded, zeros + 1 + digits, 0)
        if WRITE:
            one = begin + length + (tl.cumsum(bits.to(tl.int64), axis=0) - 1 - digits)
            put_bits(out, one, 1 | (low.to(tl.int64) << 1), coded)
        length += tl.sum(bits.to(tl.int64), axis=0)
    if not WRITE:
        tl.store(out, length)


@triton.jit
def _distances(old, new, at, inside, usual):
    """`book.fold` of the magnitudes: 0 for the usual one, then 1 for the next larger, 2 for the next smaller, ..."""
    magnitude = tl.abs(differences(old, new, at, inside))
    near = tl.where(magnitude > usual, 2 * (magnitude - usual) - 1, 2 * (usual - magnitude))
    return tl.where(magnitude >= 2 * usual, magnitude - 1, near)


@triton.jit
def log2(value):
    """Position of the leading one of 1 .. 2^24."""
    return (value.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _gaps(
    numbers,
    old,
    new,
    chunks,
    begins,
    words,
    COLUMNS: tl.constexpr,
    SECTIONS: tl.constexpr,
    JOINED: tl.constexpr,
    N: tl.constexpr,
):
    """Write low parts, signs and quotients of a chunk."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(chunks + row * COLUMNS)
    n = tl.load(chunks + row * COLUMNS + 1)
    first = tl.load(chunks + row * COLUMNS + 2)
    k = tl.load(chunks + row * COLUMNS + 3)
    mask = (1 + k * 0 << k) - 1
    low = tl.load(begins + row * SECTIONS)
    sign = low + n * k
    unary = sign + n
    lane = tl.arange(0, N // JOINED)[:, None] * JOINED + tl.arange(0, JOINED)[None, :]
    for begin in range(0, n, N):
        i = begin + lane
        inside = i < n
        gap = _gap(numbers, start, i, inside, first)
        put_many(words, low + i * k, gap & mask, k, inside)
        negative = differences(old, new, start + i, inside) < 0
        put_many(words, sign + i, negative.to(tl.int64), 1, inside)
        bits = tl.where(inside, (gap >> k) + 1, 0)
        put_many(words, unary + running_sums(bits) - 1, inside.to(tl.int64), 1, inside)
        unary += tl.sum(tl.sum(bits, axis=1), axis=0)


@triton.jit
def running_sums(x):
    """Inclusive sums over a matrix in row-major order."""
    rows = tl.sum(x, axis=1)
    return tl.cumsum(x, axis=1) + (tl.cumsum(rows, axis=0) - rows)[:, None]


@triton.jit
def put_many(words, at, value, width, inside):
    """`put_bits` for a matrix of ascending positions: what of a row fits 32 bits is joined to one value first."""
    first = tl.min(tl.where(inside, at, 1 << 60), axis=1)
    apart = at - first[:, None]
    near = inside & (apart + width <= 32)
    joined = tl.sum(tl.where(near, value << tl.where(near, apart, 0), 0), axis=1)
    put_bits(words, first, joined, joined != 0)
    put_bits(words, at, value, inside & (near == 0) & (value != 0))


@triton.jit
def put_bits(words, at, value, inside):
    """Or values below 2^32 (int64) into zeroed bits from `at` on."""
    both = value << (at & 31)
    word = words + (at >> 5)
    tl.atomic_or(word, both.to(tl.int32), mask=inside, sem="relaxed")
    high = both >> 32
    tl.atomic_or(word + 1, high.to(tl.int32), mask=inside & (high != 0), sem="relaxed")
