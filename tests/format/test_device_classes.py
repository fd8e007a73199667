"""Encoding by class on the device gives the bytes of the CPU: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync import kernels
from hubsync.format.codec import Grid, decode, device_classes, encode
from hubsync.format.codec.encode import Encoded, prepare
from hubsync.format.codec.grid import tile_sizes
from hubsync.format.device_patch import DevicePatch
from hubsync.format.patch import Patch, TensorDelta, TensorValues
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import TORCH_DTYPES, advance, bits_of, integers_of
from hubsync.kernels.classes import CLASSES
from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device

from .test_device_patch import NAMES, assert_equal, steps

test_in_tritons_interpreter = in_the_interpreter(__file__)

TABLE = TensorTable(
    [
        TensorSpec("norm", (300,), "BF16"),
        TensorSpec("scale", (), "BF16"),
        TensorSpec("half", (70, 33), "F16"),
        TensorSpec("empty", (0, 5), "BF16"),
        TensorSpec("router", (20, 8), "F32"),
        TensorSpec("cut", (64, 75), "BF16"),
        TensorSpec("half.bias", (33,), "F16"),
        TensorSpec("experts", (5, 31, 20), "BF16"),
        TensorSpec("down", (90, 41), "BF16"),
        TensorSpec("small", (3, 2), "BF16"),
        TensorSpec("flat", (1, 2000), "BF16"),
    ]
)
SIXTEEN = [index for index, spec in enumerate(TABLE) if spec.width == 16]
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def _tensors_count_as_on_a_gpu() -> Iterator[None]:
    """In the interpreter, tensors in main memory go to the Triton kernels too."""
    with pytest.MonkeyPatch.context() as patched:
        if INTERPRETED:
            patched.setattr(kernels, "on_gpu", lambda tensor: True)
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small matrices into as many tiles as large ones: the interpreter is slow."""
    monkeypatch.setattr(Grid.tiles.__func__, "__defaults__", (200,))  # type: ignore[attr-defined]


def weights_of(kind: str, seed: int, table: TensorTable = TABLE) -> Weights:
    """As in a model, of any exponent, or all alike."""
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for spec in table:
        if kind == "any":
            bits = rng.integers(0, 1 << spec.width, spec.numel).astype(f"u{spec.width // 8}")
            values = integers_of(bits).view(TORCH_DTYPES[spec.dtype])
        else:
            scale = 0.02 if kind == "model" else 0.0
            values = torch.from_numpy(rng.normal(0.5 - 25 * scale, scale, spec.numel)).to(TORCH_DTYPES[spec.dtype])
        weights[spec.name] = values.reshape(spec.shape)
    return weights


def delta_of(
    weights: Weights, index: int, share: float, kind: str, seed: int, table: TensorTable = TABLE
) -> TensorDelta:
    """Changes of about `share` of the elements, or of all small ones and few others."""
    rng, spec = np.random.default_rng(seed), table[index]
    magnitudes = np.nan_to_num(weights[spec.name].float().abs().numpy().reshape(-1))
    chance = np.where(magnitudes < 0.005, 0.9, 0.02) if share < 0 else np.full(spec.numel, share)
    indices = np.flatnonzero(rng.random(spec.numel) < chance)
    diffs = steps(rng, len(indices), kind)
    return TensorDelta(indices, diffs.astype(np.int32 if spec.width == 32 else np.int16))


def on_the_device(
    patch: Patch, weights: Weights, indices: list[int], seed: int = 0, table: TensorTable = TABLE
) -> DevicePatch:
    """The same patch with these tensors on the device, numbered in any order with gaps between them."""
    rng = np.random.default_rng(seed)
    spans, rows, number = [], [], int(rng.integers(0, 1 << 34))
    for index in rng.permutation(indices).tolist():
        delta = patch.get(index, TensorDelta(np.zeros(0, np.int64), np.zeros(0, np.int16)))
        old = bits_of(weights[table[index].name])[delta.indices]
        spans.append((index, number, table[index].numel, 0))
        rows.append((delta.indices + number, old, advance(old, delta.diffs)))
        number += table[index].numel + int(rng.integers(0, 5000))
    numbers, old, new = (np.concatenate(column) for column in zip(*rows, strict=True))
    return DevicePatch(
        torch.from_numpy(numbers).to(DEVICE),
        *(integers_of(side).to(DEVICE) for side in (old, new)),
        np.array(spans, np.int64).reshape(-1, 4),
        {index: delta for index, delta in patch.items() if index not in indices},
    )


def both(
    patch: Patch, weights: Weights, indices: list[int], monkeypatch: pytest.MonkeyPatch, table: TensorTable = TABLE
) -> tuple[Encoded, Encoded]:
    """Encoded on the device, which must not copy the changes to the host, and on the CPU."""
    given = on_the_device(patch, weights, indices, table=table)
    on_gpu = {name: tensor.to(DEVICE) for name, tensor in weights.items()}
    with monkeypatch.context() as patched:
        patched.setattr(DevicePatch, "_on_host", None)
        coded = encode(table, given, ViewBits(table, on_gpu))
    return coded, encode(table, patch, ViewBits(table, weights))


def assert_same(
    patch: Patch, weights: Weights, indices: list[int], monkeypatch: pytest.MonkeyPatch, table: TensorTable = TABLE
) -> Encoded:
    coded, expected = both(patch, weights, indices, monkeypatch, table)
    assert_equal(coded, expected)
    arrays = {name: getattr(coded, name) for name in NAMES}
    assert decode(table, **arrays, classes=CLASSES, old=ViewBits(table, weights)) == patch
    return coded


@st.composite
def cases(draw: st.DrawFn) -> tuple[Patch, Weights, list[int]]:
    seed = draw(st.integers(0, 1 << 32))
    weights = weights_of(draw(st.sampled_from(["model", "model", "any", "alike"])), seed)
    kind = draw(st.sampled_from(["ones", "nines", "three", "tailed", "any"]))
    patch: Patch = {}
    for index in range(len(TABLE)):
        share = draw(st.sampled_from([0.0, 0.0, 0.01, -1.0, 0.2, 0.55, 1.0]))
        delta = delta_of(weights, index, share, kind, seed + index)
        if len(delta):
            patch[index] = delta
    there = [index for index in SIXTEEN if draw(st.sampled_from([True, True, True, False]))]
    return patch, weights, there or SIXTEEN[:1]


@on_device
@pytest.mark.usefixtures("small_tiles")
@settings(deadline=None, max_examples=20 if DEVICE == "cuda" else 3, derandomize=True)
@given(case=cases())
def test_any_patch_gets_the_bytes_of_the_cpu(case: tuple[Patch, Weights, list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        assert_same(*case, patched)


@on_device
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("patch", [{}, {8: TensorDelta(np.array([3689]), np.array([-32_768], np.int16))}])
def test_no_change_and_one_change(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(patch, weights_of("model", 1), [0, 5, 8], monkeypatch)


@on_device
@pytest.mark.usefixtures("small_tiles")
def test_classes_of_which_most_or_all_elements_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training: the smallest weights change at every step."""
    weights = weights_of("model", 3)
    patch: Patch = {index: delta_of(weights, index, -1.0, "ones", index) for index in (5, 7, 8)}
    coded = assert_same(patch, weights, SIXTEEN, monkeypatch)
    assert not np.any(coded.tensors[:, 3] & 0xFF == 0)  # none is dense


@on_device
@pytest.mark.usefixtures("small_tiles")
def test_segments_are_ranked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_classes, "_TOGETHER", 5)
    weights = weights_of("model", 4)
    patch: Patch = {index: delta_of(weights, index, 0.05, "tailed", index) for index in (0, 2, 5, 6, 7, 8, 10)}
    patch[4] = TensorValues(np.arange(TABLE[4].numel, dtype=np.uint32))
    assert_same(patch, weights, SIXTEEN, monkeypatch)


@on_device
def test_tiles_of_usual_size(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TensorTable([TensorSpec("a", (512, 1030), "BF16"), TensorSpec("b", (7, 900), "BF16")])
    weights = weights_of("model", 5, table)
    patch: Patch = {index: delta_of(weights, index, 0.01, "ones", index, table) for index in range(2)}
    assert_same(patch, weights, [0, 1], monkeypatch, table)


@on_device
def test_numbers_outside_all_spans_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of("model", 6)
    patch: Patch = {8: delta_of(weights, 8, 0.1, "ones", 1), 5: delta_of(weights, 5, 0.1, "ones", 1)}
    given = on_the_device(patch, weights, [5, 8])
    spans = given.spans[given.spans[:, 0] == 8]
    spans[0, 1:] += (1000, -1500, 1000)  # first number, elements, first flat index
    part = DevicePatch(given.numbers, given.old, given.new, spans, {})
    monkeypatch.setattr(DevicePatch, "_on_host", None)
    on_gpu = {name: tensor.to(DEVICE) for name, tensor in weights.items()}
    inside = (patch[8].indices >= 1000) & (patch[8].indices < 1000 + TABLE[8].numel - 1500)
    expected: Patch = {8: TensorDelta(patch[8].indices[inside], patch[8].diffs[inside])}
    coded = encode(TABLE, part, ViewBits(TABLE, on_gpu))
    assert_equal(coded, encode(TABLE, expected, ViewBits(TABLE, weights)))


@on_device
def test_weights_that_are_not_on_the_device_are_read_on_the_host() -> None:
    weights = weights_of("model", 7)
    patch: Patch = {8: delta_of(weights, 8, 0.1, "ones", 1)}
    strided = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in weights.items()}

    class Parts:
        def rectangle(self, index: int, rows: slice, cols: slice) -> np.ndarray:
            return bits_of(strided[TABLE[index].name].contiguous()).reshape(TABLE[index].matrix)[rows, cols]

    coded = encode(TABLE, on_the_device(patch, weights, [5, 8]), Parts())
    assert_equal(coded, encode(TABLE, patch, ViewBits(TABLE, weights)))


@on_device
def test_preparing_compiles_what_encoding_by_class_needs() -> None:
    prepare(torch.device(DEVICE), by_class=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="too much for Triton's interpreter")
@pytest.mark.parametrize("share", [-1.0, 0.01, 0.4])
@pytest.mark.parametrize("kind", ["ones", "any"])
def test_millions_of_changes_get_the_bytes_of_the_cpu(share: float, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TensorTable([TensorSpec(f"w{n}", (3000, 1000 + n), "BF16") for n in range(10)])
    weights = weights_of("model", 8, table)
    patch: Patch = {index: delta_of(weights, index, share, kind, index, table) for index in range(len(table))}
    assert_same(patch, weights, list(range(10)), monkeypatch, table)


@given(st.lists(st.tuples(st.integers(1, 3 << 11), st.integers(1, 3 << 11)), max_size=5))
def test_tiles_of_many_tensors_are_those_of_each(shapes: list[tuple[int, int]]) -> None:
    rows, cols = np.array(shapes, np.int64).reshape(-1, 2).T
    grids = [Grid.tiles(*shape) for shape in shapes]
    sizes = [side.tolist() for side in tile_sizes(rows, cols)]
    assert sizes == [[grid.chunk_rows for grid in grids], [grid.chunk_cols for grid in grids]]
