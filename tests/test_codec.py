"""The codec of one tensor: exact at every width, shape and density, small, and deaf to hostile input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync.bits import SIGNED
from hubsync.codec import Grid, decode_tensor, encode_tensor
from hubsync.errors import FormatError
from hubsync.patch import TensorDelta, check
from hubsync.table import TensorSpec, TensorTable

compiling = settings(deadline=None)  # the first example of a test may compile a kernel

DTYPES = {8: "F8_E4M3", 16: "BF16", 32: "F32"}
DENSE, CODED = 0, 1
CHANGES, EXCEPTIONS, MAGNITUDE_BITS, UNARY_BITS = range(4)


def steps(rng, count, width, kind):
    """Non-zero differences: all +-1, mostly small with a heavy tail, or anything the width can hold."""
    limit = 1 << (width - 1)
    if kind == "ones":
        return rng.choice([-1, 1], count).astype(SIGNED[width])
    if kind == "tailed":
        magnitudes = np.minimum(np.floor(rng.pareto(1.0, count)) + 1, limit - 1)
        return (magnitudes * rng.choice([-1, 1], count)).astype(SIGNED[width])
    values = rng.integers(-limit, limit, count)
    return np.where(values == 0, -limit, values).astype(SIGNED[width])


def delta_of(spec, density, kind, seed=0):
    rng = np.random.default_rng(seed)
    indices = np.flatnonzero(rng.random(spec.numel) < density)
    if len(indices) == 0:
        indices = np.array([int(rng.integers(spec.numel))])
    return TensorDelta(indices, steps(rng, len(indices), spec.width, kind))


@st.composite
def cases(draw):
    """A tensor, a delta of it, and a grid: the default one or any other."""
    shape = tuple(draw(st.lists(st.integers(1, 24), max_size=3)))
    spec = TensorSpec("w", shape, DTYPES[draw(st.sampled_from([8, 16, 32]))])
    density = draw(st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0]))
    kind = draw(st.sampled_from(["ones", "tailed", "any"]))
    rows, cols = spec.matrix
    grid = Grid(rows, cols, draw(st.integers(1, rows)), draw(st.integers(1, cols)))
    return spec, delta_of(spec, density, kind, draw(st.integers(0, 1 << 32))), draw(st.sampled_from([None, grid]))


def decoded(spec, coded):
    delta, chunks, size = decode_tensor(spec, coded.record, coded.chunks, coded.payload)
    assert (chunks, size) == (len(coded.chunks), len(coded.payload))
    return delta


def is_dense(coded):
    return len(coded.chunks) == 0


# --- round trips --------------------------------------------------------------------------------------


@compiling
@given(cases())
def test_any_delta_round_trips_in_any_grid(case):
    spec, delta, grid = case
    coded = encode_tensor(spec, delta, grid)
    assert decoded(spec, coded) == delta
    assert len(coded.payload) <= spec.nbytes


@pytest.mark.parametrize("shape", [(1,), (3_000_001,), (3, 1_500_000), (2100, 1000), (2, 3, 200_000)])
@pytest.mark.parametrize("density", [0.0001, 0.01, 0.6])
def test_tensors_of_several_chunks_round_trip(shape, density):
    spec = TensorSpec("w", shape, "BF16")
    delta = delta_of(spec, density, "tailed")
    assert decoded(spec, encode_tensor(spec, delta)) == delta


@pytest.mark.parametrize("width", [8, 16, 32])
def test_the_extreme_differences_round_trip(width):
    spec = TensorSpec("w", (100_000,), DTYPES[width])
    info = np.iinfo(SIGNED[width])
    delta = TensorDelta(np.array([0, 5, 99_998, 99_999]), np.array([info.min, info.max, -info.max, 1], SIGNED[width]))
    coded = encode_tensor(spec, delta)
    assert not is_dense(coded)
    assert decoded(spec, coded) == delta


def test_a_chunk_without_changes_costs_a_row_and_no_payload():
    spec = TensorSpec("w", (4_000_000,), "BF16")
    coded = encode_tensor(spec, TensorDelta(np.array([3_999_999]), np.array([1], np.int16)))
    assert coded.chunks[:, CHANGES].tolist() == [0, 0, 0, 1]
    assert len(coded.payload) <= 4


@pytest.mark.parametrize(
    ("kind", "density", "dense"), [("ones", 1.0, False), ("tailed", 1.0, False), ("any", 1.0, True)]
)
def test_the_dense_mode_is_used_only_where_coding_would_be_larger(kind, density, dense):
    spec = TensorSpec("w", (1000, 100), "BF16")
    assert is_dense(encode_tensor(spec, delta_of(spec, density, kind))) == dense


def test_steady_state_deltas_are_near_their_entropy():
    """1 % changed, 90 % of the differences +-1: within 3 % of the entropy of positions, signs and magnitudes."""
    rng = np.random.default_rng(1)
    spec = TensorSpec("w", (4096, 1024), "BF16")
    indices = np.flatnonzero(rng.random(spec.numel) < 0.01)
    magnitudes = np.where(rng.random(len(indices)) < 0.9, 1, 1 + rng.geometric(0.4, len(indices)))
    delta = TensorDelta(indices, (magnitudes * rng.choice([-1, 1], len(indices))).astype(np.int16))
    density, shares = len(indices) / spec.numel, np.bincount(magnitudes) / len(indices)
    position = -np.log2(density) - (1 - density) / density * np.log2(1 - density)
    magnitude = -sum(p * np.log2(p) for p in shares if p)
    assert encode_tensor(spec, delta).nbytes * 8 / len(indices) < 1.03 * (position + 1 + magnitude)


def test_the_worked_example_of_the_specification():
    """docs/FORMAT.md, "Example": these numbers are the format and may not change within hubsync-delta/1."""
    spec = TensorSpec("w", (4, 16), "BF16")
    delta = TensorDelta(np.array([2, 9, 30, 31, 57]), np.array([1, -1, 5, -1, 1], np.int16))
    coded = encode_tensor(spec, delta)
    assert coded.record.tolist() == [0, 4, 16, 0x02000301]
    assert coded.chunks.tolist() == [[5, 1, 2, 14]]
    assert coded.payload.tolist() == [50, 17, 245, 140, 12]
    assert decoded(spec, coded) == delta


# --- grids --------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_places_number_the_elements_chunk_by_chunk(rows, cols, data):
    grid = Grid(rows, cols, data.draw(st.integers(1, rows)), data.draw(st.integers(1, cols)))
    chunks = [
        np.arange(rows * cols).reshape(rows, cols)[r : r + grid.chunk_rows, c : c + grid.chunk_cols].reshape(-1)
        for r in range(0, rows, grid.chunk_rows)
        for c in range(0, cols, grid.chunk_cols)
    ]
    in_order = np.concatenate(chunks)
    assert len(chunks) == grid.count
    assert np.array_equal(np.diff(grid.starts), [len(chunk) for chunk in chunks])
    assert np.array_equal(grid.places(in_order), np.arange(rows * cols))
    assert np.array_equal(grid.indices(np.arange(rows * cols)), in_order)


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 24))
def test_default_chunks_are_runs_of_about_a_million_elements(rows, cols):
    grid = Grid.default(rows, cols)
    assert grid.contiguous
    assert grid.chunk_rows * grid.chunk_cols <= 1 << 20
    assert grid.chunk_rows == rows or grid.chunk_cols == 1 << 20 or (grid.chunk_rows + 1) * cols > 1 << 20


# --- hostile input ------------------------------------------------------------------------------------

SPEC = TensorSpec("w", (64, 100), "BF16")
TABLE = TensorTable([SPEC])


def coded_with(mode):
    kind, density = {CODED: ("tailed", 0.1), DENSE: ("any", 1.0)}[mode]
    delta = delta_of(SPEC, density, kind)
    coded = encode_tensor(SPEC, delta, Grid(64, 100, 16, 100))
    assert coded.record[-1] & 0xFF == mode
    return coded


@settings(compiling, max_examples=300)
@given(st.sampled_from([DENSE, CODED]), st.data())
def test_damaged_streams_are_refused_or_give_a_sound_patch(mode, data):
    coded = coded_with(mode)
    for _ in range(data.draw(st.integers(1, 4))):
        array = data.draw(st.sampled_from([a for a in (coded.record, coded.chunks, coded.payload) if a.size]))
        at = data.draw(st.integers(0, array.size - 1))
        array.reshape(-1)[at] = data.draw(st.integers(0, np.iinfo(array.dtype).max))
    try:
        delta, _, _ = decode_tensor(SPEC, coded.record, coded.chunks, coded.payload)
    except FormatError:
        return
    check(TABLE, {0: delta})


@compiling
@given(st.binary(min_size=1, max_size=60), st.integers(0, 40), st.integers(0, 10), st.integers(0, 8), st.data())
def test_random_bits_are_refused_or_give_a_sound_patch(payload, changes, exceptions, k, data):
    """Rows that fit the payload, so that the bits themselves are decoded."""
    rest = max(8 * len(payload) - changes * (k + 1) - exceptions * 2, 0)
    unary = data.draw(st.integers(0, rest))
    record = np.array([0, 64, 100, CODED | k << 8 | 2 << 16 | 1 << 24], np.uint32)
    chunks = np.array([[changes, exceptions, rest - unary, unary]], np.uint32)
    try:
        delta, _, _ = decode_tensor(SPEC, record, chunks, np.frombuffer(payload, np.uint8))
    except FormatError:
        return
    check(TABLE, {0: delta})


def damaged(part, at, value):
    coded = coded_with(CODED)
    getattr(coded, part)[at] = value
    return coded


@pytest.mark.parametrize(
    ("part", "at", "value", "message"),
    [
        pytest.param("record", 1, 0, "do not fit", id="no rows"),
        pytest.param("record", 1, 65, "do not fit", id="rows beyond the tensor"),
        pytest.param("record", 2, 101, "do not fit", id="columns beyond the tensor"),
        pytest.param("record", 2, 1, "chunk rows are needed", id="another grid"),
        pytest.param("record", 3, 2, "unknown mode", id="mode"),
        pytest.param("record", 3, CODED | 32 << 8, "impossible code", id="parameter"),
        pytest.param("chunks", (0, CHANGES), 1601, "impossible counts", id="more changes than elements"),
        pytest.param("chunks", (0, EXCEPTIONS), 1600, "impossible counts", id="more exceptions than changes"),
        pytest.param("chunks", (0, UNARY_BITS), 0, "impossible counts", id="fewer unary numbers than values"),
        pytest.param("chunks", (0, UNARY_BITS), 0xFFFFFFFF, "payload is missing", id="more bits than there are"),
        pytest.param(
            "chunks", (0, MAGNITUDE_BITS), 0xFFFFFFFF, "payload is missing", id="more magnitude bits than there are"
        ),
        pytest.param("payload", slice(None), 0, "unary stream ends", id="all zeros"),
        pytest.param("payload", slice(None), 255, "bits left over|padding|does not fit|outside", id="all ones"),
    ],
)
def test_what_is_wrong_is_said(part, at, value, message):
    with pytest.raises(FormatError, match=message):
        decoded(SPEC, damaged(part, at, value))


def test_a_dense_payload_must_have_the_size_of_the_tensor_and_a_change():
    coded = coded_with(DENSE)
    with pytest.raises(FormatError, match="payload bytes are needed"):
        decode_tensor(SPEC, coded.record, coded.chunks, coded.payload[:-2])
    coded.payload[:] = 0
    with pytest.raises(FormatError, match="no changes"):
        decoded(SPEC, coded)


def test_a_dense_record_says_nothing_about_chunks():
    coded = coded_with(DENSE)
    coded.record[1] = 1
    with pytest.raises(FormatError, match="impossible code"):
        decoded(SPEC, coded)


def test_a_record_without_changes_is_refused():
    record, chunks = np.array([0, 64, 100, CODED], np.uint32), np.zeros((1, 4), np.uint32)
    with pytest.raises(FormatError, match="no changes"):
        decode_tensor(SPEC, record, chunks, np.zeros(0, np.uint8))
