"""Tensors as bit patterns, and changes as differences of ordered integers.

A floating point pattern of 8, 16 or 32 bits maps to an unsigned integer in the order of the numbers it stands for
(`ordered`). A change is the difference of two such integers modulo 2^width, read as signed (`difference`), so that
changes form a group: they add up, they can be negated, and one step to the next representable number is +1 or -1.
Nothing here interprets a pattern as a number: NaN payloads and -0 are patterns like any other.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

UNSIGNED: dict[int, type[np.unsignedinteger]] = {8: np.uint8, 16: np.uint16, 32: np.uint32}
SIGNED: dict[int, type[np.signedinteger]] = {8: np.int8, 16: np.int16, 32: np.int32}

_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_TORCH_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_FLAGS = 1 << 11  # words compared as a whole: they fit the nearest caches
_BLOCK = 1 << 17  # 8-byte words compared at a time: 1 MiB of each side, so that the second look finds them in cache


def dtype_code(dtype: torch.dtype) -> str:
    """safetensors code of a torch dtype, for example `"BF16"`; ValueError if hubsync cannot carry that dtype."""
    if dtype not in _CODES:
        raise ValueError(f"{dtype} cannot be synced; supported are {', '.join(map(str, _CODES))}")
    return _CODES[dtype]


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns of a contiguous CPU tensor as a flat unsigned array of the element's width, without a copy."""
    dtype_code(tensor.dtype)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"need a contiguous CPU tensor, got {tuple(tensor.shape)} on {tensor.device}")
    flat = tensor.detach().reshape(-1).view(_TORCH_INTEGERS[tensor.element_size()]).numpy()
    return flat.view(UNSIGNED[8 * tensor.element_size()])


def ordered(bits: np.ndarray) -> np.ndarray:
    """Patterns -> unsigned integers in the order of the numbers: all bits of negatives flipped, else the sign bit."""
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


def unordered(integers: np.ndarray) -> np.ndarray:
    """Inverse of `ordered`."""
    sign = integers.dtype.type(1 << (8 * integers.itemsize - 1))
    return np.where(integers & sign, integers ^ sign, ~integers)


def difference(old_bits: np.ndarray, new_bits: np.ndarray) -> np.ndarray:
    """Signed steps from old to new, (ordered(new) - ordered(old)) mod 2^width, same shape, int8/16/32."""
    return (ordered(new_bits) - ordered(old_bits)).view(SIGNED[8 * old_bits.itemsize])


def advance(old_bits: np.ndarray, diffs: np.ndarray) -> np.ndarray:
    """New patterns from old patterns and signed steps of the same width; inverse of `difference`."""
    return unordered(ordered(old_bits) + diffs.view(old_bits.dtype))


def find_changes(old_bits: np.ndarray, new_bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All positions where two flat arrays of one unsigned dtype differ.

    Returns:
        (indices, diffs): int64 ascending, and the signed differences at these indices. Memory is O(changes).
    """
    if old_bits.dtype != new_bits.dtype or old_bits.shape != new_bits.shape or old_bits.ndim != 1:
        raise ValueError(
            f"cannot compare {old_bits.dtype}{list(old_bits.shape)} with {new_bits.dtype}{list(new_bits.shape)}"
        )
    lanes = 8 // old_bits.itemsize
    whole = len(old_bits) // lanes
    old_words = old_bits[: whole * lanes].view(np.uint64)
    new_words = new_bits[: whole * lanes].view(np.uint64)
    touched = np.empty(min(_BLOCK, whole), np.int64)
    flags = np.empty(_FLAGS, np.uint8)
    indices = np.empty(_BLOCK // 64, np.int64)
    diffs = np.empty(_BLOCK // 64, SIGNED[8 * old_bits.itemsize])
    found = 0
    for start in range(0, whole, _BLOCK):
        stop = min(start + _BLOCK, whole)
        count = _unequal_words(old_words, new_words, start, stop, flags, flags.view(np.uint64), touched)
        if found + count * lanes > len(indices):
            capacity = max(2 * len(indices), found + count * lanes)
            indices, diffs = _resized(indices, found, capacity), _resized(diffs, found, capacity)
        found = _unequal_lanes(old_words, new_words, touched[:count], indices, diffs, found)
    indices, diffs = _resized(indices, found, found), _resized(diffs, found, found)
    return _with_tail(old_bits, new_bits, whole * lanes, indices, diffs)


def _with_tail(
    old_bits: np.ndarray, new_bits: np.ndarray, start: int, indices: np.ndarray, diffs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Append the changes among the last few elements, which do not fill an 8-byte word."""
    old_tail, new_tail = old_bits[start:], new_bits[start:]
    at = np.flatnonzero(old_tail != new_tail)
    if at.size == 0:
        return indices, diffs
    return np.concatenate([indices, at + start]), np.concatenate([diffs, difference(old_tail[at], new_tail[at])])


def _resized(array: np.ndarray, used: int, capacity: int) -> np.ndarray:
    out = np.empty(capacity, array.dtype)
    out[:used] = array[:used]
    return out


@intrinsic
def trailing_zeros(typing_context, word):  # type: ignore[no-untyped-def]
    """Number of zero bits below the lowest set bit of a uint64 (64 for zero); for compiled code only."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.cttz(args[0], context.get_constant(types.boolean, False))

    return types.uint64(types.uint64), codegen


@intrinsic
def leading_zeros(typing_context, word):  # type: ignore[no-untyped-def]
    """Number of zero bits above the highest set bit of a uint64 (64 for zero); for compiled code only."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ctlz(args[0], context.get_constant(types.boolean, False))

    return types.uint64(types.uint64), codegen


@njit(nogil=True, cache=True)
def _unequal_words(
    old: np.ndarray,
    new: np.ndarray,
    start: int,
    stop: int,
    flags: np.ndarray,
    flag_words: np.ndarray,
    touched: np.ndarray,
) -> int:
    """List the words of `start..stop` that differ. Almost all are equal, so this loop is the cost of a comparison.

    A block is first compared as a whole, which is as fast as memory can be read and leaves it in cache; then word by
    word, into a byte each (`flags`, also seen as `flag_words`), of which eight are looked at together.
    """
    count = 0
    size = len(flags)
    for first in range(start, stop, size):
        a, b = old[first : min(first + size, stop)], new[first : min(first + size, stop)]
        unequal = np.uint64(0)
        for i in range(len(a)):
            unequal |= a[i] ^ b[i]
        if unequal == 0:
            continue
        for i in range(len(a)):
            flags[i] = a[i] != b[i]
        flags[len(a) :] = 0
        for i in range(len(flag_words)):
            eight = flag_words[i]
            while eight != 0:
                touched[count] = first + 8 * i + np.int64(trailing_zeros(eight) >> np.uint64(3))
                count += 1
                eight &= eight - np.uint64(1)
    return count


@njit(nogil=True, cache=True)
def _unequal_lanes(
    old: np.ndarray, new: np.ndarray, touched: np.ndarray, indices: np.ndarray, diffs: np.ndarray, found: int
) -> int:
    """Split the differing words into elements (little-endian lanes as wide as `diffs`) and append those that differ."""
    width = np.uint64(8 * diffs.itemsize)
    log_width = trailing_zeros(width)
    log_lanes = np.uint64(6) - log_width
    top = width - np.uint64(1)
    sign = np.uint64(1) << top
    mask = sign | (sign - np.uint64(1))
    for i in range(len(touched)):
        word = np.uint64(touched[i])
        a, b = old[word], new[word]
        unequal = a ^ b
        while unequal != 0:
            lane = trailing_zeros(unequal) >> log_width
            shift = lane << log_width
            unequal &= ~(mask << shift)
            indices[found] = (word << log_lanes) | lane
            # The store keeps the low `width` bits: the difference modulo 2^width.
            diffs[found] = _rank((b >> shift) & mask, top, sign, mask) - _rank((a >> shift) & mask, top, sign, mask)
            found += 1
    return found


@njit(nogil=True, cache=True)
def _rank(bits: np.uint64, top: np.uint64, sign: np.uint64, mask: np.uint64) -> np.uint64:
    """Scalar `ordered`, without a branch as signs are unpredictable: xor with `mask` if negative, else with `sign`."""
    return bits ^ (sign | ((np.uint64(0) - (bits >> top)) & mask))
