"""Rounding float32 to bfloat16, and finding the changes, equals torch bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubsync.kernels import bits
from hubsync.kernels.bits import bits_of

SPECIAL = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000]
PATTERNS = st.one_of(
    st.sampled_from([pattern | sign for pattern in SPECIAL for sign in (0, 1 << 31)]), st.integers(0, 2**32 - 1)
)


def is_nan(pattern: int) -> bool:
    return pattern & 0x7FFFFFFF > 0x7F800000


@given(st.lists(PATTERNS.filter(lambda pattern: not is_nan(pattern)), max_size=70), st.integers(1, 200), st.data())
def test_rounding_equals_torch_bit_for_bit(patterns: list[int], repeats: int, data: st.DataObject) -> None:
    values = np.tile(np.array(patterns, np.uint32), repeats)
    expected = bits_of(torch.from_numpy(values.view(np.float32)).bfloat16())
    out = np.empty(len(values), np.uint16)
    assert bits.round_into(out, values)
    assert np.array_equal(out, expected)
    old = expected.copy()
    at = sorted(data.draw(st.sets(st.integers(0, max(0, len(old) - 1)), max_size=9))) if len(old) else []
    old[at] ^= 1
    found = bits.rounded_changes(values, old)
    assert found is not None
    assert found[0].tolist() == at
    assert found[1].tolist() == expected[at].tolist()


def test_all_elements_may_change() -> None:
    values = np.full(100_001, 0x3F800000, np.uint32)
    found = bits.rounded_changes(values, np.zeros(len(values), np.uint16))
    assert found is not None
    assert np.array_equal(found[0], np.arange(len(values)))
    assert set(found[1].tolist()) == {0x3F80}


@given(st.integers(0, 9999), st.integers(0x7F800001, 0x7FFFFFFF), st.booleans())
def test_blocks_with_nan_are_left_to_torch(at: int, pattern: int, negative: bool) -> None:
    values = np.full(10_000, 0x7F800000, np.uint32)
    values[at] = pattern | negative << 31
    assert not bits.round_into(np.empty(len(values), np.uint16), values)
    assert bits.rounded_changes(values, np.zeros(len(values), np.uint16)) is None
