"""One tensor's delta <-> its record, its chunk rows and its payload. docs/FORMAT.md is the specification."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubsync.bits import SIGNED
from hubsync.errors import FormatError
from hubsync.patch import TensorDelta
from hubsync.table import TensorSpec

from . import streams
from .grid import Grid
from .streams import CHUNK_COLUMNS, MAX_K

DENSE, CODED = 0, 1  # modes

TENSOR, CHUNK_ROWS, CHUNK_COLS, CODE = range(4)  # columns of a record; TENSOR belongs to the part, not to the codec
RECORD_COLUMNS = 4

_NO_LIMIT = 1 << 62

_PROBLEMS = {
    streams.COUNTS: "impossible counts",
    streams.PAYLOAD_SHORT: "its payload is missing",
    streams.GAP_OUTSIDE: "a position lies outside its chunk",
    streams.EXCEPTION_OUTSIDE: "an exception lies behind the last change",
    streams.UNARY_SHORT: "the unary stream ends too early",
    streams.UNARY_LONG: "the unary stream has bits left over",
    streams.MAGNITUDE_SHORT: "the magnitude stream ends too early",
    streams.MAGNITUDE_LONG: "the magnitude stream has bits left over",
    streams.TOO_LARGE: "a difference does not fit the width of an element",
    streams.PADDING: "the padding bits are not zero",
}


@dataclass(frozen=True, eq=False)
class EncodedTensor:
    """A coded tensor delta.

    Attributes:
        record: uint32[RECORD_COLUMNS]; column TENSOR is left zero.
        chunks: uint32[chunks, CHUNK_COLUMNS], none in dense mode.
        payload: uint8[bytes].
    """

    record: np.ndarray
    chunks: np.ndarray
    payload: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.record.nbytes + self.chunks.nbytes + self.payload.nbytes


def encode_tensor(spec: TensorSpec, delta: TensorDelta, grid: Grid | None = None) -> EncodedTensor:
    """Encode the (sound, non-empty) delta of one tensor, in whichever mode is smallest.

    Args:
        grid: how to cut the tensor into chunks; chunks of about a million elements by default.
    """
    grid = grid or Grid.default(*spec.matrix)
    places, diffs = grid.places(delta.indices), delta.diffs
    if not grid.contiguous:
        order = np.argsort(places)
        places, diffs = places[order], diffs[order]

    bounds = np.searchsorted(places, grid.starts)
    rows, gaps, exception_gaps, magnitudes = streams.separate(places, diffs, bounds, grid.starts)
    ks = (
        int(np.argmin(streams.rice_cost(gaps))),
        int(np.argmin(streams.rice_cost(exception_gaps))),
        int(np.argmin(streams.exp_golomb_cost(magnitudes)[: spec.width])),  # larger ones would not fit the width
    )
    streams.measure(rows, gaps, exception_gaps, magnitudes, ks)
    _, _, offsets = streams.lay_out(rows, grid.starts, ks, _NO_LIMIT)
    size = int(offsets[-1])
    if size + rows.size * 4 >= spec.nbytes:
        return _encode_dense(spec, delta)
    words = _words(size)
    streams.write(rows, gaps, diffs, exception_gaps, magnitudes, offsets, ks, words)
    record = np.array([0, grid.chunk_rows, grid.chunk_cols, _pack_code(ks)], np.uint32)
    return EncodedTensor(record, rows.astype(np.uint32), _as_bytes(words)[:size])


def decode_tensor(
    spec: TensorSpec, record: np.ndarray, chunks: np.ndarray, payload: np.ndarray
) -> tuple[TensorDelta, int, int]:
    """Inverse of `encode_tensor`; trusts nothing in its arguments but their dtypes.

    Args:
        chunks, payload: what the record describes stands at their beginning; they may go on for other tensors.

    Returns:
        (delta, chunk rows used, payload bytes used). Memory is O(rows and bytes used). FormatError says what is wrong.
    """
    mode, ks = _unpack_code(spec, record)
    if mode == DENSE:
        return _decode_dense(spec, payload), 0, spec.nbytes
    grid = _grid(spec, record)
    if grid.count > len(chunks):
        raise FormatError(f"{spec.name}: {grid.count} chunk rows are needed, {len(chunks)} are left")
    rows = chunks[: grid.count].astype(np.int64)
    problem, chunk, offsets = streams.lay_out(rows, grid.starts, ks, len(payload))
    _raise(spec, problem, chunk)

    size, changes = int(offsets[-1]), int(rows[:, streams.CHANGES].sum())
    if changes == 0:
        raise FormatError(f"{spec.name}: is listed but has no changes")
    words = _words(size)
    _as_bytes(words)[:size] = payload[:size]
    places, diffs = np.empty(changes, np.int64), np.empty(changes, SIGNED[spec.width])
    problem, chunk = streams.read(words, rows, offsets, grid.starts, ks, places, diffs)
    _raise(spec, problem, chunk)
    if grid.contiguous:
        return TensorDelta(places, diffs), grid.count, size
    indices = grid.indices(places)
    order = np.argsort(indices)
    return TensorDelta(indices[order], diffs[order]), grid.count, size


def _raise(spec: TensorSpec, problem: int, chunk: int) -> None:
    if problem != streams.FINE:
        raise FormatError(f"{spec.name}, chunk {chunk}: {_PROBLEMS[problem]}")


def _pack_code(ks: tuple[int, int, int]) -> int:
    return CODED | ks[0] << 8 | ks[1] << 16 | ks[2] << 24


def _unpack_code(spec: TensorSpec, record: np.ndarray) -> tuple[int, tuple[int, int, int]]:
    code = int(record[CODE])
    mode, *ks = (code >> shift & 0xFF for shift in (0, 8, 16, 24))
    if mode not in (DENSE, CODED):
        raise FormatError(f"{spec.name}: unknown mode {mode}")
    if max(ks) > MAX_K or (mode == DENSE and record[CHUNK_ROWS:].any()):
        raise FormatError(f"{spec.name}: impossible code parameters {ks}")
    return mode, (ks[0], ks[1], ks[2])


def _grid(spec: TensorSpec, record: np.ndarray) -> Grid:
    rows, cols = spec.matrix
    chunk_rows, chunk_cols = int(record[CHUNK_ROWS]), int(record[CHUNK_COLS])
    if not (1 <= chunk_rows <= rows and 1 <= chunk_cols <= cols):
        raise FormatError(f"{spec.name}: chunks of {chunk_rows} x {chunk_cols} do not fit {rows} x {cols}")
    return Grid(rows, cols, chunk_rows, chunk_cols)


def _encode_dense(spec: TensorSpec, delta: TensorDelta) -> EncodedTensor:
    dense = np.zeros(spec.numel, delta.diffs.dtype.newbyteorder("<"))
    dense[delta.indices] = delta.diffs
    return EncodedTensor(
        np.zeros(RECORD_COLUMNS, np.uint32), np.zeros((0, CHUNK_COLUMNS), np.uint32), dense.view(np.uint8)
    )


def _decode_dense(spec: TensorSpec, payload: np.ndarray) -> TensorDelta:
    if len(payload) < spec.nbytes:
        raise FormatError(f"{spec.name}: {spec.nbytes} payload bytes are needed, {len(payload)} are left")
    signed = np.dtype(SIGNED[spec.width])
    dense = np.frombuffer(payload[: spec.nbytes].tobytes(), signed.newbyteorder("<")).astype(signed, copy=False)
    indices = np.flatnonzero(dense)
    if len(indices) == 0:
        raise FormatError(f"{spec.name}: is listed but has no changes")
    return TensorDelta(indices, dense[indices])


def _words(nbytes: int) -> np.ndarray:
    """Zeroed words for `nbytes` bytes, and one to spare for reads and writes across the end."""
    return np.zeros(nbytes // 8 + 2, np.dtype("<u8"))


def _as_bytes(words: np.ndarray) -> np.ndarray:
    return words.view(np.uint8)
