"""The digest of a published view: a 128-bit sum over elements of mix(tensor, flat index, bits).

Two sums modulo 2^64 (lanes A and B) that do not depend on order, so they add up over shards, threads and devices, and
follow from a delta in O(changes): `digest(new) == digest(old) + digest_change(...)`. In each lane the mix of an element
is injective in its pattern for a given tensor and index, so one changed element always changes both sums; any other
accidental change goes unseen with a chance of about 2^-64 or less. The digest is linear, hence no defence against
somebody who chooses weights on purpose: that is what the SHA-256 of parts and signed manifests are for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from . import kernels
from .bits import UNSIGNED, bits_of
from .errors import FormatError
from .table import TensorTable

_MASK = (1 << 64) - 1
_HEX = re.compile(r"[0-9a-f]{32}")

# splitmix64: a Weyl increment (2^64 / golden ratio, so that keys of different elements stay far apart) and two rounds,
# whose result is lane A; one round more, with a multiplier of murmur3, makes lane B. After one round only, sums of
# opposite +-1 steps would still show a pattern in their high bits.
_STRIDE = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xFF51AFD7ED558CCD)

_NP_STRIDE = np.uint64(_STRIDE)
_M1, _M2, _M3 = (np.uint64(multiplier) for multiplier in _MULTIPLIERS)
_1, _27, _30, _31, _33 = (np.uint64(count) for count in (1, 27, 30, 31, 33))

_TORCH_CHUNK = 1 << 20  # elements; bounds the int64 temporaries of `digest_torch` to a few times 8 MiB


@dataclass(frozen=True)
class Digest:
    """A 128-bit digest, or the difference of two: lanes A and B, each an integer modulo 2^64. `Digest()` is zero."""

    a: int = 0
    b: int = 0

    def __add__(self, other: Digest) -> Digest:
        return Digest((self.a + other.a) & _MASK, (self.b + other.b) & _MASK)

    def __sub__(self, other: Digest) -> Digest:
        return Digest((self.a - other.a) & _MASK, (self.b - other.b) & _MASK)

    @property
    def hex(self) -> str:
        """32 lower-case hex digits, lane A first."""
        return f"{self.a:016x}{self.b:016x}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Inverse of `hex`; FormatError for anything else."""
        if not isinstance(text, str) or not _HEX.fullmatch(text):
            raise FormatError(f"not a digest of 32 hex digits: {text!r:.80}")
        return cls(int(text[:16], 16), int(text[16:], 16))

    def __str__(self) -> str:
        return self.hex


def tensor_seed(name: str) -> int:
    """64-bit seed of a tensor, from its checkpoint name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def digest_range(seed: int, bits: np.ndarray, start: int = 0) -> Digest:
    """Digest of elements `start .. start + len(bits)` of a tensor, given as a flat unsigned array."""
    return Digest(*map(int, _sum_range(np.uint64((seed + (start + 1) * _STRIDE) & _MASK), bits)))


def digest_at(seed: int, indices: np.ndarray, bits: np.ndarray) -> Digest:
    """Digest of the elements at `indices` (int64[n], flat in the tensor) with patterns `bits` (unsigned[n])."""
    if indices.shape != bits.shape:
        raise ValueError(f"{len(indices)} indices do not go with {len(bits)} patterns")
    return Digest(*map(int, _sum_at(np.uint64(seed), indices, bits)))


def digest_change(seed: int, indices: np.ndarray, old_bits: np.ndarray, new_bits: np.ndarray) -> Digest:
    """What the digest of a view grows by when the elements at `indices` go from `old_bits` to `new_bits`."""
    return digest_at(seed, indices, new_bits) - digest_at(seed, indices, old_bits)


def digest_torch(
    seed: int, tensor_bits: torch.Tensor, start: int = 0, *, indices: torch.Tensor | None = None
) -> Digest:
    """The same values as `digest_range` (or, with `indices`, `digest_at`), computed where the tensor lives.

    Args:
        tensor_bits: integer view (uint8, int16, int32) of the elements, read in row-major order; any device and stride.
        start: flat index of the first element, when `indices` is None.
        indices: int64 flat indices, one for each element, on the same device.
    """
    flat = tensor_bits.reshape(-1)
    if indices is not None and indices.numel() != flat.numel():
        raise ValueError(f"{indices.numel()} indices do not go with {flat.numel()} patterns")
    if kernels.on_gpu(flat):
        key = seed + (1 if indices is not None else start + 1) * _STRIDE
        at = None if indices is None else indices.reshape(-1)
        constants = _signed(key), _signed(_STRIDE), tuple(map(_signed, _MULTIPLIERS))
        a, b = kernels.gpu().digest_sums(flat, *constants, at)
        return Digest(a & _MASK, b & _MASK)
    if flat.device.type != "cpu":
        return _torch_sums(seed, flat, start, indices)
    bits = flat.numpy().view(UNSIGNED[8 * flat.element_size()])
    return digest_range(seed, bits, start) if indices is None else digest_at(seed, indices.reshape(-1).numpy(), bits)


def digest_view(table: TensorTable, tensors: Mapping[str, torch.Tensor]) -> Digest:
    """Digest of a whole published view: every tensor of the table, contiguous on the CPU, in its served dtype."""
    total = Digest()
    for spec in table:
        total += digest_range(tensor_seed(spec.name), bits_of(tensors[spec.name]))
    return total


def _torch_sums(seed: int, flat: torch.Tensor, start: int, indices: torch.Tensor | None) -> Digest:
    """The loops below in torch operations, a chunk at a time; int64 arithmetic is modulo 2^64 on every device."""
    mask = (1 << (8 * flat.element_size())) - 1
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for first in range(0, flat.numel(), _TORCH_CHUNK):
        part = flat[first : first + _TORCH_CHUNK]
        if indices is None:
            at = torch.arange(start + first, start + first + part.numel(), dtype=torch.int64, device=flat.device)
        else:
            at = indices.reshape(-1)[first : first + _TORCH_CHUNK].to(torch.int64)
        z = (at * _signed(_STRIDE)).add_(_signed(seed + _STRIDE)).add_(part.to(torch.int64).bitwise_and_(mask))
        z = z.bitwise_xor_(_shift_right(z, 30)).mul_(_signed(_MULTIPLIERS[0]))
        z = z.bitwise_xor_(_shift_right(z, 27)).mul_(_signed(_MULTIPLIERS[1]))
        z = z.bitwise_xor_(_shift_right(z, 31))
        total[0] += z.sum()
        z = z.mul_(_signed(_MULTIPLIERS[2]))
        z = z.bitwise_xor_(_shift_right(z, 33))
        total[1] += z.sum()
    a, b = total.tolist()
    return Digest(a & _MASK, b & _MASK)


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`; torch multiplies and adds int64 modulo 2^64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift; torch's is arithmetic on int64."""
    return (z >> count).bitwise_and_((1 << (64 - count)) - 1)


# The two loops stay this plain so that LLVM inlines the mix and turns them into vector code.


@njit(nogil=True, cache=True)
def _sum_range(key: np.uint64, bits: np.ndarray) -> tuple[np.uint64, np.uint64]:
    a, b = np.uint64(0), np.uint64(0)
    for i in range(len(bits)):
        mixed_a, mixed_b = _mix(key + np.uint64(i) * _NP_STRIDE + np.uint64(bits[i]))
        a += mixed_a
        b += mixed_b
    return a, b


@njit(nogil=True, cache=True)
def _sum_at(seed: np.uint64, indices: np.ndarray, bits: np.ndarray) -> tuple[np.uint64, np.uint64]:
    a, b = np.uint64(0), np.uint64(0)
    for i in range(len(bits)):
        mixed_a, mixed_b = _mix(seed + (np.uint64(indices[i]) + _1) * _NP_STRIDE + np.uint64(bits[i]))
        a += mixed_a
        b += mixed_b
    return a, b


@njit(nogil=True, cache=True)
def _mix(z: np.uint64) -> tuple[np.uint64, np.uint64]:
    """What one element adds to the two lanes."""
    z = (z ^ (z >> _30)) * _M1
    z = (z ^ (z >> _27)) * _M2
    a = z ^ (z >> _31)
    z = a * _M3
    return a, z ^ (z >> _33)
