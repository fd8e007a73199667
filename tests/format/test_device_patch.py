"""Encoding on the device gives the bytes of the CPU: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hubsync import kernels
from hubsync.errors import FormatError
from hubsync.format.codec import Grid, decode, encode
from hubsync.format.codec import device as device_codec
from hubsync.format.codec.encode import Encoded, prepare
from hubsync.format.codec.grid import contiguous_sizes
from hubsync.format.device_patch import DevicePatch
from hubsync.format.manifest import Position
from hubsync.format.parts import Transition, read_delta, write_delta
from hubsync.format.patch import Patch, TensorDelta, TensorValues, changed, compose, invert
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import advance
from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device

test_in_tritons_interpreter = in_the_interpreter(__file__)

NAMES = ("tensors", "books", "chunks", "payload")
TABLE = TensorTable(
    [
        TensorSpec("norm", (300,), "BF16"),
        TensorSpec("scale", (), "BF16"),
        TensorSpec("wide", (2, 1_500_000), "BF16"),  # chunks are parts of rows
        TensorSpec("half", (70, 33), "F16"),
        TensorSpec("empty", (0, 5), "BF16"),
        TensorSpec("router", (20, 8), "F32"),
        TensorSpec("tall", (5, 900, 600), "BF16"),  # three chunks
        TensorSpec("half.bias", (33,), "F16"),
        TensorSpec("down", (90, 41), "BF16"),
        TensorSpec("small", (3, 2), "BF16"),
    ]
)
RUN, PARENT, POSITION = "a" * 32, Position(1, "1" * 32), Position(2, "2" * 32)


@pytest.fixture(autouse=True, scope="module")
def _tensors_count_as_on_a_gpu() -> Iterator[None]:
    """In the interpreter, tensors in main memory go to the Triton kernels too."""
    with pytest.MonkeyPatch.context() as patched:
        if INTERPRETED:
            patched.setattr(kernels, "on_gpu", lambda tensor: True)
        yield


def steps(rng: np.random.Generator, count: int, kind: str) -> np.ndarray:
    """Non-zero differences: almost all +-1, around 9, three sizes, a heavy tail, or anything that 16 bits can hold."""
    magnitudes = {
        "ones": np.where(rng.random(count) < 0.05, rng.integers(2, 6, count), 1),
        "nines": rng.integers(8, 11, count),
        "three": rng.choice([1, 2, 300], count),
        "tailed": np.minimum(np.floor(rng.pareto(1.0, count)) + 1, 32_767),
        "any": rng.integers(1, 32_769, count),
    }[kind]
    diffs = (magnitudes * rng.choice([-1, 1], count)).astype(np.int64)
    return np.where(diffs == 32_768, -32_768, diffs).astype(np.int16)


def delta_of(numel: int, share: float, kind: str, seed: int) -> TensorDelta:
    """About `share` of the elements, but not more than 1,000 of them: the interpreter is slow."""
    rng = np.random.default_rng(seed)
    if numel > 10_000:
        indices = np.unique(rng.integers(0, numel, min(1_000, 1 + int(share * 1_500))))
    else:
        indices = np.flatnonzero(rng.random(numel) < share)
    return TensorDelta(indices, steps(rng, len(indices), kind))


def on_the_device(patch: Patch, parts: dict[int, tuple[int, int]], seed: int = 0) -> DevicePatch:
    """The same patch with these tensors, or these parts of them (first element, elements), on the device.

    Spans get numbers in any order, with gaps between them. Nothing else changes if a tensor has no changes there.
    """
    rng = np.random.default_rng(seed)
    spans, rows, number = [], [], int(rng.integers(0, 1 << 34))
    for index in rng.permutation(list(parts)).tolist():
        offset, count = parts[index]
        spans.append((index, number, count, offset))
        delta = patch.get(index, TensorDelta(np.zeros(0, np.int64), np.zeros(0, np.int16)))
        old = rng.integers(0, 1 << 16, len(delta)).astype(np.uint16)
        rows.append((delta.indices - offset + number, old, advance(old, delta.diffs)))
        number += count + int(rng.integers(0, 5000))
    numbers, old, new = (np.concatenate(column) for column in zip(*rows, strict=True))
    return DevicePatch(
        torch.from_numpy(numbers).to(DEVICE),
        *(torch.from_numpy(side.view(np.int16)).to(DEVICE) for side in (old, new)),
        np.array(spans, np.int64).reshape(-1, 4),
        {index: delta for index, delta in patch.items() if index not in parts},
    )


def whole(*indices: int) -> dict[int, tuple[int, int]]:
    return {index: (0, TABLE[index].numel) for index in indices}


def assert_equal(coded: Encoded, expected: Encoded) -> None:
    for name in NAMES:
        assert np.array_equal(getattr(coded, name), getattr(expected, name)), name


def decoded(coded: Encoded, table: TensorTable = TABLE) -> Patch:
    return decode(table, **{name: getattr(coded, name) for name in NAMES}, classes=1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Patch, DevicePatch]:
    """A patch of some tensors, and the same with some of the 16-bit tensors on the device."""
    patch: Patch = {}
    seed = draw(st.integers(0, 1 << 32))
    kind = draw(st.sampled_from(["ones", "nines", "three", "tailed", "any"]))
    for index, spec in enumerate(TABLE):
        share = draw(st.sampled_from([0.0, 0.0, 0.01, 0.2, 0.55, 1.0]))
        delta = delta_of(spec.numel, share, kind, seed + index)
        if len(delta):
            patch[index] = TensorDelta(delta.indices, delta.diffs.astype(np.int32 if spec.width == 32 else np.int16))
    parts = {}
    for index, spec in enumerate(TABLE):
        if spec.width != 16 or not draw(st.sampled_from([True, True, True, False])):
            continue
        first, last = (patch[index].indices[at] for at in (0, -1)) if index in patch else (0, spec.numel - 1)
        part = draw(st.booleans())  # a shard that holds all that changed, or the whole tensor
        parts[index] = (int(first), int(last - first) + 1) if part else (0, spec.numel)
    return patch, on_the_device(patch, parts or whole(0), seed)


@on_device
@settings(deadline=None, max_examples=20 if DEVICE == "cuda" else 8, derandomize=True)
@given(cases())
def test_any_patch_gets_the_bytes_of_the_cpu(case: tuple[Patch, DevicePatch]) -> None:
    patch, on_gpu = case
    coded = encode(TABLE, on_gpu)
    assert_equal(coded, encode(TABLE, patch))
    assert decoded(coded) == patch
    assert on_gpu == patch


@on_device
@pytest.mark.parametrize("kind", ["ones", "any"])
def test_chunks_with_most_elements_changed_and_dense_tensors_lie_between_others(kind: str) -> None:
    """In the wide tensor, one chunk of four is crowded, so its bits come from the host."""
    sparse = delta_of(TABLE[2].numel, 0.1, kind, 1)
    run = np.arange((1 << 20) + 100, (1 << 20) + 250_000)
    indices = np.union1d(sparse.indices, run)
    crowded = TensorDelta(indices, steps(np.random.default_rng(2), len(indices), "ones"))
    scalar = TensorDelta(np.array([0]), np.array([5], np.int16))
    patch: Patch = {0: delta_of(300, 1.0, kind, 3), 1: scalar, 2: crowded, 8: delta_of(3690, 0.1, kind, 4)}
    patch[6] = delta_of(TABLE[6].numel, 0.1, kind, 5)
    assert not np.all(encode(TABLE, patch).tensors[:, 3] & 0xFF)  # some are dense
    assert_equal(encode(TABLE, on_the_device(patch, whole(0, 1, 2, 6, 8))), encode(TABLE, patch))


@on_device
def test_host_tensors_share_the_book_of_their_dtype_and_new_values_come_last() -> None:
    patch: Patch = {index: delta_of(TABLE[index].numel, 0.1, "ones", index) for index in (0, 2, 6, 8)}
    patch[3] = TensorValues(np.arange(TABLE[3].numel, dtype=np.uint16))
    coded = encode(TABLE, on_the_device(patch, whole(2, 8)))
    assert len(coded.books) == 1
    assert_equal(coded, encode(TABLE, patch))


@on_device
@pytest.mark.parametrize("patch", [{}, {8: TensorDelta(np.array([3689]), np.array([-32_768], np.int16))}])
def test_no_change_and_one_change(patch: Patch) -> None:
    coded = encode(TABLE, on_the_device(patch, whole(0, 2, 8)))
    assert_equal(coded, encode(TABLE, patch))
    assert decoded(coded) == patch


@on_device
def test_numbers_outside_all_spans_are_ignored() -> None:
    patch: Patch = {8: delta_of(TABLE[8].numel, 0.1, "ones", 1)}
    given = on_the_device(patch, whole(8))
    spans = given.spans.copy()
    spans[0, 1:] += (1000, -1500, 1000)  # first number, elements, first flat index
    part = DevicePatch(given.numbers, given.old, given.new, spans, {})
    inside = (patch[8].indices >= 1000) & (patch[8].indices < 1000 + TABLE[8].numel - 1500)
    expected: Patch = {8: TensorDelta(patch[8].indices[inside], patch[8].diffs[inside])}
    assert part == expected
    assert_equal(encode(TABLE, part), encode(TABLE, expected))


@on_device
def test_positions_in_a_payload_have_more_than_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from hubsync.kernels.gpu import encode as gpu

    patch: Patch = {index: delta_of(TABLE[index].numel, 0.1, "tailed", index) for index in (0, 2, 6)}
    write, first = gpu.write, (1 << 28) + 3  # bytes

    def write_far_behind(*arguments: torch.Tensor) -> None:
        *others, begins, words = arguments
        far = torch.zeros(len(words) + first // 4 + 1, dtype=torch.int32, device=DEVICE)
        write(*others, begins + 8 * first, far)
        words.view(torch.uint8).copy_(far.view(torch.uint8)[first : first + words.nbytes])

    monkeypatch.setattr(gpu, "write", write_far_behind)
    assert_equal(encode(TABLE, on_the_device(patch, whole(0, 2, 6))), encode(TABLE, patch))


@pytest.mark.skipif(DEVICE == "cpu", reason="too much for Triton's interpreter")
@pytest.mark.parametrize("share", [0.01, 0.4])
@pytest.mark.parametrize("kind", ["ones", "nines", "any"])
def test_millions_of_changes_get_the_bytes_of_the_cpu(share: float, kind: str) -> None:
    table = TensorTable([TensorSpec(f"w{n}", (3000, 1000 + n), "BF16") for n in range(10)])
    patch: Patch = {}
    for index, spec in enumerate(table):
        rng = np.random.default_rng(index)
        indices = np.flatnonzero(rng.random(spec.numel) < share)
        patch[index] = TensorDelta(indices, steps(rng, len(indices), kind))
    on_gpu = on_the_device(patch, {index: (0, spec.numel) for index, spec in enumerate(table)})
    coded = encode(table, on_gpu)
    assert_equal(coded, encode(table, patch))
    assert decoded(coded, table) == patch


@on_device
def test_preparing_compiles_what_encoding_needs() -> None:
    prepare(torch.device(DEVICE))


@on_device
def test_changes_are_not_copied_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    patch: Patch = {index: delta_of(TABLE[index].numel, 0.1, "ones", index) for index in (0, 2, 6)}
    given = on_the_device(patch, whole(0, 2, 6))
    copied: list[int] = []
    to_host = device_codec.to_host
    monkeypatch.setattr(
        device_codec, "to_host", lambda *found: copied.append(sum(t.nbytes for t in found)) or to_host(*found)
    )
    monkeypatch.setattr(DevicePatch, "listed", None)
    coded = encode(TABLE, given)
    assert len(copied) == 3
    assert copied[-1] == len(coded.payload)


def test_a_device_patch_is_a_patch() -> None:
    patch: Patch = {index: delta_of(TABLE[index].numel, 0.1, "ones", index) for index in (0, 3, 6, 8)}
    given = on_the_device(patch, whole(0, 2, 3, 8))
    assert dict(given) == patch
    assert list(given) == [0, 3, 6, 8]
    assert changed(given) == changed(patch)
    assert compose(patch, invert(given)) == {}
    assert given.deltas([2, 3]) == {3: patch[3]}


def test_a_part_of_a_device_patch_is_the_part_of_the_patch() -> None:
    patch: Patch = {index: delta_of(TABLE[index].numel, 0.1, "ones", index) for index in (0, 6, 8)}
    given, transition = on_the_device(patch, whole(0, 8)), Transition(RUN, PARENT, POSITION)
    part = write_delta(TABLE, given, transition)
    assert part == write_delta(TABLE, patch, transition)
    assert read_delta(part, TABLE, None) == patch


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 0, 300, 0), (0, 300, 300, 0)], "occurs twice"),
        ([(10, 0, 1, 0)], "not in a table of 10"),
        ([(0, 0, 300, 1)], "outside"),
        ([(0, -1, 300, 0)], "outside"),
        ([(5, 0, 160, 0)], r"router \(F32\) cannot be on the device"),
        ([(8, 0, 10, 0)], "down is both on the device and on the host"),
    ],
)
def test_spans_that_do_not_fit_the_table_are_refused(spans: list[tuple[int, ...]], message: str) -> None:
    none = torch.zeros(0, dtype=torch.int16)
    patch = DevicePatch(none.long(), none, none, np.array(spans), {8: delta_of(TABLE[8].numel, 0.1, "ones", 1)})
    with pytest.raises(FormatError, match=message):
        write_delta(TABLE, patch, Transition(RUN, PARENT, POSITION))


@given(st.integers(0, 3 << 20), st.integers(0, 3 << 20))
@example(1, 1 << 20)
@example(7, (1 << 20) + 1)
def test_grids_of_many_tensors_are_those_of_each(rows: int, cols: int) -> None:
    grid = Grid.contiguous(rows, cols)
    sizes = contiguous_sizes(np.array([rows]), np.array([cols]))
    assert (int(sizes[0][0]), int(sizes[1][0])) == (grid.chunk_rows, grid.chunk_cols)
