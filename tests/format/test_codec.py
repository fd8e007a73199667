"""The codec: exact at every width, shape, density and level, near the entropy, and safe against hostile input."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync.errors import FormatError
from hubsync.format.codec import Grid, decode, encode
from hubsync.format.patch import TensorDelta, check
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import SIGNED, UNSIGNED
from hubsync.kernels.classes import ClassMap

compiling = settings(deadline=None)  # the first example of a test may compile a kernel

DTYPES = {8: "F8_E4M3", 16: "BF16", 32: "F32"}
LEVELS = pytest.mark.parametrize("level", ["fast", "compact"])


class Old:
    """Old weights of one tensor; `held` gives the columns that this process holds."""

    def __init__(self, spec, bits, held=slice(None)):
        self.bits = bits.reshape(spec.matrix)
        self.held = range(spec.matrix[1])[held]

    def rectangle(self, index, rows, cols):
        assert index == 0
        inside = [col in self.held for col in (cols.start, cols.stop - 1)]
        assert inside[0] == inside[1], "a slice of columns does not consist of whole chunks"
        return self.bits[rows, cols] if inside[0] else None


def weights(spec, kind, seed=0):
    """Patterns: anything, normally distributed numbers, or zeros."""
    rng = np.random.default_rng(seed)
    if kind == "zeros":
        return np.zeros(spec.numel, UNSIGNED[spec.width])
    if kind == "any":
        return rng.integers(0, 1 << spec.width, spec.numel, dtype=np.uint64).astype(UNSIGNED[spec.width])
    normal = (rng.standard_normal(spec.numel, np.float32) * 0.02).view(np.uint32)
    return (normal >> (32 - spec.width)).astype(UNSIGNED[spec.width])


def steps(rng, count, width, kind):
    """Non-zero differences: all +-1, mostly small with a heavy tail, around 9, or anything the width can hold."""
    limit = 1 << (width - 1)
    if kind == "ones":
        return rng.choice([-1, 1], count).astype(SIGNED[width])
    if kind in ("tailed", "nines"):
        magnitudes = np.floor(rng.pareto(1.0, count)) + 1 if kind == "tailed" else rng.integers(8, 11, count)
        return (np.minimum(magnitudes, limit - 1) * rng.choice([-1, 1], count)).astype(SIGNED[width])
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
    """A tensor, a delta of it, old weights (None: fast), and a grid: the default one or any other."""
    shape = tuple(draw(st.lists(st.integers(1, 24), max_size=3)))
    spec = TensorSpec("w", shape, DTYPES[draw(st.sampled_from([8, 16, 32]))])
    density = draw(st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0]))
    kind = draw(st.sampled_from(["ones", "tailed", "nines", "any"]))
    seed = draw(st.integers(0, 1 << 32))
    bits = draw(st.sampled_from([None, *(weights(spec, kind, seed) for kind in ("any", "normal", "zeros"))]))
    rows, cols = spec.matrix
    grid = Grid(rows, cols, draw(st.integers(1, rows)), draw(st.integers(1, cols)))
    return spec, delta_of(spec, density, kind, seed), bits, draw(st.sampled_from([None, grid]))


def coded_with(spec, delta, bits=None, grid=None):
    old = None if bits is None else Old(spec, bits)
    return encode(TensorTable([spec]), {0: delta}, old, grid_of=None if grid is None else lambda rows, cols: grid)


def decoded(spec, coded, bits=None, held=slice(None)):
    old, classes = (None, 1) if bits is None else (Old(spec, bits, held), 16)
    table = TensorTable([spec])
    return decode(table, coded.tensors, coded.books, coded.chunks, coded.payload, classes, old)


def is_dense(coded):
    return coded.tensors[0, 3] & 0xFF == 0


# --- round trips --------------------------------------------------------------------------------------


@settings(compiling, max_examples=300)
@given(cases())
def test_any_delta_round_trips_in_any_grid_at_any_level(case):
    spec, delta, bits, grid = case
    coded = coded_with(spec, delta, bits, grid)
    assert decoded(spec, coded, bits) == {0: delta}
    assert decoded(spec, coded, bits)[0].indices.dtype == np.int64
    assert len(coded.payload) <= spec.nbytes


@LEVELS
@pytest.mark.parametrize("shape", [(1,), (3_000_001,), (3, 1_500_000), (2100, 1000), (2, 3, 200_000)])
@pytest.mark.parametrize("density", [0.0001, 0.01, 0.6])
def test_tensors_of_several_chunks_round_trip(shape, density, level):
    spec = TensorSpec("w", shape, "BF16")
    bits = weights(spec, "normal") if level == "compact" else None
    delta = delta_of(spec, density, "tailed")
    assert decoded(spec, coded_with(spec, delta, bits), bits) == {0: delta}


@pytest.mark.parametrize("width", [8, 16, 32])
def test_the_extreme_differences_round_trip(width):
    spec = TensorSpec("w", (100_000,), DTYPES[width])
    info = np.iinfo(SIGNED[width])
    delta = TensorDelta(np.array([0, 5, 99_998, 99_999]), np.array([info.min, info.max, -info.max, 1], SIGNED[width]))
    coded = coded_with(spec, delta)
    assert not is_dense(coded)
    assert decoded(spec, coded) == {0: delta}


def test_a_patch_of_several_tensors_and_dtypes_round_trips_at_both_levels():
    table = TensorTable([TensorSpec(f"{n}.{code}", (40, 50), code) for n in "ab" for code in ("BF16", "F16", "F32")])
    patch = {index: delta_of(table[index], 0.1, "tailed", index) for index in (0, 1, 2, 5)}
    bits = {index: weights(table[index], "normal", index) for index in patch}

    class AllOld:
        def rectangle(self, index, rows, cols):
            return bits[index].reshape(40, 50)[rows, cols]

    for old, classes in ((None, 1), (AllOld(), 16)):
        coded = encode(table, patch, old)
        assert len(coded.books) == 3  # one for each dtype
        assert decode(table, coded.tensors, coded.books, coded.chunks, coded.payload, classes, old) == patch


def test_a_chunk_without_changes_costs_a_bit():
    spec = TensorSpec("w", (4_000_000,), "BF16")
    coded = coded_with(spec, TensorDelta(np.array([3_999_999]), np.array([1], np.int16)))
    assert len(coded.chunks) <= 20
    assert len(coded.payload) <= 4


@pytest.mark.parametrize(
    ("kind", "density", "dense"), [("ones", 1.0, False), ("tailed", 1.0, False), ("any", 1.0, True)]
)
def test_the_dense_mode_is_used_only_where_coding_would_be_larger(kind, density, dense):
    spec = TensorSpec("w", (1000, 100), "BF16")
    assert is_dense(coded_with(spec, delta_of(spec, density, kind))) == dense


def test_threads_give_the_same_bytes(monkeypatch):
    spec = TensorSpec("w", (4096, 1024), "BF16")
    delta, bits = delta_of(spec, 0.01, "tailed"), weights(spec, "normal")
    alone = coded_with(spec, delta, bits)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    together = coded_with(spec, delta, bits)
    assert all(np.array_equal(getattr(alone, n), getattr(together, n)) for n in ("tensors", "books", "chunks"))
    assert np.array_equal(alone.payload, together.payload)
    assert decoded(spec, together, bits) == {0: delta}


# --- sizes --------------------------------------------------------------------------------------------


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
    assert coded_with(spec, delta).nbytes * 8 / len(indices) < 1.03 * (position + 1 + magnitude)


def test_compact_deltas_are_near_their_entropy_given_the_old_exponent():
    """The chance to change halves with every octave: within 3 % of the entropy of positions in classes, and signs."""
    spec = TensorSpec("w", (4096, 1024), "BF16")
    bits = weights(spec, "normal")
    exponents = (bits >> 7 & 0xFF).astype(int)
    chance = np.minimum(1.0, 0.001 * 2.0 ** (122 - exponents))
    rng = np.random.default_rng(1)
    indices = np.flatnonzero(rng.random(spec.numel) < chance)
    delta = TensorDelta(indices, rng.choice([-1, 1], len(indices)).astype(np.int16))
    p = np.clip(chance, 1e-12, 1 - 1e-12)
    floor = (-p * np.log2(p) - (1 - p) * np.log2(1 - p)).sum() + len(indices)
    size = 8 * coded_with(spec, delta, bits).nbytes
    assert size < 1.03 * floor
    assert size < 0.8 * 8 * coded_with(spec, delta).nbytes


def test_a_change_predicted_by_the_exponent_costs_little_more_than_its_sign():
    """As in a first step from a bf16 checkpoint: all small weights move, by a number of steps set by their octave."""
    spec = TensorSpec("w", (1024, 1024), "BF16")
    bits = weights(spec, "normal")
    exponents = (bits >> 7 & 0xFF).astype(int)
    indices = np.flatnonzero(exponents <= 116)
    magnitudes = 2 ** np.minimum(116 - exponents[indices], 6)
    signs = np.random.default_rng(0).choice([-1, 1], len(indices))
    coded = coded_with(spec, TensorDelta(indices, (magnitudes * signs).astype(np.int16)), bits)
    assert 8 * coded.nbytes / len(indices) < 1.1


def test_the_worked_example_of_the_specification():
    """docs/FORMAT.md, "Example": these numbers are the format and may not change within hubsync-delta/1."""
    spec = TensorSpec("w", (4, 16), "BF16")
    delta = TensorDelta(np.array([2, 9, 30, 31, 57]), np.array([1, -1, 5, -1, 1], np.int16))
    coded = coded_with(spec, delta)
    assert decoded(spec, coded) == {0: delta}
    assert coded.tensors.tolist() == [[0, 4, 16, 1]]
    assert coded.books.tolist() == [[0, 1, 0, 1, 3, 1, 0, 255, 255, 255, 255, 255]]
    assert coded.chunks.tobytes().hex(" ") == "bd 03"
    assert coded.payload.tobytes().hex(" ") == "32 11 35 e3 6c"


# --- classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"])
def test_classes_are_octaves_clipped_at_both_ends(dtype):
    spec = TensorSpec("w", (1 << 12,), dtype)
    classes = ClassMap.of(dtype, 4)
    exponents = classes.exponents(weights(spec, "any"))
    fields = {"BF16": 8, "F16": 5, "F32": 8, "F8_E4M3": 4, "F8_E5M2": 5}
    assert exponents.max() == (1 << fields[dtype]) - 1
    assert np.array_equal(classes.table[exponents], np.clip(exponents.astype(int) - 4, 0, 15))


@compiling
@given(st.sampled_from([8, 16, 32]), st.integers(1, 5000), st.floats(0, 1), st.integers(0, 255), st.integers(0, 99))
def test_ranks_number_the_elements_of_each_class_and_places_are_their_inverse(width, count, density, low, seed):
    from hubsync import kernels

    spec = TensorSpec("w", (count,), DTYPES[width])
    bits, classes = weights(spec, "normal", seed), ClassMap.of(spec.dtype, low)
    positions = np.flatnonzero(np.random.default_rng(seed).random(count) < density).astype(np.int32)
    sizes, class_of, ranks = kernels.rank(bits.reshape(1, -1), positions, classes)
    expected = classes.table[classes.exponents(bits)]
    assert np.array_equal(sizes, np.bincount(expected, minlength=16))
    assert np.array_equal(class_of, expected[positions])
    assert ranks.tolist() == [int((expected[:p] == expected[p]).sum()) for p in positions]
    order = np.argsort(class_of, kind="stable")
    diffs = np.arange(1, len(positions) + 1).astype(np.int32)
    counted = kernels.count(bits.reshape(1, -1), classes)
    found, moved = counted.place(ranks[order], diffs[order], np.bincount(class_of, minlength=16))
    assert np.array_equal(found, positions)
    assert np.array_equal(moved, diffs)


# --- grids --------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_positions_number_the_elements_of_each_chunk(rows, cols, data):
    grid = Grid(rows, cols, data.draw(st.integers(1, rows)), data.draw(st.integers(1, cols)))
    flat = np.arange(rows * cols)
    chunks = [flat.reshape(rows, cols)[grid.slices(number)].reshape(-1) for number in range(grid.count)]
    numbers, bounds, order, positions = grid.split(flat)
    assert numbers.tolist() == list(range(grid.count))
    for number, chunk in enumerate(chunks):
        assert np.array_equal(grid.indices(number, np.arange(len(chunk), dtype=np.int32)), chunk)
        assert len(chunk) == grid.elements(number)
        assert np.array_equal(flat[order[bounds[number] : bounds[number + 1]]], chunk)
        assert positions[bounds[number] : bounds[number + 1]].tolist() == list(range(len(chunk)))


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 24))
def test_contiguous_chunks_are_runs_of_about_a_million_elements(rows, cols):
    grid = Grid.contiguous(rows, cols)
    assert grid.ascends
    assert grid.chunk_rows * grid.chunk_cols <= 1 << 20
    assert grid.chunk_rows == rows or grid.chunk_cols == 1 << 20 or (grid.chunk_rows + 1) * cols > 1 << 20


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((4096, 4096), 8),
        ((14336, 4096), 8),
        ((4096, 11008), 8),
        ((151936, 896), 8),
        ((2048, 1024), 4),
        ((1024, 1024), 2),
        ((384, 384), 1),
    ],
)
def test_tiles_follow_the_slices_of_tensor_parallel_ranks(shape, ranks):
    grid = Grid.tiles(*shape)
    for axis, size in enumerate((grid.chunk_rows, grid.chunk_cols)):
        assert shape[axis] // ranks % size == 0
    assert 1 << 16 < grid.chunk_rows * grid.chunk_cols <= 1 << 20


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 24))
def test_tiles_are_never_large_and_never_needlessly_small(rows, cols):
    grid = Grid.tiles(rows, cols)
    assert 1 <= grid.chunk_rows <= rows
    assert 1 <= grid.chunk_cols <= cols
    assert grid.chunk_rows * grid.chunk_cols <= 1 << 20
    assert grid.chunk_rows * grid.chunk_cols >= min(rows * cols, 1 << 17) // 8


def test_a_rank_decodes_the_columns_it_holds():
    spec = TensorSpec("w", (1024, 2048), "BF16")
    bits, delta = weights(spec, "normal"), delta_of(spec, 0.01, "tailed")
    coded = coded_with(spec, delta, bits)
    held = slice(512, 1024)  # the second of four ranks
    mine = (delta.indices % 2048 >= 512) & (delta.indices % 2048 < 1024)
    assert decoded(spec, coded, bits, held) == {0: TensorDelta(delta.indices[mine], delta.diffs[mine])}


# --- hostile input ------------------------------------------------------------------------------------

SPEC = TensorSpec("w", (64, 100), "BF16")
TABLE = TensorTable([SPEC])
BITS = weights(SPEC, "normal")
SMALL = Grid(64, 100, 16, 50)


def example_of(level):
    if level == "dense":
        return coded_with(SPEC, delta_of(SPEC, 1.0, "any"))
    return coded_with(SPEC, delta_of(SPEC, 0.1, "tailed"), BITS if level == "compact" else None, SMALL)


def decoded_or_refused(coded, level):
    try:
        check(TABLE, decoded(SPEC, coded, BITS if level == "compact" else None))
    except FormatError:
        pass


@settings(compiling, max_examples=500)
@given(st.sampled_from(["fast", "compact", "dense"]), st.data())
def test_damaged_arrays_are_refused_or_give_a_sound_patch(level, data):
    coded = example_of(level)
    arrays = [a for a in (coded.tensors, coded.books, coded.chunks, coded.payload) if a.size]
    for _ in range(data.draw(st.integers(1, 4))):
        array = data.draw(st.sampled_from(arrays))
        at = data.draw(st.integers(0, array.size - 1))
        array.reshape(-1)[at] = data.draw(st.integers(0, np.iinfo(array.dtype).max))
    decoded_or_refused(coded, level)


@settings(compiling, max_examples=300)
@given(st.sampled_from(["fast", "compact"]), st.binary(min_size=1, max_size=200), st.binary(min_size=1, max_size=200))
def test_random_rows_and_bits_are_refused_or_give_a_sound_patch(level, chunks, payload):
    coded = example_of(level)
    data = (np.frombuffer(some, np.uint8) for some in (chunks, payload))
    decoded_or_refused(type(coded)(coded.tensors, coded.books, *data), level)


@settings(compiling, max_examples=300)
@given(st.sampled_from(["fast", "compact"]), st.binary(min_size=1, max_size=2000))
def test_random_bits_in_sound_rows_are_refused_or_give_a_sound_patch(level, payload):
    coded = example_of(level)
    coded.payload[: len(payload)] = np.frombuffer(payload, np.uint8)[: len(coded.payload)]
    decoded_or_refused(coded, level)


@settings(compiling, max_examples=100)
@given(st.integers(0, 1 << 32))
def test_other_old_weights_are_refused_or_give_a_sound_patch(seed):
    coded = example_of("compact")
    try:
        check(TABLE, decoded(SPEC, coded, weights(SPEC, "any", seed)))
    except FormatError:
        pass


@LEVELS
def test_memory_is_bounded_by_the_bytes_of_the_part(level):
    """A giant tensor, and rows that claim as much as they can."""
    spec = TensorSpec("w", (1 << 20, 1 << 20), "BF16")
    coded = example_of(level)
    coded.tensors[:] = [0, 1 << 10, 1 << 10, 1]
    chunks = np.full(1 << 12, 0xFF, np.uint8)
    tracemalloc.start()
    with pytest.raises(FormatError):
        decode(TensorTable([spec]), coded.tensors, coded.books, chunks, coded.payload, 1 if level == "fast" else 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize(
    ("array", "at", "value", "message"),
    [
        pytest.param("tensors", (0, 1), 0, "do not fit", id="no rows"),
        pytest.param("tensors", (0, 1), 65, "do not fit", id="rows beyond the tensor"),
        pytest.param("tensors", (0, 2), 101, "do not fit", id="columns beyond the tensor"),
        pytest.param("tensors", (0, 2), 1, "chunk rows", id="another grid"),
        pytest.param("tensors", (0, 3), 2, "unknown mode", id="mode"),
        pytest.param("tensors", (0, 3), 1 | 1 << 8, "code book 1 of 1", id="book"),
        pytest.param("tensors", (0, 0), 1, "not in the table", id="tensor"),
        pytest.param("books", (0, 1), 32, "above 31", id="order"),
        pytest.param("books", (0, 4), 32, "above 31", id="parameter of gaps"),
        pytest.param("books", (0, 5), 0, "usual magnitude of 0", id="usual magnitude"),
        pytest.param("books", (0, 7), 128 | 32, "above 31", id="parameter of a plane"),
        pytest.param("chunks", slice(None), 0, "left over|no changes", id="no changes"),
        pytest.param("chunks", slice(None), 255, "impossible|too early|missing", id="rows of ones"),
        pytest.param("payload", slice(None), 0, "end too early", id="all zeros"),
        pytest.param("payload", slice(None), 255, "left over|padding|does not fit|outside", id="all ones"),
    ],
)
def test_errors_name_the_defect(array, at, value, message):
    coded = example_of("fast")
    getattr(coded, array)[at] = value
    with pytest.raises(FormatError, match=message):
        decoded(SPEC, coded)


def test_trailing_data_is_refused():
    coded = example_of("fast")
    for change in ("chunks", "payload"):
        arrays = {n: getattr(coded, n) for n in ("tensors", "books", "chunks", "payload")}
        arrays[change] = np.append(arrays[change], np.uint8(0))
        with pytest.raises(FormatError, match="left over"):
            decoded(SPEC, type(coded)(**arrays))


def test_a_dense_payload_must_have_the_size_of_the_tensor_and_a_change():
    coded = example_of("dense")
    with pytest.raises(FormatError, match="payload bytes are needed"):
        decoded(SPEC, type(coded)(coded.tensors, coded.books, coded.chunks, coded.payload[:-2]))
    coded.payload[:] = 0
    with pytest.raises(FormatError, match="no changes"):
        decoded(SPEC, coded)


def test_a_tensor_listed_twice_is_refused():
    coded = example_of("dense")
    twice = [np.concatenate([a, a]) for a in (coded.tensors, coded.books, coded.chunks, coded.payload)]
    with pytest.raises(FormatError, match="listed twice"):
        decoded(SPEC, type(coded)(*twice))
