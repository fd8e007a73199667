"""Changes are a group: they compose by adding and invert by negating. New values replace what was before."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync.errors import FormatError
from hubsync.format.patch import TensorDelta, TensorValues, absolute, changed, changes_of, check, compose, invert
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import UNSIGNED, find_changes

compiling = settings(deadline=None)  # the first example of a test may compile a kernel

TABLE = TensorTable([TensorSpec("a", (5, 7), "BF16"), TensorSpec("b", (33,), "F8_E4M3"), TensorSpec("c", (9,), "F32")])


@st.composite
def views(draw):
    """Patterns of every tensor, with few distinct values, so that elements often return to an earlier value."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    return [rng.choice([0, 1, (1 << s.width) - 1], s.numel).astype(UNSIGNED[s.width]) for s in TABLE]


def between(old, new):
    found = [TensorDelta(*find_changes(a, b)) for a, b in zip(old, new, strict=True)]
    return {index: delta for index, delta in enumerate(found) if len(delta)}


def applied(view, patch):
    out = [bits.copy() for bits in view]
    for index, delta in patch.items():
        indices, before, after = changes_of(delta, out[index])
        assert np.array_equal(before, out[index][indices])
        out[index][indices] = after
    return out


@compiling
@given(views(), views(), views())
def test_composing_two_steps_is_the_step_over_both(a, b, c):
    assert compose(between(a, b), between(b, c)) == between(a, c)


@st.composite
def chains(draw, links=3):
    """Views, and patches from each to the next, in which any tensor may have new values instead of changes."""
    sequence = [draw(views()) for _ in range(links + 1)]
    patches = []
    for old, new in itertools.pairwise(sequence):
        patch = between(old, new)
        for index in draw(st.sets(st.integers(0, len(TABLE) - 1))):
            patch[index] = TensorValues(new[index])
        patches.append(patch)
    return sequence, patches


@compiling
@given(chains())
def test_patches_with_new_values_compose_to_the_patch_over_all_of_them(chain):
    sequence, (x, y, z) = chain
    for whole in (compose(compose(x, y), z), compose(x, compose(y, z))):
        check(TABLE, whole)
        assert all(np.array_equal(a, b) for a, b in zip(applied(sequence[0], whole), sequence[3], strict=True))
        for index in range(len(TABLE)):
            has_values = any(isinstance(patch.get(index), TensorValues) for patch in (x, y, z))
            assert isinstance(whole.get(index), TensorValues) == has_values, "after anything, absolute is absolute"
    assert compose(x, {}) == compose({}, x) == x


@compiling
@given(chains(1), views())
def test_new_values_lead_to_the_same_weights_from_any_weights(chain, other):
    (_, new), (patch,) = chain
    for index, bits in enumerate(applied(other, patch)):
        if isinstance(patch.get(index), TensorValues):
            assert np.array_equal(bits, new[index])


def test_new_values_cannot_be_undone():
    values = {1: TensorValues(np.zeros(33, np.uint8))}
    assert (absolute(values), changed(values)) == (1, 33)
    with pytest.raises(FormatError, match="cannot be undone"):
        invert(values)


@pytest.mark.parametrize("patterns", [np.zeros(32, np.uint8), np.zeros(33, np.int8), np.zeros((3, 11), np.uint8)])
def test_new_values_of_another_shape_or_type_are_refused(patterns):
    with pytest.raises(FormatError, match="needs 33 new values of 8 bits"):
        check(TABLE, {1: TensorValues(patterns)})


@compiling
@given(views(), views())
def test_the_inverse_undoes(a, b):
    patch = between(a, b)
    check(TABLE, patch)
    assert invert(patch) == between(b, a)
    assert compose(patch, invert(patch)) == {}
    assert all(np.array_equal(x, y) for x, y in zip(applied(b, invert(patch)), a, strict=True))


@compiling
@given(views(), views(), views(), views())
def test_composing_is_associative_and_has_a_neutral_element(a, b, c, d):
    x, y, z = between(a, b), between(b, c), between(c, d)
    assert compose(compose(x, y), z) == compose(x, compose(y, z))
    assert compose(x, {}) == compose({}, x) == x


def test_the_most_negative_step_is_its_own_inverse():
    patch = {1: TensorDelta(np.array([3]), np.array([-128], np.int8))}
    assert invert(patch) == patch
    assert compose(patch, patch) == {}


def test_changed_counts_elements():
    patch = {
        0: TensorDelta(np.array([3, 4]), np.array([1, -1], np.int16)),
        2: TensorDelta(np.array([0]), np.array([5], np.int32)),
    }
    assert changed(patch) == 3
    assert changed({}) == 0


def test_adding_differences_of_two_widths_is_refused():
    narrow = {0: TensorDelta(np.array([3]), np.array([1], np.int8))}
    wide = {0: TensorDelta(np.array([3]), np.array([1], np.int16))}
    with pytest.raises(FormatError, match="cannot add"):
        compose(narrow, wide)


@pytest.mark.parametrize(
    ("index", "indices", "diffs"),
    [
        pytest.param(3, np.array([0]), np.array([1], np.int16), id="no such tensor"),
        pytest.param(-1, np.array([0]), np.array([1], np.int32), id="negative tensor"),
        pytest.param(0, np.array([0], np.int32), np.array([1], np.int16), id="index dtype"),
        pytest.param(0, np.array([0]), np.array([1], np.int32), id="difference dtype"),
        pytest.param(0, np.array([0, 1]), np.array([1], np.int16), id="lengths"),
        pytest.param(0, np.zeros(0, np.int64), np.zeros(0, np.int16), id="empty entry"),
        pytest.param(0, np.array([35]), np.array([1], np.int16), id="outside"),
        pytest.param(0, np.array([-1]), np.array([1], np.int16), id="negative"),
        pytest.param(0, np.array([2, 2]), np.array([1, 1], np.int16), id="twice"),
        pytest.param(0, np.array([2, 1]), np.array([1, 1], np.int16), id="descending"),
        pytest.param(0, np.array([2]), np.array([0], np.int16), id="zero difference"),
    ],
)
def test_unsound_patches_are_refused(index, indices, diffs):
    with pytest.raises(FormatError, match="patch:"):
        check(TABLE, {index: TensorDelta(indices, diffs)})
