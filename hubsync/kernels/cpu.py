"""Kernels for weights in main memory, compiled by numba. They release the GIL, so threads run them in parallel."""

from __future__ import annotations

import numpy as np

from .bits import trailing_zeros
from .classes import CLASSES, ClassMap
from .compiled import compiled

_BLOCK = 64  # elements counted together: each count fits a byte, and a search inside is short
_NEAR = 128  # blocks that fit the L1 cache
_FLUSH = 512  # blocks after which 16-bit counts are added to 64-bit ones

Blocks = np.ndarray
"""uint64[blocks, 2]: elements of each class in a block of 64, a byte each; even classes, odd classes."""

_NEVER = 1 << 40  # elements until the next one to find, if there is none
_U = np.uint64
_NIBBLES, _BYTES, _TOPS = _U(0x0F0F0F0F0F0F0F0F), _U(0x00FF00FF00FF00FF), _U(0x8000800080008000)


def count(bits: np.ndarray, classes: ClassMap) -> tuple[np.ndarray, Blocks]:
    """Number of elements of each class: int64[CLASSES], and by blocks for `place`.

    Args:
        bits: unsigned[n], contiguous.
    """
    blocks = np.empty((-(-len(bits) // _BLOCK), 2), np.uint64)
    sizes = np.zeros(CLASSES, np.int64)
    _count(bits, _words(bits), classes.shift, classes.mask, classes.ones, blocks, sizes)
    return sizes, blocks


def rank(bits: np.ndarray, positions: np.ndarray, classes: ClassMap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes and ranks of the elements at `positions` (int32, ascending). A rank counts elements of the same class.

    Returns:
        (sizes, class_of, ranks): int64[CLASSES] elements of each class, uint8[n] and int32[n].
    """
    return _count_and_rank(bits, _words(bits), positions, classes.shift, classes.mask, classes.ones, classes.table)


def place(
    bits: np.ndarray, blocks: Blocks, ranks: np.ndarray, diffs: np.ndarray, bounds: np.ndarray, classes: ClassMap
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `rank`: positions of elements given by class and rank, ascending, and their differences in that order.

    Args:
        ranks: int32[n], those of class c are `bounds[c] .. bounds[c + 1]`, ascending and below the size of the class.
        diffs: signed[n] in the same order.
    """
    positions, out = np.empty(len(ranks), np.int32), np.empty(len(ranks), diffs.dtype)
    _place(bits, blocks, ranks, diffs, bounds, classes.shift, classes.mask, classes.table, positions, out)
    return positions, out


def _words(bits: np.ndarray) -> np.ndarray:
    """The whole blocks of 16-bit elements, four to a word; none of other elements."""
    whole = len(bits) // _BLOCK * _BLOCK if bits.itemsize == 2 else 0
    return bits[:whole].view(np.uint64)


# Each pass over a chunk is one call of compiled code: threads that return to Python often wait for each other.


@compiled
def _count(
    bits: np.ndarray,
    words: np.ndarray,
    shift: int,
    mask: int,
    ones: np.ndarray,
    blocks: np.ndarray,
    sizes: np.ndarray,
) -> None:
    whole = len(words) // 16
    _count_16(words, shift, mask, ones, blocks[:whole])
    _count_any(bits, whole, shift, mask, ones, blocks)
    _add_up(blocks, sizes)


@compiled
def _count_and_rank(
    bits: np.ndarray,
    words: np.ndarray,
    positions: np.ndarray,
    shift: int,
    mask: int,
    ones: np.ndarray,
    table: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = np.empty((-(-len(bits) // _BLOCK), 2), np.uint64)
    sizes = np.zeros(CLASSES, np.int64)
    _count(bits, words, shift, mask, ones, blocks, sizes)
    class_of, ranks = np.empty(len(positions), np.uint8), np.empty(len(positions), np.int32)
    _rank(bits, blocks, positions, shift, mask, table, class_of, ranks)
    return sizes, class_of, ranks


@compiled
def _count_any(bits: np.ndarray, first: int, shift: int, mask: int, ones: np.ndarray, blocks: np.ndarray) -> None:
    """Count the blocks from `first` on, elements of any width."""
    s, m = _U(shift), _U(mask)
    for b in range(first, len(blocks)):
        even, odd = _U(0), _U(0)
        stop = min(b * _BLOCK + _BLOCK, len(bits))
        for start in range(b * _BLOCK, stop, 8):
            eight = _U(0)
            for i in range(start, min(start + 8, stop)):
                eight += ones[(_U(bits[_U(i)]) >> s) & m]
            even += eight & _NIBBLES
            odd += (eight >> _U(4)) & _NIBBLES
        blocks[b, 0], blocks[b, 1] = even, odd


@compiled
def _count_16(words: np.ndarray, shift: int, mask: int, ones: np.ndarray, blocks: np.ndarray) -> None:
    """The same for whole blocks of 16-bit elements, four to a word. Three times as fast, and most models are 16-bit."""
    s, m = _U(shift), _U(mask)
    near = np.empty(_NEAR * 16, np.uint64)  # a plain copy reads memory much faster than the loop below
    for first in range(0, len(blocks), _NEAR):
        last = min(first + _NEAR, len(blocks))
        for i in range((last - first) * 16):
            near[i] = words[first * 16 + i]
        for b in range(last - first):
            even, odd = _U(0), _U(0)
            for pair in range(8):
                w, v = near[_U(b * 16 + 2 * pair)] >> s, near[_U(b * 16 + 2 * pair + 1)] >> s
                eight = ones[w & m] + ones[(w >> _U(16)) & m] + ones[(w >> _U(32)) & m] + ones[(w >> _U(48)) & m]
                eight += ones[v & m] + ones[(v >> _U(16)) & m] + ones[(v >> _U(32)) & m] + ones[(v >> _U(48)) & m]
                even += eight & _NIBBLES
                odd += (eight >> _U(4)) & _NIBBLES
            blocks[first + b, 0], blocks[first + b, 1] = even, odd


@compiled
def _add_up(blocks: np.ndarray, sizes: np.ndarray) -> None:
    for first in range(0, len(blocks), _FLUSH):
        a, b, c, d = _U(0), _U(0), _U(0), _U(0)
        for i in range(first, min(first + _FLUSH, len(blocks))):
            even, odd = blocks[i, 0], blocks[i, 1]
            a += even & _BYTES
            b += odd & _BYTES
            c += (even >> _U(8)) & _BYTES
            d += (odd >> _U(8)) & _BYTES
        _flush(a, b, c, d, sizes)


@compiled
def _flush(a: np.uint64, b: np.uint64, c: np.uint64, d: np.uint64, sizes: np.ndarray) -> None:
    """Add counts in 16-bit lanes: lane i of word j is class 4 i + j."""
    for i in range(4):
        shift = _U(16 * i)
        sizes[4 * i] += np.int64((a >> shift) & _U(0xFFFF))
        sizes[4 * i + 1] += np.int64((b >> shift) & _U(0xFFFF))
        sizes[4 * i + 2] += np.int64((c >> shift) & _U(0xFFFF))
        sizes[4 * i + 3] += np.int64((d >> shift) & _U(0xFFFF))


@compiled
def _rank(
    bits: np.ndarray,
    blocks: np.ndarray,
    positions: np.ndarray,
    shift: int,
    mask: int,
    table: np.ndarray,
    class_of: np.ndarray,
    ranks: np.ndarray,
) -> None:
    s, m = _U(shift), _U(mask)
    before = np.zeros(CLASSES, np.int64)  # elements of each class up to the last flush, then in a .. d
    a, b, c, d = _U(0), _U(0), _U(0), _U(0)
    i = 0
    for block in range(len(blocks)):
        while i < len(positions) and positions[i] < (block + 1) * _BLOCK:
            position = positions[i]
            k = table[(_U(bits[position]) >> s) & m]
            rank = before[k]
            lanes = (a, b, c, d)
            rank += np.int64((lanes[k & 3] >> (_U(k >> 2) << _U(4))) & _U(0xFFFF))
            if position - block * _BLOCK < _BLOCK // 2:
                for j in range(block * _BLOCK, position):
                    rank += table[(_U(bits[_U(j)]) >> s) & m] == k
            else:  # fewer elements to visit from the other end
                rank += np.int64((blocks[block, k & 1] >> (_U(k >> 1) << _U(3))) & _U(0xFF))
                for j in range(position, min(len(bits), (block + 1) * _BLOCK)):
                    rank -= table[(_U(bits[_U(j)]) >> s) & m] == k
            class_of[i], ranks[i] = k, rank
            i += 1
        if i == len(positions):
            return
        even, odd = blocks[block, 0], blocks[block, 1]
        a += even & _BYTES
        b += odd & _BYTES
        c += (even >> _U(8)) & _BYTES
        d += (odd >> _U(8)) & _BYTES
        if block % _FLUSH == _FLUSH - 1:
            _flush(a, b, c, d, before)
            a, b, c, d = _U(0), _U(0), _U(0), _U(0)


@compiled
def _place(
    bits: np.ndarray,
    blocks: np.ndarray,
    ranks: np.ndarray,
    diffs: np.ndarray,
    bounds: np.ndarray,
    shift: int,
    mask: int,
    table: np.ndarray,
    positions: np.ndarray,
    out: np.ndarray,
) -> None:
    """Walk the blocks. For each class, a 16-bit lane counts the elements until the next one to find.

    One subtraction compares four lanes with four counts. The top bit of each lane is set before, so that no lane
    borrows from another. The part of a gap beyond 15 bits waits in `beyond`.
    """
    s, m = _U(shift), _U(mask)
    following = bounds[:-1].copy()
    beyond = np.zeros(CLASSES, np.int64)
    near = np.zeros(4, np.uint64)
    for k in range(CLASSES):
        gap = ranks[following[k]] if following[k] < bounds[k + 1] else _NEVER
        _set_lane(near, beyond, k, gap)
    done = 0
    for b in range(len(blocks)):
        even, odd = blocks[b, 0], blocks[b, 1]
        h0, h1, h2, h3 = even & _BYTES, odd & _BYTES, (even >> _U(8)) & _BYTES, (odd >> _U(8)) & _BYTES
        t0, t1, t2, t3 = (near[0] | _TOPS) - h0, (near[1] | _TOPS) - h1, (near[2] | _TOPS) - h2, (near[3] | _TOPS) - h3
        if t0 & t1 & t2 & t3 & _TOPS == _TOPS:  # nothing to find in this block
            near[0], near[1], near[2], near[3] = t0 ^ _TOPS, t1 ^ _TOPS, t2 ^ _TOPS, t3 ^ _TOPS
            continue
        first = done
        for j in range(4):
            if j == 0:
                held, reached = h0, t0
            elif j == 1:
                held, reached = h1, t1
            elif j == 2:
                held, reached = h2, t2
            else:
                held, reached = h3, t3
            hits = ~reached & _TOPS
            lanes = near[j]
            near[j] = reached ^ _TOPS
            while hits != 0:
                lane = trailing_zeros(hits) - _U(15)
                hits &= hits - _U(1)
                k = int(np.int64(lane >> _U(2))) + j
                inside = np.int64((held >> lane) & _U(0xFFFF))
                ahead = int(np.int64((lanes >> lane) & _U(0xFFFF))) + beyond[k]
                at, seen = b * _BLOCK, 0
                while ahead < inside:
                    while True:
                        is_of_class = int(table[(_U(bits[_U(at)]) >> s) & m] == k)
                        if is_of_class + seen > ahead:
                            break
                        seen += is_of_class
                        at += 1
                    slot = done  # insert in order: the classes of a block are found one after the other
                    while slot > first and positions[slot - 1] > at:
                        positions[slot], out[slot] = positions[slot - 1], out[slot - 1]
                        slot -= 1
                    positions[slot], out[slot] = at, diffs[following[k]]
                    done += 1
                    previous = ranks[following[k]]
                    following[k] += 1
                    ahead = ahead + ranks[following[k]] - previous if following[k] < bounds[k + 1] else _NEVER
                _set_lane(near, beyond, k, ahead - inside)


@compiled
def _set_lane(near: np.ndarray, beyond: np.ndarray, k: int, gap: int) -> None:
    lane = _U((k >> 2) << 4)
    low = min(gap, 0x7FFF)
    near[k & 3] = (near[k & 3] & ~(_U(0xFFFF) << lane)) | (_U(low) << lane)
    beyond[k] = gap - low
