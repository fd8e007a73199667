"""Compact parts decoded on the device give what the CPU gives: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hubsync import kernels
from hubsync.errors import FormatError
from hubsync.format.codec import Encoded, Grid, decode, device_decode_classes, encode
from hubsync.format.codec.device_decode import decode_on_device, first_numbers
from hubsync.format.patch import Patch, TensorDelta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.classes import CLASSES
from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device

from .test_device_classes import Weights, delta_of, weights_of
from .test_device_decode import ROUNDS

test_in_tritons_interpreter = in_the_interpreter(__file__)
pytestmark = on_device


TABLE = TensorTable(
    [
        TensorSpec("norm", (60,), "BF16"),
        TensorSpec("scale", (), "BF16"),
        TensorSpec("half", (20, 13), "F16"),
        TensorSpec("empty", (0, 5), "BF16"),
        TensorSpec("router", (6, 8), "F32"),
        TensorSpec("cut", (25, 21), "BF16"),
        TensorSpec("experts", (2, 7, 10), "BF16"),
        TensorSpec("wide", (40, 64), "BF16"),
    ]
)


@pytest.fixture(autouse=True, scope="module")
def _small_tiles_as_on_a_gpu() -> Iterator[None]:
    """Small matrices are cut into a few tiles."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Grid.tiles.__func__, "__defaults__", (60,))  # type: ignore[attr-defined]
        if INTERPRETED:
            patched.setattr(kernels, "on_gpu", lambda tensor: True)
        yield


class Whole:
    """A process that holds all weights on its GPU, but for some tensors. Others lie there in several runs."""

    def __init__(self, weights: Weights, missing: tuple[str, ...] = (), cut: tuple[str, ...] = ()):
        self.device = torch.device(DEVICE)
        self.weights = {name: tensor.to(DEVICE) for name, tensor in weights.items()}
        self.followed = np.array([spec.name != "router" for spec in TABLE])
        self._at = np.array(
            [
                0 if spec.name in missing else -1 if spec.name in cut else self.weights[spec.name].data_ptr()
                for spec in TABLE
            ],
            np.int64,
        )
        self._gone = np.array([spec.name in missing for spec in TABLE])

    def holds(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        return ~self._gone[np.searchsorted(first_numbers(TABLE), first, side="right") - 1]

    def addresses(self, tensors: np.ndarray) -> np.ndarray:
        return self._at[tensors]


def read(coded: Encoded, weights: Weights, held: Whole | None = None) -> Patch | None:
    """What the device decodes, as a patch. None if it leaves the part to the CPU."""
    held = held or Whole(weights)
    arrays = coded.tensors, coded.books, coded.chunks, coded.payload
    found = decode_on_device(TABLE, *arrays, held, ViewBits(TABLE, held.weights))
    if found is None:
        return None
    numbers, diffs = found.numbers.cpu().numpy(), found.diffs.cpu().numpy()
    assert (np.diff(numbers) > 0).all()
    firsts = first_numbers(TABLE)
    index = np.searchsorted(firsts, numbers, side="right") - 1
    patch = dict(found.host)
    for tensor in np.unique(index).tolist():
        assert tensor not in patch
        patch[tensor] = TensorDelta(numbers[index == tensor] - firsts[tensor], diffs[index == tensor])
    return dict(sorted(patch.items()))


def assert_read_alike(coded: Encoded, weights: Weights) -> bool:
    """Whether the part is sound: then both give the same patch, else the device leaves it to the CPU."""
    found = read(coded, weights)
    try:
        expected = decode(
            TABLE, coded.tensors, coded.books, coded.chunks, coded.payload, CLASSES, ViewBits(TABLE, weights)
        )
    except FormatError:
        assert found is None
        return False
    assert found is not None
    assert found == expected
    return True


def coded_of(weights: Weights, share: float, kind: str, seed: int, only: tuple[str, ...] = ()) -> tuple[Encoded, Patch]:
    patch: Patch = {
        index: delta_of(weights, index, share, kind, seed + index, TABLE)
        for index, spec in enumerate(TABLE)
        if spec.numel and (spec.name in only if only else spec.name != "wide")
    }
    patch = {index: delta for index, delta in patch.items() if len(delta)}
    return encode(TABLE, patch, ViewBits(TABLE, weights)), patch


@pytest.mark.parametrize(("share", "kind"), [(0.03, "ones"), (0.3, "tailed"), (0.9, "any")])
@pytest.mark.parametrize("weights", ["model", "any", "alike"])
def test_parts_of_the_encoder(share: float, kind: str, weights: str) -> None:
    """Also classes of which most elements change, which list the others."""
    old = weights_of(weights, 1, TABLE)
    coded, patch = coded_of(old, share, kind, 2)
    assert assert_read_alike(coded, old)
    assert read(coded, old) == patch


def test_the_example_that_compiles_the_kernels() -> None:
    device_decode_classes.prepare(torch.device(DEVICE))


@pytest.mark.parametrize("share", [0.04, -1], ids=["few", "small"])
def test_chunks_of_several_segments(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where most of the small weights change and few of the others."""
    monkeypatch.setattr(Grid.tiles.__func__, "__defaults__", (1 << 20,))  # type: ignore[attr-defined]
    old = weights_of("model", 13, TABLE)
    coded, patch = coded_of(old, share, "three", 14, ("wide", "cut"))
    assert read(coded, old) == patch


def test_pieces_of_a_few_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_decode_classes, "_TOGETHER", 3)
    old = weights_of("model", 3, TABLE)
    coded, patch = coded_of(old, 0.1, "three", 4, ("half", "cut", "experts"))
    assert read(coded, old) == patch


def test_what_is_not_held_is_left_out_and_what_is_scattered_is_left_to_the_cpu() -> None:
    old = weights_of("model", 5, TABLE)
    coded, patch = coded_of(old, 0.1, "three", 6)
    found = read(coded, old, Whole(old, missing=("cut", "norm"), cut=("half",)))
    left = {index: delta for index, delta in patch.items() if TABLE[index].name not in ("cut", "norm")}
    assert found == left


@pytest.mark.parametrize("array", ["tensors", "books", "chunks", "payload"])
def test_damaged_parts_are_refused_or_read_alike(array: str) -> None:
    old = weights_of("model", 7, TABLE)
    sound = 0
    for seed in range(ROUNDS // 2):
        rng = np.random.default_rng(seed)
        coded, _ = coded_of(old, 0.1, "tailed", seed, ("norm", "half"))
        flat = getattr(coded, array).reshape(-1)
        at = rng.integers(0, len(flat))
        flat[at] ^= flat.dtype.type(1 << int(rng.integers(0, 8)))
        sound += assert_read_alike(coded, old)
    assert sound < ROUNDS // 2


def test_wrong_weights_give_the_same_wrong_patch_or_none() -> None:
    old, other = weights_of("model", 8, TABLE), weights_of("model", 9, TABLE)
    coded, _ = coded_of(old, 0.1, "three", 10)
    assert_read_alike(coded, other)


def test_without_old_weights_the_cpu_explains() -> None:
    old = weights_of("model", 11, TABLE)
    coded, _ = coded_of(old, 0.1, "ones", 12)
    arrays = coded.tensors, coded.books, coded.chunks, coded.payload
    assert decode_on_device(TABLE, *arrays, Whole(old)) is None
