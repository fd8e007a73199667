"""Digests: a sum that detects every change, adds up over shards, and can be updated from a delta."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hubsync.errors import FormatError
from hubsync.format.digest import (
    Digest,
    _torch_sums,
    digest_at,
    digest_change,
    digest_range,
    digest_torch,
    digest_view,
    tensor_seed,
)
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import SIGNED, UNSIGNED, bits_of

compiling = settings(deadline=None)  # the first example of a test may compile a kernel

SEED = tensor_seed("model.layers.0.mlp.up_proj.weight")
MASK = (1 << 64) - 1

widths = st.sampled_from([8, 16, 32])
digests = st.builds(Digest, st.integers(0, MASK), st.integers(0, MASK))


def draw_bits(data, width, low=0, high=200):
    return data.draw(hnp.arrays(UNSIGNED[width], st.integers(low, high)))


def as_torch(bits):
    return torch.from_numpy(bits.view(SIGNED[8 * bits.itemsize]) if bits.itemsize > 1 else bits)


def factors(seed, number):
    """Sums of a block in the two lanes, in Python integers."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    a = z ^ z >> 31
    z = a * 0xFF51AFD7ED558CCD & MASK
    return a | 1, (z ^ z >> 33) | 1


def reference(seed, index, pattern):
    """The definition, in Python integers."""
    block, place = factors(seed, index >> 11), factors(0, index & 2047)
    y = pattern + 1
    return Digest(*(y * (2 * y + 1) * block[lane] * place[lane] & MASK for lane in range(2)))


@compiling
@given(widths, st.integers(0, 1 << 40), st.data())
def test_the_digest_is_the_sum_of_the_definition(width, start, data):
    bits = draw_bits(data, width, high=40)
    expected = sum((reference(SEED, start + i, int(b)) for i, b in enumerate(bits)), Digest())
    assert digest_range(SEED, bits, start) == expected


@pytest.mark.parametrize("start", [0, 5, 2047, 2048, 3 * 2048 - 1])
def test_whole_blocks_and_their_ends_are_counted_once(start):
    bits = np.random.default_rng(start).integers(0, 1 << 16, 5 * 2048 + 77, dtype=np.uint16)
    expected = sum((reference(SEED, start + i, int(b)) for i, b in enumerate(bits)), Digest())
    assert digest_range(SEED, bits, start) == expected
    assert digest_at(SEED, np.arange(start, start + len(bits)), bits) == expected
    assert _torch_sums(SEED, as_torch(bits), start, None) == expected


def test_the_definition_is_frozen():
    """Digests are stored in buckets: this value may never change within format hubsync/1."""
    assert tensor_seed("a") == 0x2F42665B399EF840
    assert digest_range(tensor_seed("a"), np.arange(5, dtype=np.uint16)).hex == "a095f73c355ec7edb76a088a60c161f7"


@pytest.mark.parametrize("index", [0, 1, 12345, (1 << 40) - 1])
def test_every_pattern_of_one_element_has_its_own_value_in_both_lanes(index):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = [reference(SEED, index, int(b)) for b in bits]
    assert len({value.a for value in values}) == len({value.b for value in values}) == len(bits)


@compiling
@given(widths, st.data())
def test_a_single_change_changes_both_lanes(width, data):
    bits = draw_bits(data, width, low=1)
    at = data.draw(st.integers(0, len(bits) - 1))
    changed = bits.copy()
    changed[at] ^= UNSIGNED[width](data.draw(st.integers(1, (1 << width) - 1)))
    growth = digest_range(SEED, changed) - digest_range(SEED, bits)
    assert growth.a != 0
    assert growth.b != 0


@pytest.mark.parametrize("lane", ["a", "b"])
def test_sums_of_opposite_steps_have_no_pattern(lane):
    """The most common wrong delta swaps +1 and -1 steps. Its sums must look random."""
    rng = np.random.default_rng(5)
    tops = []
    for _ in range(4096):
        indices = np.sort(rng.choice(1 << 20, 2, replace=False)).astype(np.int64)
        old = rng.integers(1, (1 << 16) - 1, 2, dtype=np.uint16)
        new = old + np.array([1, 0xFFFF], np.uint16)
        tops.append(getattr(digest_change(SEED, indices, old, new), lane) >> 60)
    counts = np.bincount(tops, minlength=16)
    assert counts.min() > 180  # 256 expected for each of 16 values
    assert counts.max() < 340


def test_swaps_and_opposite_steps_do_not_cancel():
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 1 << 16, 4096, dtype=np.uint16)
    whole, seen = digest_range(SEED, bits), set()
    for _ in range(2000):
        i, j = rng.choice(len(bits), 2, replace=False)
        other = bits.copy()
        if bits[i] != bits[j] and rng.random() < 0.5:
            other[i], other[j] = bits[j], bits[i]
        else:
            other[i], other[j] = bits[i] + np.uint16(1), bits[j] - np.uint16(1)
        seen.add(digest_range(SEED, other))
    assert whole not in seen


@compiling
@given(widths, st.data())
def test_shards_add_up(width, data):
    bits = draw_bits(data, width)
    cut = data.draw(st.integers(0, len(bits)))
    assert digest_range(SEED, bits[:cut]) + digest_range(SEED, bits[cut:], cut) == digest_range(SEED, bits)


@compiling
@given(widths, st.data())
def test_scattered_elements_add_up_in_any_order(width, data):
    bits = draw_bits(data, width)
    order = np.array(data.draw(st.permutations(range(len(bits)))), np.int64)
    assert digest_at(SEED, order, bits[order]) == digest_range(SEED, bits)


@compiling
@given(widths, st.data())
def test_the_new_digest_follows_from_the_delta(width, data):
    old = draw_bits(data, width, low=1)
    indices = np.unique(data.draw(hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(0, len(old) - 1))))
    new = old.copy()
    new[indices] = data.draw(hnp.arrays(old.dtype, len(indices)))
    change = digest_change(SEED, indices, old[indices], new[indices])
    assert digest_range(SEED, old) + change == digest_range(SEED, new)


@compiling
@given(st.integers(0, 1 << 40), st.integers(0, 60_000), st.integers(1, 2000), st.integers(-1000, 1000))
def test_a_step_from_a_wrong_pattern_gives_another_digest(index, pattern, damage, step):
    """So applying a delta to damaged weights is detected before a digest of all weights is computed."""
    if step == 0:
        return
    at = np.array([index])

    def change(old):
        return digest_change(SEED, at, np.array([old], np.uint16), np.array([old + step], np.int64).astype(np.uint16))

    right, wrong = change(pattern + 1000), change(pattern + 1000 + damage)
    assert right.a != wrong.a
    assert right.b != wrong.b


@compiling
@given(widths, st.integers(0, 1 << 40), st.data())
def test_torch_operations_give_the_same_values(width, start, data):
    bits = draw_bits(data, width)
    indices = np.arange(len(bits), dtype=np.int64)[::-1].copy() + start
    assert _torch_sums(SEED, as_torch(bits), start, None) == digest_range(SEED, bits, start)
    assert _torch_sums(SEED, as_torch(bits), 0, torch.from_numpy(indices)) == digest_at(SEED, indices, bits)
    assert digest_torch(SEED, as_torch(bits), start) == digest_range(SEED, bits, start)
    assert digest_torch(SEED, as_torch(bits), indices=torch.from_numpy(indices)) == digest_at(SEED, indices, bits)


def test_torch_chunks_and_strides():
    bits = np.random.default_rng(5).integers(0, 1 << 16, (1100, 1000), dtype=np.uint16)
    assert _torch_sums(SEED, as_torch(bits).reshape(-1), 0, None) == digest_range(SEED, bits.reshape(-1))
    assert digest_torch(SEED, as_torch(bits).t()) == digest_range(SEED, np.ascontiguousarray(bits.T).reshape(-1))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="do not go with"):
        digest_at(SEED, np.arange(3), np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match="do not go with"):
        digest_torch(SEED, torch.zeros(4, dtype=torch.int16), indices=torch.arange(3))


@given(digests, digests)
def test_digests_are_a_group_and_print(x, y):
    assert x + y - y == x
    assert x - x == Digest()
    assert Digest.parse(x.hex) == x
    assert len(x.hex) == 32


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 32 + "\n"])
def test_malformed_digests_are_refused(text):
    with pytest.raises(FormatError, match="32 hex digits"):
        Digest.parse(text)


def test_a_view_is_the_sum_of_its_tensors_and_names_matter():
    table = TensorTable([TensorSpec("a", (4, 3), "BF16"), TensorSpec("b", (), "F32"), TensorSpec("c", (0,), "F16")])
    view = {"a": torch.randn(4, 3).bfloat16(), "b": torch.tensor(2.5), "c": torch.zeros(0).half()}
    parts = [digest_range(tensor_seed(name), bits_of(tensor)) for name, tensor in view.items()]
    assert digest_view(table, view) == parts[0] + parts[1] + parts[2]
    assert tensor_seed("a") != tensor_seed("b")
