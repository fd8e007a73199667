"""The two binary formats that hf_xet uploads: xorbs (packed chunks) and shards (the chunks of files).

Only what a server must understand is parsed, and every length is checked before use. Content hashes are recomputed
for xorbs of up to `_HASHED` bytes, and for files of such xorbs. For larger ones, sizes, counts and ranges of a shard
must fit the xorbs it refers to, and hashes are believed.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, replace

from .hashes import chunk_hashes, file_hash, hash_text, xorb_hash
from .unpack import unpacked

MAX_XORB_BYTES = 80 << 20  # hf_xet stays below 64 MiB of content; headers and a trailer come on top
EMPTY_FILE = "0" * 64

_RECORD = 48  # every shard record: a 32-byte hash and four u32
_BOOKEND = b"\xff" * 32
_SHARD_MAGIC = b"HFRepoMetaData"
_XORB_TRAILER = b"XETBLOB"
_HAS_VERIFICATION = 1 << 31
_HAS_METADATA = 1 << 30
_FOOTER = 200
_VALID_FOR = 14 * 86400
_HASHED = 8 << 20  # bytes, unpacked: more would take seconds
_UNPACKED = 1 << 20  # compressed bytes, likewise


class MalformedError(ValueError):
    """Malformed bytes of a xorb or a shard."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of a xorb: where it ends in the serialized xorb, its size once unpacked, in bytes, and its hash.

    The hash is "" where it was not computed.
    """

    end: int
    size: int
    hash: str = ""


@dataclass(frozen=True)
class Segment:
    """A run of chunks `start..end` of one xorb, `size` bytes once unpacked; a file is a list of these."""

    xorb: str
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class XetShard:
    """One uploaded shard: files by hash, chunk sizes of new xorbs, and chunks that other uploads may find."""

    files: dict[str, list[Segment]]
    xorbs: dict[str, list[int]]
    findable: list[str]
    answer: bytes  # a shard with footer, the reply to a look-up of one of the findable chunks


def parse_xorb(data: bytes) -> list[Chunk]:
    """Chunks of a serialized xorb: header (u8 version, u24 packed size, u8 scheme, u24 size), packed bytes, ..."""
    chunks: list[Chunk] = []
    packed_chunks: list[tuple[bytes, int, int]] = []
    at = 0
    while at < len(data) and not data.startswith(_XORB_TRAILER, at):
        if at + 8 > len(data):
            raise MalformedError("xorb: truncated chunk header")
        packed = int.from_bytes(data[at + 1 : at + 4], "little")
        size = int.from_bytes(data[at + 5 : at + 8], "little")
        scheme = data[at + 4]
        at += 8 + packed
        if at > len(data) or packed == 0 or size == 0:
            raise MalformedError("xorb: chunk length out of bounds")
        chunks.append(Chunk(at, size))
        packed_chunks.append((data[at - packed : at], scheme, size))
    if not chunks:
        raise MalformedError("xorb: no chunks")
    return _hashed(chunks, packed_chunks)


def check_xorb(xorb: str, chunks: list[Chunk]) -> None:
    """MalformedError if a xorb has another hash. Believed if a chunk has none."""
    if all(chunk.hash for chunk in chunks) and xorb_hash([(chunk.hash, chunk.size) for chunk in chunks]) != xorb:
        raise MalformedError(f"xorb: its content does not have the hash {xorb}")


def check_file(file: str, chunks: list[Chunk]) -> None:
    """MalformedError if a file of these chunks has another hash. Believed if a chunk has none."""
    if all(chunk.hash for chunk in chunks) and file_hash([(chunk.hash, chunk.size) for chunk in chunks]) != file:
        raise MalformedError(f"shard: a file's content does not have the hash {file}")


def _hashed(chunks: list[Chunk], packed_chunks: list[tuple[bytes, int, int]]) -> list[Chunk]:
    """The chunks with their hashes, unless that takes too long."""
    compressed = sum(len(packed) for packed, scheme, _ in packed_chunks if scheme)
    if sum(chunk.size for chunk in chunks) > _HASHED or compressed > _UNPACKED:
        return chunks
    try:
        hashes = chunk_hashes([unpacked(*packed) for packed in packed_chunks])
    except ValueError as error:
        raise MalformedError(f"xorb: a chunk cannot be unpacked: {error}") from None
    return [replace(chunk, hash=text) for chunk, text in zip(chunks, hashes, strict=True)]


def parse_shard(data: bytes) -> XetShard:
    """An uploaded shard: header, file section, bookend, xorb section, bookend."""
    if not data.startswith(_SHARD_MAGIC):
        raise MalformedError("shard: wrong magic")
    files, at = _parse_files(data, _RECORD)
    xorb_section = at
    xorbs: dict[str, list[int]] = {}
    findable = []
    while (raw := _hash_at(data, at)) != _BOOKEND:
        count = _u32(data, at, 1)
        sizes = []
        for n in range(count):
            record = at + _RECORD * (n + 1)
            chunk = hash_text(_hash_at(data, record))
            sizes.append(_u32(data, record, 1))
            # The client looks up the first chunk of a file and every chunk whose last u64 is a multiple of 1024.
            if _u32(data, record, 2) & _HAS_VERIFICATION or int(chunk[48:], 16) % 1024 == 0:
                findable.append(chunk)
        xorbs[hash_text(raw)] = sizes
        at += _RECORD * (count + 1)
    return XetShard(files, xorbs, findable, _answer(data[:40], data[xorb_section : at + _RECORD]))


def _parse_files(data: bytes, at: int) -> tuple[dict[str, list[Segment]], int]:
    files = {}
    while (raw := _hash_at(data, at)) != _BOOKEND:
        flags, count = _u32(data, at, 0), _u32(data, at, 1)
        at += _RECORD
        segments = []
        for _ in range(count):
            segments.append(
                Segment(hash_text(_hash_at(data, at)), _u32(data, at, 1), _u32(data, at, 2), _u32(data, at, 3))
            )
            at += _RECORD
        files[hash_text(raw)] = segments
        at += _RECORD * (count if flags & _HAS_VERIFICATION else 0) + _RECORD * bool(flags & _HAS_METADATA)
    return files, at + _RECORD


def _answer(header: bytes, xorb_section: bytes) -> bytes:
    """A shard without files but with a footer: without a footer the client rejects the look-up and the whole upload."""
    body = header + struct.pack("<Q", _FOOTER) + _BOOKEND + bytes(16) + xorb_section
    end, now = len(body), int(time.time())
    footer = struct.pack("<9Q", 1, _RECORD, 2 * _RECORD, end, 0, end, 0, end, 0) + bytes(32)
    return body + footer + struct.pack("<2Q", now, now + _VALID_FOR) + bytes(72) + struct.pack("<Q", end)


def _hash_at(data: bytes, at: int) -> bytes:
    if at + _RECORD > len(data):
        raise MalformedError("shard: truncated")
    return data[at : at + 32]


def _u32(data: bytes, record: int, field: int) -> int:
    return int.from_bytes(data[record + 32 + 4 * field : record + 36 + 4 * field], "little")
