"""Counts of changes from the beginning of a part: the same as decoding all of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hubsync.errors import FormatError
from hubsync.format.beginnings import FIRST_BYTES, read_counts, wanted_bytes
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position
from hubsync.format.parts import Transition, write_delta
from hubsync.format.patch import TensorValues
from hubsync.format.view_bits import ViewBits
from tests.support.toy import TABLE, nudged, patch_between, view

TRANSITION = Transition("ab" * 16, Position(1, "0" * 32), Position(2, "1" * 32))
OLD = view(1)
PATCH = patch_between(OLD, nudged(OLD, 2))


def part(encoding: Encoding = Encoding.FAST, **changed: object) -> bytes:
    patch = {**PATCH, **{TABLE.index_of(name): values for name, values in changed.items()}}
    return bytes(write_delta(TABLE, patch, TRANSITION, encoding=encoding, old=ViewBits(TABLE, OLD)))  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", [Encoding.FAST, Encoding.COMPACT])
def test_the_counts_are_those_of_the_changes(encoding: Encoding) -> None:
    data = part(encoding)
    counts = read_counts(data[: wanted_bytes(data[:FIRST_BYTES])], TABLE)
    known = {index: len(delta.indices) for index, delta in PATCH.items() if not counts.whole[index]}
    assert {index: count for index, count in enumerate(counts.changed.tolist()) if count} == known
    assert len(known) > 2


def test_a_tensor_with_new_values_is_known_as_whole() -> None:
    data = part(q=TensorValues(np.zeros(64, np.uint16)))
    counts = read_counts(data, TABLE)
    assert counts.whole[TABLE.index_of("q")]
    assert counts.changed[TABLE.index_of("q")] == 0


def test_what_is_no_part_is_an_error() -> None:
    data = part()
    for bad in (b"", b"x" * 100, data[:40], (8).to_bytes(8, "little") + b"{}      "):
        with pytest.raises(FormatError):
            wanted_bytes(bad)
    with pytest.raises(FormatError, match="ends before its payload"):
        read_counts(data[: wanted_bytes(data) - 1], TABLE)


def test_every_damaged_byte_gives_counts_or_a_format_error() -> None:
    data = part()
    end = wanted_bytes(data)
    for at in range(end):
        for value in (0, 0xFF, data[at] ^ 1):
            damaged = data[:at] + bytes([value]) + data[at + 1 : end]
            try:
                wanted_bytes(damaged)
                counts = read_counts(damaged, TABLE)
            except FormatError:
                continue
            assert (counts.changed <= TABLE.columns.numel).all()


def test_a_header_may_state_no_absurd_sizes() -> None:
    ends = {"dtype": "U8", "shape": [0], "data_offsets": [0, 1 << 40]}
    text = json.dumps({"tensors": ends, "books": ends, "chunks": ends}).encode()
    with pytest.raises(FormatError, match="before the payload"):
        wanted_bytes(len(text).to_bytes(8, "little") + text)
