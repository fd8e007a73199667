"""The Triton kernels equal the CPU kernels: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hubsync import kernels
from hubsync.format.codec import decode, encode
from hubsync.format.digest import digest_at, digest_range, digest_torch
from hubsync.format.patch import TensorDelta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import SIGNED, UNSIGNED
from hubsync.kernels.classes import ClassMap
from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device

test_in_tritons_interpreter = in_the_interpreter(__file__)

WIDTHS = pytest.mark.parametrize("width", [8, 16, 32])
DTYPES = {8: "F8_E4M3", 16: "BF16", 32: "F32"}


@pytest.fixture(autouse=True)
def _tensors_count_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, tensors in main memory go to the Triton kernels too."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)


def patterns(width: int, count: int, seed: int = 0) -> np.ndarray:
    """Normally distributed numbers, and a few arbitrary patterns."""
    rng = np.random.default_rng(seed)
    normal = (rng.standard_normal(count, np.float32) * 0.02).view(np.uint32) >> (32 - width)
    strange = rng.integers(0, 1 << width, count, dtype=np.uint64)
    return np.where(rng.random(count) < 0.1, strange, normal).astype(UNSIGNED[width])


def tensor_of(bits: np.ndarray) -> torch.Tensor:
    integers = bits if bits.itemsize == 1 else bits.view(SIGNED[8 * bits.itemsize])
    return torch.from_numpy(integers.copy()).to(DEVICE)


def array_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy().view(f"u{tensor.element_size()}")


@on_device
@WIDTHS
@pytest.mark.parametrize("count", [1, 4096, 30_001])
def test_changes_are_listed_in_order_with_their_patterns(width: int, count: int) -> None:
    from hubsync.kernels import triton

    old = patterns(width, count)
    new = old.copy()
    new[::37] ^= 1 << (width - 1)  # also 0 to -0
    indices, before, after = triton.changes(tensor_of(old), tensor_of(new))
    expected = np.flatnonzero(old != new)
    assert np.array_equal(indices.cpu().numpy(), expected)
    assert np.array_equal(array_of(before), old[expected])
    assert np.array_equal(array_of(after), new[expected])
    assert len(triton.changes(tensor_of(old), tensor_of(old))[0]) == 0


@on_device
@WIDTHS
@pytest.mark.parametrize("count", [0, 1, 10_001])
def test_digests_are_those_of_the_cpu(width: int, count: int) -> None:
    bits = patterns(width, count)
    seed = (1 << 64) - 5
    assert digest_torch(seed, tensor_of(bits), 1 << 33) == digest_range(seed, bits, 1 << 33)
    indices = np.random.default_rng(1).permutation(1 << 16)[:count].astype(np.int64)
    at = torch.from_numpy(indices).to(DEVICE)
    assert digest_torch(seed, tensor_of(bits), indices=at) == digest_at(seed, indices, bits)


@on_device
@WIDTHS
def test_scattered_values_are_written(width: int) -> None:
    from hubsync.kernels import triton

    bits = patterns(width, 5000)
    tensor, indices = tensor_of(bits), torch.randperm(5000)[:1500].to(DEVICE)
    values = patterns(width, 1500, 1)
    triton.scatter(tensor, indices, tensor_of(values))
    bits[indices.cpu().numpy()] = values
    assert np.array_equal(array_of(tensor), bits)


@on_device
@WIDTHS
@pytest.mark.parametrize("count", [7, 1024, 9000])
def test_ranks_and_places_are_those_of_the_cpu(width: int, count: int) -> None:
    bits, classes = patterns(width, count), ClassMap.of(DTYPES[width], 100 if width > 8 else 2)
    positions = np.flatnonzero(np.random.default_rng(2).random(count) < 0.05).astype(np.int32)
    sizes, class_of, ranks = kernels.rank(bits.reshape(1, -1), positions, classes)
    on_gpu = kernels.rank(tensor_of(bits).view(1, -1), positions, classes)
    assert all(np.array_equal(a, b) for a, b in zip((sizes, class_of, ranks), on_gpu, strict=True))

    order = np.argsort(class_of, kind="stable")
    diffs, counts = np.arange(len(ranks), dtype=np.int16), np.bincount(class_of, minlength=16)
    counted = kernels.count(tensor_of(bits).view(1, -1), classes)
    found, moved = counted.place(ranks[order], diffs[order], counts)
    assert np.array_equal(counted.sizes, sizes)
    assert np.array_equal(found, positions)
    assert np.array_equal(moved, diffs)


@on_device
def test_both_backends_write_the_same_part_and_read_each_others() -> None:
    spec = TensorSpec("w", (64, 300), "BF16")
    table = TensorTable([spec])
    bits = patterns(16, spec.numel)
    indices = np.flatnonzero(np.random.default_rng(3).random(spec.numel) < 0.03)
    patch = {0: TensorDelta(indices, np.random.default_rng(4).choice([-3, -1, 1], len(indices)).astype(np.int16))}

    class Old:
        def __init__(self, weights: np.ndarray | torch.Tensor):
            self.weights = weights

        def rectangle(self, index: int, rows: slice, cols: slice) -> np.ndarray | torch.Tensor:
            return self.weights[rows, cols]

    on_cpu, on_gpu = Old(bits.reshape(64, 300)), Old(tensor_of(bits).view(64, 300))
    parts = [encode(table, patch, old) for old in (on_cpu, on_gpu)]
    names = ("tensors", "books", "chunks", "payload")
    assert all(np.array_equal(getattr(parts[0], name), getattr(parts[1], name)) for name in names)
    for old in (on_cpu, on_gpu):
        assert decode(table, **{name: getattr(parts[0], name) for name in names}, classes=16, old=old) == patch


@on_device
@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU tells its memory from that of the host")
def test_a_change_is_found_and_coded_without_copying_weights_to_the_host() -> None:
    from hubsync.kernels import triton

    old = tensor_of(patterns(16, 1 << 22))
    new = old.clone()
    new[::1000] += 1
    copied: list[int] = []
    original = torch.Tensor.cpu
    try:
        torch.Tensor.cpu = lambda tensor: copied.append(tensor.numel()) or original(tensor)  # type: ignore
        indices, _, _ = triton.changes(old, new)
        kernels.rank(old.view(1, -1), indices.cpu().numpy().astype(np.int32), ClassMap.of("BF16", 108))
    finally:
        torch.Tensor.cpu = original  # type: ignore[method-assign]
    assert max(copied) <= len(indices)
