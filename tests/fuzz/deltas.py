"""Delta parts: sound ones with mutations inside of their arrays, so that most reach the decoder.

To fuzz a new mode of a record, add a function to `RECORDS` that makes the patch of one tensor with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import torch

from hubsync.errors import ConfigError, FormatError
from hubsync.format.codec import Encoded
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position
from hubsync.format.parts import Transition, _parse, _serialize, read_delta, write_delta
from hubsync.format.patch import TensorDelta, TensorValues, check
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import SIGNED, TORCH_DTYPES, UNSIGNED
from tests.support.worst_parts import made

from .bytestrings import MARKED, mutated
from .session import memory, reset_peak

REJECTIONS = (FormatError, ConfigError)
TABLE = TensorTable(
    [
        TensorSpec("matrix", (40, 48), "BF16"),
        TensorSpec("vector", (128,), "BF16"),
        TensorSpec("cube", (6, 5, 7), "F32"),
        TensorSpec("odd", (33, 9), "F16"),
        TensorSpec("byte", (17, 16), "F8_E4M3"),
        TensorSpec("row", (1, 2048), "BF16"),
        TensorSpec("scalar", (), "BF16"),
        TensorSpec("tiny", (4, 4), "F8_E5M2"),
    ]
)
_TRANSITION = Transition("0" * 32, Position(1, "1" * 32), Position(2, "2" * 32))
_ARRAYS = ("tensors", "books", "chunks", "payload")
_NUMBERS = (0, 1, 2, 255, 256, 257, 1 << 16, 1 << 24, (1 << 31) - 1, (1 << 32) - 1)  # of records
_CORPUS = 64  # sound parts


def some_changes(spec: TensorSpec, rng: np.random.Generator) -> TensorDelta | None:
    """Any share of the elements, by small or large steps."""
    count = int(spec.numel * rng.choice([0.002, 0.01, 0.05, 0.3, 0.7, 1.0]))
    if count == 0:
        return None
    indices = np.sort(rng.choice(spec.numel, count, replace=False)).astype(np.int64)
    steps = rng.integers(1, int(rng.choice([1, 3, 100])) + 1, count) * rng.choice([-1, 1], count)
    return TensorDelta(indices, steps.astype(SIGNED[spec.width]))


def new_values(spec: TensorSpec, rng: np.random.Generator) -> TensorValues:
    """Any bit patterns for the whole tensor: an absolute record."""
    unsigned = UNSIGNED[spec.width]
    return TensorValues(rng.integers(0, np.iinfo(unsigned).max, spec.numel, unsigned, endpoint=True))


RECORDS: list[Callable[[TensorSpec, np.random.Generator], Any]] = [some_changes, some_changes, new_values]
"""Each makes the patch of one tensor; None for no change."""


@functools.cache
def old_weights() -> ViewBits:
    rng = np.random.default_rng(0)
    view = {
        spec.name: torch.from_numpy(rng.standard_normal(spec.shape).astype("f4") * np.float32(0.02)).to(
            TORCH_DTYPES[spec.dtype]
        )
        if spec.shape
        else torch.tensor(0.5).to(TORCH_DTYPES[spec.dtype])
        for spec in TABLE
    }
    return ViewBits(TABLE, view)


@functools.cache
def corpus() -> Sequence[bytes]:
    """Sound parts, fast and compact."""
    rng = np.random.default_rng(0)
    parts = []
    for number in range(_CORPUS):
        chosen = [index for index in range(len(TABLE)) if rng.random() < 0.6] or [0]
        records = [RECORDS[rng.integers(len(RECORDS))](TABLE[index], rng) for index in chosen]
        patch = {index: record for index, record in zip(chosen, records, strict=True) if record is not None}
        encoding = Encoding.COMPACT if number % 2 else Encoding.FAST
        parts.append(bytes(write_delta(TABLE, patch, _TRANSITION, encoding=encoding, old=old_weights())))
    return parts


def make(rng: Random) -> bytes:
    """A mutated part."""
    part = rng.choice(corpus())
    chance = rng.random()
    if chance < 0.75:
        return _mutated_inside(part, rng)
    return mutated(_mutated_inside(part, rng) if chance < 0.8 else part, rng)


def read(data: bytes) -> None:
    """Decode a part as a replica does, with or without the old weights; what comes out must be a sound patch."""
    old = None if len(data) % 8 == 0 else old_weights()
    patch = read_delta(data, TABLE, None, old)
    try:
        check(TABLE, patch)
    except FormatError as error:
        raise AssertionError(f"the decoder accepted an unsound patch: {error}") from error


def warm_up() -> None:
    """Read the corpus, which compiles the decoder."""
    for part in corpus():
        read_delta(part, TABLE, None, old_weights())


def worst_memory(nbytes: int) -> tuple[str, float]:
    """Of the parts that take the most memory: the name of the worst, and its bytes of memory for a byte of the part."""
    found = []
    for name, (table, part) in made(nbytes).items():
        reset_peak()
        before = memory("VmRSS")
        read_delta(part, table, None, old_weights())
        found.append(((memory("VmHWM") - before) / len(part), name))
    ratio, name = max(found)
    return name, ratio


def _mutated_inside(part: bytes, rng: Random) -> bytes:
    """Mutations of the four arrays and of the encoding; the safetensors file around them is sound."""
    arrays, metadata = _parse(part)
    arrays = {name: array.copy() for name, array in arrays.items()}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(_ARRAYS)
        if arrays[name].size:
            change = {"tensors": _mutate_records, "books": _mutate_books}.get(name, _mutate_bits)
            arrays[name] = change(arrays[name], rng)
    metadata = dict(metadata)
    if rng.random() < 0.05:
        metadata["encoding"] = rng.choice([encoding.value for encoding in Encoding])
    return _serialize(Encoded(**arrays), metadata)


def _mutate_records(records: np.ndarray, rng: Random) -> np.ndarray:
    flat = records.reshape(-1)
    at = rng.randrange(len(flat))
    match rng.randrange(6):
        case 0:
            flat[at] = rng.choice(_NUMBERS)
        case 1:
            flat[at] = (int(flat[at]) + rng.choice([-1, 1])) & 0xFFFFFFFF
        case 2:  # another mode, known or not
            row = rng.randrange(len(records))
            records[row, -1] = (int(records[row, -1]) & ~0xFF) | rng.randrange(5)
            if rng.random() < 0.5:
                records[row, 1:-1] = 0
        case 3:
            return records[: rng.randrange(len(records) + 1)]
        case 4:
            return np.concatenate([records, records[rng.randrange(len(records)) :][:1]])
        case _:
            return records[rng.sample(range(len(records)), len(records))]
    return records


def _mutate_books(books: np.ndarray, rng: Random) -> np.ndarray:
    if rng.random() < 0.1:
        return np.concatenate([books, books[-1:]])
    flat = books.reshape(-1)
    at = rng.randrange(len(flat))
    flat[at] = rng.choice([*MARKED, (int(flat[at]) + 1) & 255, (int(flat[at]) - 1) & 255, rng.randrange(256)])
    return books


def _mutate_bits(bits: np.ndarray, rng: Random) -> np.ndarray:
    """Bytes of `chunks` or `payload`, mostly of the same length, so that sections stay where they are."""
    new = mutated(bits.tobytes(), rng)
    if rng.random() < 0.7:
        new = new[: bits.size].ljust(bits.size, b"\0")
    return np.frombuffer(new, np.uint8).copy()
