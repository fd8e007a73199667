"""Keyed BLAKE3 of many texts at once, with numpy: the standard library does not have it.

Source: "BLAKE3: one function, fast everywhere" (2020), section 2. All leaves of all texts go through the compression
function together, then all parents, level by level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

_IV = np.array([0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A], np.uint32)
_ORDER = np.array([2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8])
_LEAF, _BLOCK = 1024, 64  # bytes
_START, _END, _PARENT, _ROOT, _KEYED = 1, 2, 4, 8, 16


def keyed_hashes(key: bytes, texts: Sequence[bytes]) -> list[bytes]:
    """The 32-byte hash of each text under a key of 32 bytes."""
    if not texts:
        return []
    start = np.frombuffer(key, "<u4").astype(np.uint32)[:, None]
    lengths = np.array([len(text) for text in texts])
    counts = np.maximum(1, -(-lengths // _LEAF))
    nodes = _leaves(start, texts, lengths, counts)
    owners = np.repeat(np.arange(len(texts)), counts)
    while len(owners) > len(texts):
        nodes, owners, counts = _level(start, nodes, owners, counts)
    return [nodes[:, n].astype("<u4").tobytes() for n in range(len(texts))]


def _leaves(start: Words, texts: Sequence[bytes], lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> Words:
    padded = b"".join(text.ljust(n * _LEAF, b"\0") for text, n in zip(texts, counts.tolist(), strict=True))
    words = np.frombuffer(padded, "<u4").astype(np.uint32).reshape(-1, _LEAF // _BLOCK, 16)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    index = np.arange(len(words)) - first
    sizes = np.clip(np.repeat(lengths, counts) - index * _LEAF, 0, _LEAF)
    blocks = np.maximum(1, -(-sizes // _BLOCK))
    alone = np.repeat(counts, counts) == 1
    values = np.repeat(start, len(words), axis=1)
    for n in range(int(blocks.max())):
        last = blocks == n + 1
        flags = _KEYED + (_START if n == 0 else 0) + _END * last + _ROOT * (last & alone)
        length = np.clip(sizes - n * _BLOCK, 0, _BLOCK)
        values = np.where(blocks > n, _compress(values, words[:, n].T, index, length, flags), values)
    return values


def _level(
    start: Words, nodes: Words, owners: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[Words, NDArray[np.int64], NDArray[np.int64]]:
    """Join neighbours of each text; an odd last one moves up as it is."""
    place = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    left = np.flatnonzero((place % 2 == 0) & (place + 1 < counts[owners]))
    block = np.concatenate([nodes[:, left], nodes[:, left + 1]])
    flags = _KEYED + _PARENT + _ROOT * (counts[owners[left]] == 2)
    size = np.full(len(left), _BLOCK)
    joined = _compress(np.repeat(start, len(left), axis=1), block, np.zeros(len(left), np.int64), size, flags)
    nodes = nodes.copy()
    nodes[:, left] = joined
    kept = place % 2 == 0
    return nodes[:, kept], owners[kept], -(-counts // 2)


def _compress(
    values: Words, block: Words, counter: NDArray[np.int64], length: NDArray[np.int64], flags: NDArray[np.int64]
) -> Words:
    """The compression function on columns: 8 words of value, 16 of a block."""
    a, b = values[:4].copy(), values[4:].copy()
    c = np.repeat(_IV[:, None], values.shape[1], axis=1)
    d = np.stack([counter, np.zeros_like(counter), length, flags]).astype(np.uint32)
    message = block
    for _ in range(7):
        a, b, c, d = _mix(a, b, c, d, message[0:8:2], message[1:8:2])
        b, c, d = np.roll(b, -1, 0), np.roll(c, -2, 0), np.roll(d, -3, 0)
        a, b, c, d = _mix(a, b, c, d, message[8:16:2], message[9:16:2])
        b, c, d = np.roll(b, 1, 0), np.roll(c, 2, 0), np.roll(d, 3, 0)
        message = message[_ORDER]
    return np.concatenate([a ^ c, b ^ d])


def _mix(a: Words, b: Words, c: Words, d: Words, first: Words, second: Words) -> tuple[Words, Words, Words, Words]:
    a = a + b + first
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b + second
    d = _rotated(d ^ a, 8)
    c = c + d
    return a, _rotated(b ^ c, 7), c, d


def _rotated(words: Words, bits: int) -> Words:
    return (words >> np.uint32(bits)) | (words << np.uint32(32 - bits))
