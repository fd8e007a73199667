"""Unpacks chunks of xorbs: stored, LZ4 frames, and LZ4 frames of bytes sorted into four groups."""

from __future__ import annotations

_STORED, _LZ4, _GROUPED_LZ4 = 0, 1, 2
_MAGIC = b"\x04\x22\x4d\x18"


def unpacked(packed: bytes, scheme: int, size: int) -> bytes:
    """The `size` bytes of a chunk. ValueError if they cannot be unpacked, or are another number."""
    if scheme == _STORED:
        data = packed
    elif scheme == _LZ4:
        data = _frame(packed, size)
    elif scheme == _GROUPED_LZ4:
        data = _ungrouped(_frame(packed, size))
    else:
        raise ValueError(f"unknown compression {scheme}")
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes, not {size}")
    return data


def _ungrouped(data: bytes) -> bytes:
    """Bytes 0, 4, 8, ... come first, then 1, 5, 9, ..."""
    result, at = bytearray(len(data)), 0
    for group in range(4):
        count = (len(data) - group + 3) // 4
        result[group::4] = data[at : at + count]
        at += count
    return bytes(result)


def _frame(data: bytes, size: int) -> bytes:
    """An LZ4 frame (lz4_Frame_format.md)."""
    if not data.startswith(_MAGIC) or len(data) < 7:
        raise ValueError("not an LZ4 frame")
    flags = data[4]
    at = 7 + 8 * bool(flags & 0x08) + 4 * bool(flags & 0x01)  # content size, dictionary id
    out = bytearray()
    while length := int.from_bytes(data[at : at + 4], "little"):
        at += 4
        block = data[at : at + (length & 0x7FFFFFFF)]
        if len(block) != length & 0x7FFFFFFF:
            raise ValueError("truncated LZ4 frame")
        at += len(block) + 4 * bool(flags & 0x10)  # checksum
        if length >> 31:
            out += block
        else:
            _block(block, out, size)
        if len(out) > size:
            raise ValueError("an LZ4 frame of more bytes than stated")
    return bytes(out)


def _block(block: bytes, out: bytearray, size: int) -> None:
    """Append the bytes of an LZ4 block (lz4_Block_format.md)."""
    at = 0
    try:
        while at < len(block):
            token, at = block[at], at + 1
            count, at = _length(block, at, token >> 4)
            out += block[at : at + count]
            at += count
            if at >= len(block):
                return
            offset, at = int.from_bytes(block[at : at + 2], "little"), at + 2
            count, at = _length(block, at, token & 15)
            _repeat(out, offset, count + 4, size)
    except IndexError:
        raise ValueError("truncated LZ4 block") from None


def _length(block: bytes, at: int, count: int) -> tuple[int, int]:
    if count == 15:
        while (more := block[at]) == 255:
            count, at = count + 255, at + 1
        count, at = count + more, at + 1
    return count, at


def _repeat(out: bytearray, offset: int, count: int, size: int) -> None:
    if not 0 < offset <= len(out) or len(out) + count > size:
        raise ValueError("an LZ4 block refers to bytes that it does not have")
    start = len(out) - offset
    if count <= offset:
        out += out[start : start + count]
        return
    pattern = bytes(out[start:])
    out += (pattern * (count // offset + 1))[:count]
