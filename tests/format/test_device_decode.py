"""Decoding on the device gives what the CPU gives and refuses what it refuses: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from hubsync.errors import FormatError
from hubsync.format.codec import Encoded, Grid, decode, encode
from hubsync.format.codec.book import FIELDS, LIST_REST, MAX_PLANES, NO_PLANE, PLANES, RICE, USUAL, Book
from hubsync.format.codec.costs import list_gaps
from hubsync.format.codec.layout import CODED
from hubsync.format.codec.rows import RowReader, RowWriter, read_rows, zigzag
from hubsync.format.codec.streams import write
from hubsync.format.patch import Patch, TensorDelta, TensorValues
from hubsync.format.table import TensorSpec, TensorTable
from tests.support.on_gpu import DEVICE, in_the_interpreter, on_device

from .test_device_patch import steps

test_in_tritons_interpreter = in_the_interpreter(__file__)

TABLE = TensorTable(
    [
        TensorSpec("norm", (300,), "BF16"),
        TensorSpec("scale", (), "BF16"),
        TensorSpec("q", (70, 33), "BF16"),
        TensorSpec("router", (20, 8), "F32"),
        TensorSpec("half", (40, 50), "F16"),
        TensorSpec("empty", (0, 5), "BF16"),
        TensorSpec("down", (90, 41), "BF16"),
        TensorSpec("fp8", (30, 8), "F8_E4M3"),
    ]
)


ROUNDS = 300 if DEVICE == "cuda" else 20  # of random damage: the interpreter is slow


@dataclass
class Everything:
    """A process that holds all, or these numbers, of the followed tensors."""

    followed: np.ndarray
    first: int = 0
    end: int = 1 << 62
    device: torch.device = field(default_factory=lambda: torch.device(DEVICE))

    def holds(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        return (first < self.end) & (end > self.first)

    def addresses(self, tensors: np.ndarray) -> np.ndarray:
        return np.full(len(tensors), -1)


def read(table: TensorTable, coded: Encoded, held: Everything | None = None) -> Patch | None:
    """What the device decodes, as a patch. None if it leaves the part to the CPU."""
    from hubsync.format.codec.device_decode import decode_on_device, first_numbers

    held = held or Everything(np.ones(len(table), bool))
    found = decode_on_device(table, coded.tensors, coded.books, coded.chunks, coded.payload, held)
    if found is None:
        return None
    numbers, diffs = found.numbers.cpu().numpy(), found.diffs.cpu().numpy()
    assert (np.diff(numbers) > 0).all()
    firsts = first_numbers(table)
    index = np.searchsorted(firsts, numbers, side="right") - 1
    patch = dict(found.host)
    for tensor in np.unique(index).tolist():
        assert tensor not in patch
        patch[tensor] = TensorDelta(numbers[index == tensor] - firsts[tensor], diffs[index == tensor])
    return dict(sorted(patch.items()))


def assert_read_alike(table: TensorTable, coded: Encoded) -> bool:
    """Whether the part is sound: then both give the same patch, else the device leaves it to the CPU."""
    found = read(table, coded)
    try:
        expected = decode(table, coded.tensors, coded.books, coded.chunks, coded.payload, 1)
    except FormatError:
        assert found is None
        return False
    assert found == expected
    return True


def delta_of(spec: TensorSpec, share: float, kind: str, rng: np.random.Generator) -> TensorDelta:
    indices = np.flatnonzero(rng.random(spec.numel) < share)
    if not len(indices):
        indices = rng.integers(0, spec.numel, 1)
    return TensorDelta(indices, steps(rng, len(indices), kind).astype({8: "i1", 16: "i2", 32: "i4"}[spec.width]))


def patch_of(share: float, kind: str, seed: int) -> Patch:
    rng = np.random.default_rng(seed)
    patch: Patch = {i: delta_of(spec, share, kind, rng) for i, spec in enumerate(TABLE) if spec.numel and i != 7}
    patch[7] = TensorDelta(np.array([3, 9]), np.array([1, -1], np.int8))
    return patch


@on_device
@pytest.mark.parametrize("kind", ["ones", "nines", "three", "tailed", "any"])
@pytest.mark.parametrize("share", [0.001, 0.04, 0.8])
def test_parts_of_the_encoder(share: float, kind: str) -> None:
    assert assert_read_alike(TABLE, encode(TABLE, patch_of(share, kind, 3)))


@on_device
@pytest.mark.parametrize("grid", [(1, 10), (40, 33), (30, 5)], ids=str)
def test_chunks_of_any_shape(grid: tuple[int, int]) -> None:
    """Rectangles that are no run of elements are decoded by the CPU."""

    def grid_of(rows: int, cols: int) -> Grid:
        return Grid(rows, cols, min(rows, grid[0]), min(cols, grid[1]))

    assert assert_read_alike(TABLE, encode(TABLE, patch_of(0.03, "three", 4), grid_of=grid_of))


@on_device
def test_records_of_all_modes() -> None:
    patch = patch_of(0.1, "three", 5)
    patch[2] = TensorValues(np.arange(70 * 33, dtype=np.uint16))
    patch[3] = TensorDelta(np.arange(160), np.arange(1, 161, dtype=np.int32) << 20)
    coded = encode(TABLE, patch)
    assert {0, 1, 2} <= set((coded.tensors[:, 3] & 0xFF).tolist())
    assert assert_read_alike(TABLE, coded)


@on_device
def test_no_records() -> None:
    assert assert_read_alike(TABLE, encode(TABLE, {}))
    assert assert_read_alike(TABLE, encode(TABLE, {2: TensorValues(np.arange(70 * 33, dtype=np.uint16))}))


@on_device
def test_records_in_another_order() -> None:
    """A writer may list tensors in any order. The list ascends all the same."""
    spec = [TensorSpec("a", (100,), "BF16"), TensorSpec("b", (100,), "BF16")]
    table, other = TensorTable(spec), TensorTable(spec[::-1])
    rng = np.random.default_rng(1)
    patch: Patch = {0: delta_of(spec[0], 0.1, "ones", rng), 1: delta_of(spec[0], 0.1, "ones", rng)}
    coded = encode(table, patch)
    coded.tensors[:, 0] = coded.tensors[::-1, 0].copy()
    assert read(other, coded) == {0: patch[1], 1: patch[0]}


@on_device
def test_only_chunks_that_are_held_are_decoded() -> None:
    patch = patch_of(0.1, "ones", 6)
    coded = encode(TABLE, patch, grid_of=lambda rows, cols: Grid(rows, cols, min(rows, 10), cols))
    followed = np.ones(len(TABLE), bool)
    followed[4] = False
    first = int(TABLE.columns.numel[:2].sum())
    found = read(TABLE, coded, Everything(followed, first + 25 * 33, first + 45 * 33))
    own = (patch[2].indices >= 20 * 33) & (patch[2].indices < 50 * 33)
    assert found == {
        **{index: patch[index] for index in (1, 3, 4, 7)},  # decoded by the CPU
        2: TensorDelta(patch[2].indices[own], patch[2].diffs[own]),
    }


def test_rows_of_many_tensors_are_those_of_each() -> None:
    coded = encode(TABLE, patch_of(0.1, "tailed", 7), grid_of=lambda rows, cols: Grid(rows, cols, 1, min(cols, 20)))
    index, book = coded.tensors[:, 0], coded.tensors[:, 3] >> 8
    grids = [
        Grid(*TABLE[i].matrix, 1, int(cols)).count if cols else 0
        for i, cols in zip(index, coded.tensors[:, 2], strict=True)
    ]
    books = [Book.unpack(row, 1) for row in coded.books]
    orders = np.stack([books[number].orders for number in book])
    owners, numbers, rows = read_rows(coded.chunks, orders, np.array(grids))
    reader = RowReader(coded.chunks)
    for record, count in enumerate(grids):
        expected = reader.read(books[book[record] % len(books)], count)
        np.testing.assert_array_equal(numbers[owners == record], expected[0])
        np.testing.assert_array_equal(rows[owners == record], expected[1])


# --- codes that the encoder does not choose


def random_book(rng: np.random.Generator) -> Book:
    codes = rng.integers(0, 4, (1, PLANES + MAX_PLANES)).astype(np.uint8)
    codes[0, USUAL] = rng.choice([1, 2, 3, 9, 255])
    codes[0, 2] = rng.integers(0, 5) | rng.choice([0, RICE])
    codes[0, PLANES:] |= rng.choice([0, LIST_REST], MAX_PLANES).astype(np.uint8)
    codes[0, PLANES + rng.integers(0, MAX_PLANES + 1) :] = NO_PLANE
    return Book(0, np.array([2, 1, 3], np.uint8), codes)


def part_of(books: list[Book], rng: np.random.Generator) -> tuple[TensorTable, Encoded, Patch]:
    """A tensor for each book, in one chunk, with differences near the usual one and a few of any size."""
    specs, records, payload, patch = [], [], [], {}
    writer = RowWriter()
    for number, book in enumerate(books):
        size = int(rng.integers(40, 160))
        positions = np.sort(rng.choice(size, rng.integers(1, size // 2 + 1), replace=False)).astype(np.int32)
        usual = int(book.codes[0, USUAL])
        magnitudes = np.maximum(1, usual + rng.integers(-4, 5, len(positions)))
        magnitudes[rng.random(len(positions)) < 0.1] += rng.integers(0, 60)
        diffs = (magnitudes * rng.choice([-1, 1], len(positions))).astype(np.int16)
        if rng.random() < 0.3 and not book.codes[0, 2] & RICE:
            diffs[0] = -32_768
        counts, sizes = np.array([len(positions)]), np.array([size])
        shift, data = write(counts, sizes, *list_gaps(counts, sizes, positions), diffs, book.codes)
        rows = np.array([[len(positions), zigzag(np.array(shift)), len(data)]])
        writer.append(book, np.zeros(1, np.int64), rows, 1)
        specs.append(TensorSpec(f"w{number}", (size,), "BF16"))
        records.append([number, 1, size, CODED | number << 8])
        payload.append(data)
        patch[number] = TensorDelta(positions.astype(np.int64), diffs)
    packed = np.stack([book.pack() for book in books])
    coded = Encoded(np.array(records, np.uint32), packed, writer.data(), np.concatenate(payload))
    return TensorTable(specs), coded, patch


@on_device
@pytest.mark.parametrize("seed", range(4))
def test_any_code_parameters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table, coded, patch = part_of([random_book(rng) for _ in range(6)], rng)
    assert assert_read_alike(table, coded)
    assert read(table, coded) == patch


# --- damage


@on_device
@pytest.mark.parametrize("array", ["tensors", "books", "chunks", "payload"])
def test_damaged_parts_are_refused_or_read_alike(array: str) -> None:
    sound = 0
    for seed in range(ROUNDS):
        rng = np.random.default_rng(seed)
        table, coded, _ = part_of([random_book(rng)], rng)
        flat = getattr(coded, array).reshape(-1)
        at = rng.integers(0, len(flat))
        flat[at] ^= flat.dtype.type(1 << int(rng.integers(0, 8)))
        sound += assert_read_alike(table, coded)
    assert sound < ROUNDS


@on_device
def test_random_payloads_are_refused_or_read_alike() -> None:
    for seed in range(ROUNDS):
        rng = np.random.default_rng(seed)
        table, coded, _ = part_of([random_book(rng)], rng)
        begin = int(rng.integers(0, len(coded.payload)))
        coded.payload[begin:] = rng.integers(0, 256, len(coded.payload) - begin)
        assert_read_alike(table, coded)


@on_device
@pytest.mark.parametrize("array", ["chunks", "payload"])
@pytest.mark.parametrize("change", [-1, 1])
def test_bytes_too_many_or_too_few_are_refused(array: str, change: int) -> None:
    coded = encode(TABLE, patch_of(0.1, "three", 8))
    arrays = {name: getattr(coded, name) for name in ("tensors", "books", "chunks", "payload")}
    arrays[array] = arrays[array][:-1] if change < 0 else np.append(arrays[array], np.uint8(0))
    assert not assert_read_alike(TABLE, Encoded(**arrays))


def test_columns_of_a_row() -> None:
    """The device decoder takes columns 0, shift and bytes of a row of one class."""
    assert FIELDS == 2
