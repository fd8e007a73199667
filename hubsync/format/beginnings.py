"""What the beginning of a delta part says: how many elements of each tensor change. Without the payload, most of it.

The beginning is compared with no hash, so this is for what is shown, never for what is served.
"""

from __future__ import annotations

import json

import numpy as np

from hubsync.errors import FormatError

from .codec import RECORD_COLUMNS
from .codec.counts import ChangeCounts, counts_of
from .table import TensorTable

FIRST_BYTES = 1 << 16  # holds the header, and of most parts all that is wanted
_LONGEST_HEADER = FIRST_BYTES - 8
_MAX_BYTES = 64 << 20
_WANTED: dict[str, tuple[str, int]] = {
    "tensors": ("<u4", 2),
    "books": ("u1", 2),
    "chunks": ("u1", 1),
}  # dtype and dimensions


def wanted_bytes(data: bytes) -> int:
    """Bytes of a part before its payload, from its first `FIRST_BYTES`. FormatError if it is no part."""
    header, begin = _header(data)
    end = begin + max(_span(header, name)[1] for name in _WANTED)
    if end > _MAX_BYTES:
        raise FormatError(f"delta part: {end} bytes before the payload, more than {_MAX_BYTES}")
    return end


def read_counts(data: bytes, table: TensorTable) -> ChangeCounts:
    """Changes of each tensor, from the first `wanted_bytes` of a part. FormatError if they make no sense for `table`.

    Whether the part belongs to that table is for the caller to know: its manifest says so.
    """
    header, begin = _header(data)
    arrays: dict[str, np.ndarray] = {}
    for name, (dtype, dimensions) in _WANTED.items():
        first, last = _span(header, name)
        shape = header[name].get("shape")
        if not (isinstance(shape, list) and len(shape) == dimensions and all(type(n) is int and n >= 0 for n in shape)):
            raise FormatError(f"delta part: {name} has an impossible shape")
        raw = data[begin + first : begin + last]
        if len(raw) != last - first:
            raise FormatError("delta part: it ends before its payload")
        try:
            arrays[name] = np.frombuffer(raw, dtype).reshape(shape)
        except ValueError as error:
            raise FormatError(f"delta part: {name}: {error}") from None
    if arrays["tensors"].shape[1] != RECORD_COLUMNS:
        raise FormatError(f"delta part: records have {RECORD_COLUMNS} columns")
    try:
        return counts_of(table, **arrays)
    except FormatError as error:
        raise FormatError(f"delta part: {error}") from None


def _header(data: bytes) -> tuple[dict, int]:
    """The header of a safetensors file, and where its tensors begin."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_LONGEST_HEADER, len(data) - 8):
        raise FormatError("delta part: not a safetensors file, or a damaged one")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not all(isinstance(header.get(name), dict) for name in _WANTED):
        raise FormatError("delta part: its header is not that of a delta part")
    return header, 8 + size


def _span(header: dict, name: str) -> tuple[int, int]:
    ends = header[name].get("data_offsets")
    if not (
        isinstance(ends, list) and len(ends) == 2 and all(type(n) is int for n in ends) and 0 <= ends[0] <= ends[1]
    ):
        raise FormatError(f"delta part: {name} lies nowhere")
    return ends[0], ends[1]
