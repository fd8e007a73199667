"""Content hashes of Xet storage: chunks, and the trees over them that name xorbs and files.

Source: the Xet protocol specification (huggingface.co/docs/xet), "Hashing Methods".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .blake3 import keyed_hashes

_CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
_FILE_KEY = bytes(32)
_CHILDREN = 4  # of a node, on average


def hash_text(raw: bytes) -> str:
    """The text form of a hash: four little-endian u64, each as 16 hex digits."""
    return "{:016x}{:016x}{:016x}{:016x}".format(*struct.unpack("<4Q", raw))


def chunk_hashes(chunks: Sequence[bytes]) -> list[str]:
    """Hashes of unpacked chunks."""
    return [hash_text(raw) for raw in keyed_hashes(_CHUNK_KEY, chunks)]


def xorb_hash(chunks: Sequence[tuple[str, int]]) -> str:
    """Hash of a xorb with these chunks (hash, unpacked size), at least one."""
    level = list(chunks)
    while len(level) > 1:
        groups = []
        while level:
            cut = _cut(level)
            groups.append(level[:cut])
            level = level[cut:]
        texts = ["".join(f"{name} : {size}\n" for name, size in group).encode() for group in groups]
        sizes = [sum(size for _, size in group) for group in groups]
        level = list(zip((hash_text(raw) for raw in keyed_hashes(_NODE_KEY, texts)), sizes, strict=True))
    return level[0][0]


def file_hash(chunks: Sequence[tuple[str, int]]) -> str:
    """Hash of a file with these chunks. Zeros for an empty one."""
    if not chunks:
        return "0" * 64
    root = struct.pack("<4Q", *struct.unpack(">4Q", bytes.fromhex(xorb_hash(chunks))))
    return hash_text(keyed_hashes(_FILE_KEY, [root])[0])


def _cut(level: Sequence[tuple[str, int]]) -> int:
    """How many of the first nodes belong to one parent."""
    most = min(len(level), 2 * _CHILDREN + 1)
    for n in range(2, most):
        if int(level[n][0][48:], 16) % _CHILDREN == 0:
            return n + 1
    return most
