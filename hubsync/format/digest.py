"""The digest of a published view: a 128-bit sum over elements of mix(tensor, flat index, bits).

The digest is two sums modulo 2^64 (lanes A and B). They do not depend on order, so they add up over shards, threads and
devices. After a delta they follow in O(changes): `digest(new) == digest(old) + digest_change(...)`. In each lane
element i adds

    spread(pattern) * place[i mod 2048] * block(tensor, i div 2048)      modulo 2^64

`place` is a table of odd pseudo-random numbers. `block` is an odd number made from the tensor's seed. `spread` is the
quadratic permutation y (2 y + 1) with y = pattern + 1. So zeros count. A step from a wrong pattern adds another number
than the same step from the right one, so a delta applied to damaged weights gives a wrong digest. The permutation and
the odd factors make the mix injective in the pattern: one changed element always changes both sums. Any other
accidental change is missed with a probability of about 2^-64 in each lane, as with multilinear hashes (Carter and
Wegman).

The cost is one multiplication for each lane and element, and one for both lanes: block factors are computed once for
2048 elements. The sums are no defence against weights chosen by an attacker. The SHA-256 of parts and signed manifests
are.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, overload

import numpy as np
import torch

from hubsync import kernels
from hubsync.errors import FormatError
from hubsync.kernels.bits import UNSIGNED, integers_in
from hubsync.kernels.compiled import compiled
from hubsync.kernels.parallel import each, pieces

from .table import TensorTable

_MASK = (1 << 64) - 1
_HEX = re.compile(r"[0-9a-f]{32}")

# splitmix64: a Weyl increment (2^64 / golden ratio) and two rounds. One more round, with a multiplier of murmur3, makes
# lane B.
_STRIDE = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xFF51AFD7ED558CCD)

_NP_STRIDE = np.uint64(_STRIDE)
_M1, _M2, _M3 = (np.uint64(multiplier) for multiplier in _MULTIPLIERS)
_1, _27, _30, _31, _33 = (np.uint64(count) for count in (1, 27, 30, 31, 33))

_LOG_BLOCK = 11
_BLOCK = 1 << _LOG_BLOCK  # elements that share a block factor; the place factors fit the L1 cache

_PIECE = 1 << 21  # elements that are worth another thread
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

    @classmethod
    def signed(cls, a: int, b: int) -> Digest:
        """From lanes that are given as int64."""
        return cls(a & _MASK, b & _MASK)

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


class DigestList(Sequence[Digest]):
    """Digests of many tensors in one array: uint64[n, 2], both lanes of each."""

    def __init__(self, lanes: np.ndarray):
        self.lanes = lanes

    @classmethod
    def of(cls, digests: Iterable[Digest]) -> DigestList:
        return cls(np.array([(digest.a, digest.b) for digest in digests], np.uint64).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self.lanes)

    @overload
    def __getitem__(self, index: int) -> Digest: ...

    @overload
    def __getitem__(self, index: slice) -> DigestList: ...

    def __getitem__(self, index: int | slice) -> Digest | DigestList:
        if isinstance(index, slice):
            return DigestList(self.lanes[index])
        a, b = self.lanes[index].tolist()
        return Digest(a, b)

    @property
    def total(self) -> Digest:
        return Digest(*self.lanes.sum(axis=0, dtype=np.uint64).tolist())


def tensor_seed(name: str) -> int:
    """64-bit seed of a tensor, from its checkpoint name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def digest_range(seed: int, bits: np.ndarray, start: int = 0) -> Digest:
    """Digest of elements `start .. start + len(bits)` of a tensor, given as a flat unsigned array."""

    def sums(cut: slice) -> Digest:
        return Digest(*map(int, _sum_range(np.uint64(seed), start + cut.start, bits[cut], *_PLACES)))

    return sum(each(sums, pieces(len(bits), _PIECE)), Digest())


def digest_at(seed: int, indices: np.ndarray, bits: np.ndarray) -> Digest:
    """Digest of the elements at `indices` (int64[n], flat in the tensor) with patterns `bits` (unsigned[n])."""
    if indices.shape != bits.shape:
        raise ValueError(f"{len(indices)} indices do not go with {len(bits)} patterns")
    return Digest(*map(int, _sum_at(np.uint64(seed), indices, bits, *_PLACES)))


def digest_change(seed: int, indices: np.ndarray, old_bits: np.ndarray, new_bits: np.ndarray) -> Digest:
    """Change of a view's digest when the elements at `indices` go from `old_bits` to `new_bits`."""
    return digest_at(seed, indices, new_bits) - digest_at(seed, indices, old_bits)


def digest_torch(
    seed: int, tensor_bits: torch.Tensor, start: int = 0, *, indices: torch.Tensor | None = None
) -> Digest:
    """The same values as `digest_range` (or, with `indices`, `digest_at`), computed on the tensor's device.

    Args:
        tensor_bits: integer view (uint8, int16, int32) of the elements, read in row-major order; any device and stride.
        start: flat index of the first element, when `indices` is None.
        indices: int64 flat indices, one for each element, on the same device.
    """
    flat = tensor_bits.reshape(-1)
    if indices is not None and indices.numel() != flat.numel():
        raise ValueError(f"{indices.numel()} indices do not go with {flat.numel()} patterns")
    if kernels.on_gpu(flat):
        at = None if indices is None else indices.reshape(-1)
        a, b = kernels.gpu_kernels().digest_sums(flat, _places_on(flat.device), _keys(seed), start, at)
        return Digest.signed(a, b)
    if flat.device.type != "cpu":
        return _torch_sums(seed, flat, start, indices)
    bits = flat.numpy().view(UNSIGNED[8 * flat.element_size()])
    return digest_range(seed, bits, start) if indices is None else digest_at(seed, indices.reshape(-1).numpy(), bits)


def digest_view(table: TensorTable, tensors: Mapping[str, torch.Tensor]) -> Digest:
    """Digest of a whole published view: every tensor of the table, contiguous, in its served dtype, on its device."""
    return sum((digest_torch(tensor_seed(spec.name), integers_in(tensors[spec.name])) for spec in table), Digest())


def _torch_sums(seed: int, flat: torch.Tensor, start: int, indices: torch.Tensor | None) -> Digest:
    """The loops below as torch operations, a chunk at a time. int64 arithmetic is modulo 2^64 on every device."""
    mask = (1 << (8 * flat.element_size())) - 1
    places = _places_on(flat.device)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for first in range(0, flat.numel(), _TORCH_CHUNK):
        part = flat[first : first + _TORCH_CHUNK]
        if indices is None:
            at = torch.arange(start + first, start + first + part.numel(), dtype=torch.int64, device=flat.device)
        else:
            at = indices.reshape(-1)[first : first + _TORCH_CHUNK].to(torch.int64)
        y = part.to(torch.int64).bitwise_and_(mask).add_(1)
        spread = (2 * y + 1).mul_(y)
        place, blocks = at & (_BLOCK - 1), _torch_blocks(seed, at >> _LOG_BLOCK)
        for lane in range(2):
            total[lane] += (spread * places[lane, place]).mul_(blocks[lane]).sum()
    return Digest.signed(*total.tolist())


def _torch_blocks(seed: int, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_block` for many blocks, as int64."""
    key, stride, m1, m2, m3 = _keys(seed)
    z = number * stride + key
    z = z.bitwise_xor_(_shift_right(z, 30)).mul_(m1)
    z = z.bitwise_xor_(_shift_right(z, 27)).mul_(m2)
    a = z.bitwise_xor_(_shift_right(z, 31))
    z = a * m3
    return a | 1, z.bitwise_xor_(_shift_right(z, 33)) | 1


def key_of(seed: int) -> int:
    """The key of block 0 of a tensor, as int64. Keys of blocks are a stride apart."""
    return _signed(seed + _STRIDE)


def _keys(seed: int) -> tuple[int, ...]:
    """The key of block 0, the stride between blocks, and the multipliers, as int64."""
    return key_of(seed), _signed(_STRIDE), *map(_signed, _MULTIPLIERS)


def device_constants(device: torch.device) -> Any:
    """What the kernels of `kernels.gpu.digest` need to compute these digests: its `Constants`."""
    constants = import_module("hubsync.kernels.gpu.digest").Constants
    first, second, third = map(_signed, _MULTIPLIERS)
    return constants(_places_on(device), _signed(_STRIDE), (first, second, third))


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`. torch multiplies and adds int64 modulo 2^64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift. torch shifts int64 arithmetically."""
    return (z >> count).bitwise_and_((1 << (64 - count)) - 1)


def _place_tables() -> tuple[np.ndarray, np.ndarray]:
    """The place factors of lanes A and B, uint64[2048] each: the first block factors of seed 0."""
    blocks = [_block(np.uint64(0), np.uint64(number)) for number in range(_BLOCK)]
    a, b = np.array(blocks, np.uint64).T
    return np.ascontiguousarray(a), np.ascontiguousarray(b)


@functools.cache
def _places_on(device: torch.device) -> torch.Tensor:
    """The place factors as int64[2, 2048] on a device."""
    return torch.from_numpy(np.stack(_PLACES).view(np.int64)).to(device)


@compiled
def _block(seed: np.uint64, number: np.uint64) -> tuple[np.uint64, np.uint64]:
    """The factors of a block in both lanes."""
    z = seed + (number + _1) * _NP_STRIDE
    z = (z ^ (z >> _30)) * _M1
    z = (z ^ (z >> _27)) * _M2
    a = z ^ (z >> _31)
    z = a * _M3
    return a | _1, (z ^ (z >> _33)) | _1


@compiled
def _spread(pattern: np.uint64) -> np.uint64:
    y = pattern + _1
    return y * (y + y + _1)


@compiled
def _sum_range(
    seed: np.uint64, start: int, bits: np.ndarray, place_a: np.ndarray, place_b: np.ndarray
) -> tuple[np.uint64, np.uint64]:
    a, b = np.uint64(0), np.uint64(0)
    done = 0
    while done < len(bits):
        number, place = (start + done) // _BLOCK, (start + done) % _BLOCK
        a0, b0 = _block(seed, np.uint64(number))
        if place == 0 and done + 2 * _BLOCK <= len(bits):
            a1, b1 = _block(seed, np.uint64(number + 1))
            middle, end = done + _BLOCK, done + 2 * _BLOCK
            in_a0, in_b0, in_a1, in_b1 = _sum_two(bits[done:middle], bits[middle:end], place_a, place_b)
            a += in_a0 * a0 + in_a1 * a1
            b += in_b0 * b0 + in_b1 * b1
        else:
            end = min(done + _BLOCK - place, len(bits))
            in_a0, in_b0 = _sum_part(bits[done:end], place_a[place:], place_b[place:])
            a += in_a0 * a0
            b += in_b0 * b0
        done = end
    return a, b


# This loop is the cost of a digest. It is this plain so that LLVM turns it into vector code. It takes two blocks at a
# time to load the place factors half as often.
@compiled
def _sum_two(
    first: np.ndarray, second: np.ndarray, place_a: np.ndarray, place_b: np.ndarray
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    a0, b0, a1, b1 = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for i in range(len(first)):
        x, y = _spread(np.uint64(first[i])), _spread(np.uint64(second[i]))
        a0 += x * place_a[i]
        b0 += x * place_b[i]
        a1 += y * place_a[i]
        b1 += y * place_b[i]
    return a0, b0, a1, b1


@compiled
def _sum_part(bits: np.ndarray, place_a: np.ndarray, place_b: np.ndarray) -> tuple[np.uint64, np.uint64]:
    a, b = np.uint64(0), np.uint64(0)
    for i in range(len(bits)):
        x = _spread(np.uint64(bits[i]))
        a += x * place_a[i]
        b += x * place_b[i]
    return a, b


@compiled
def _sum_at(
    seed: np.uint64, indices: np.ndarray, bits: np.ndarray, place_a: np.ndarray, place_b: np.ndarray
) -> tuple[np.uint64, np.uint64]:
    a, b = np.uint64(0), np.uint64(0)
    last, factor_a, factor_b = np.int64(-1), _1, _1
    for i in range(len(bits)):
        number, place = indices[i] // _BLOCK, indices[i] % _BLOCK
        if number != last:  # indices mostly ascend
            factor_a, factor_b = _block(seed, np.uint64(number))
            last = number
        x = _spread(np.uint64(bits[i]))
        a += x * place_a[place] * factor_a
        b += x * place_b[place] * factor_b
    return a, b


_PLACES = _place_tables()
