"""Bit patterns: the order of numbers, the group of differences, and finding changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hubsync.format.digest import digest_at, digest_range
from hubsync.format.table import WIDTHS
from hubsync.kernels.bits import (
    SIGNED,
    TORCH_DTYPES,
    UNSIGNED,
    advance,
    bits_of,
    difference,
    dtype_code,
    find_changes,
    ordered,
    unordered,
)

compiling = settings(deadline=None)  # the first example of a test may compile a kernel

EVERY_PATTERN = {width: np.arange(1 << width).astype(UNSIGNED[width]) for width in (8, 16)}


def patterns(width, size=None):
    return hnp.arrays(UNSIGNED[width], st.integers(0, 300) if size is None else size)


@pytest.mark.parametrize("width", [8, 16])
def test_ordered_is_a_bijection_on_every_pattern(width):
    bits = EVERY_PATTERN[width]
    assert len(np.unique(ordered(bits))) == len(bits)
    assert np.array_equal(unordered(ordered(bits)), bits)


@given(patterns(32))
def test_ordered_is_inverted_for_32_bits(bits):
    assert np.array_equal(unordered(ordered(bits)), bits)


@pytest.mark.parametrize("code", ["BF16", "F16", "F8_E5M2", "F8_E4M3"])
def test_ordered_follows_the_numbers(code):
    bits = EVERY_PATTERN[WIDTHS[code]]
    values = torch.from_numpy(bits.view(SIGNED[WIDTHS[code]])).view(TORCH_DTYPES[code]).float().numpy()
    finite = np.isfinite(values)
    by_rank = values[finite][np.argsort(ordered(bits[finite]))]
    assert (np.diff(by_rank) >= 0).all()


def test_neighbouring_numbers_are_one_step_apart_also_across_zero():
    numbers = torch.tensor([-1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0078125, -1.0078125, -1.0]).bfloat16()
    bits = bits_of(numbers)
    assert difference(bits[1:2], bits[2:3]).tolist() == [1]
    assert difference(bits[4:5], bits[5:6]).tolist() == [1]
    assert difference(bits[6:7], bits[7:8]).tolist() == [1]


@compiling
@given(st.sampled_from([8, 16, 32]), st.data())
def test_advance_inverts_difference(width, data):
    old = data.draw(patterns(width))
    new = data.draw(patterns(width, len(old)))
    steps = difference(old, new)
    assert steps.dtype == SIGNED[width]
    assert np.array_equal(advance(old, steps), new)


@compiling
@given(st.sampled_from([8, 16, 32]), st.integers(0, 7), st.data())
def test_find_changes_lists_exactly_the_differing_elements(width, offset, data):
    old = data.draw(patterns(width, st.integers(0, 200)))
    new = old.copy()
    if len(old):
        at = data.draw(hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(0, len(old) - 1)))
        new[at] = data.draw(patterns(width, len(at)))
    old, new = old[offset:], new[offset:]  # not aligned to words, and tails of every length
    indices, steps = find_changes(old, new)
    assert indices.dtype == np.int64
    assert np.array_equal(indices, np.flatnonzero(old != new))
    assert np.array_equal(steps, difference(old[indices], new[indices]))


@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
def test_find_changes_across_blocks(density):
    rng = np.random.default_rng(7)
    old = rng.integers(0, 1 << 16, 1_300_003, dtype=np.uint16)
    new = np.where(rng.random(len(old)) < density, old ^ rng.integers(1, 1 << 16, len(old), dtype=np.uint16), old)
    indices, steps = find_changes(old, new)
    assert np.array_equal(indices, np.flatnonzero(old != new))
    assert np.array_equal(advance(old[indices], steps), new[indices])


def test_signed_zero_and_nan_payloads_are_changes():
    old = np.array([0x0000, 0x7FC0, 0x7FC0, 0x3F80], np.uint16)
    new = np.array([0x8000, 0x7FC1, 0x7FC0, 0x3F80], np.uint16)
    assert find_changes(old, new)[0].tolist() == [0, 1]


def test_find_changes_refuses_incompatible_arrays():
    with pytest.raises(ValueError, match="cannot compare"):
        find_changes(np.zeros(3, np.uint16), np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match="cannot compare"):
        find_changes(np.zeros(4, np.uint16), np.zeros(4, np.uint32))


@pytest.mark.parametrize("code", WIDTHS)
def test_bits_are_a_view_of_the_tensor(code):
    tensor = torch.ones(2, 3).to(TORCH_DTYPES[code])
    bits = bits_of(tensor)
    assert dtype_code(tensor.dtype) == code
    assert bits.dtype == UNSIGNED[WIDTHS[code]]
    assert bits.shape == (6,)
    bits[:] = 0
    assert not tensor.float().any()


def test_bits_of_refuses_tensors_that_need_a_copy_or_conversion():
    with pytest.raises(ValueError, match="contiguous"):
        bits_of(torch.ones(2, 3).bfloat16().t())
    with pytest.raises(ValueError, match="cannot be synced"):
        bits_of(torch.ones(2, dtype=torch.int64))


def test_several_threads_find_the_same_changes(set_threads):
    set_threads(3)
    rng = np.random.default_rng(0)
    old = rng.integers(0, 1 << 16, 3 * (1 << 21) + 77).astype(np.uint16)
    new = old.copy()
    new[rng.integers(0, len(new), 5000)] += 1
    indices, diffs = find_changes(old, new)
    expected = np.flatnonzero(old != new)
    assert np.array_equal(indices, expected)
    assert np.array_equal(diffs, difference(old[expected], new[expected]))


def test_several_threads_give_the_same_digest(set_threads):
    set_threads(3)
    bits = np.random.default_rng(1).integers(0, 1 << 16, 3 * (1 << 21) + 77).astype(np.uint16)
    assert digest_range(5, bits, start=11) == digest_at(5, np.arange(11, 11 + len(bits)), bits)
