"""Tensors as bit patterns, and changes as differences of ordered integers.

`ordered` maps a floating point pattern of 8, 16 or 32 bits to an unsigned integer in the order of the numbers. A change
is the difference of two such integers modulo 2^width, read as signed (`difference`). So changes form a group: they add
up and can be negated. The step to the next representable number is +1 or -1. Patterns are never interpreted as numbers:
NaN payloads and -0 are patterns like any other.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .compiled import compiled
from .parallel import each, pieces

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
_COMPARED = 64  # elements compared at once: one bit of a word each
_BLOCK = 32 * _COMPARED  # elements read before their changes are listed; they fit the L1 cache
_AHEAD = 2048  # bytes to prefetch ahead of the comparison, so that they arrive while changes are listed
_LINE = 64  # bytes of a cache line
_PIECE = 1 << 21  # elements that are worth another thread
_CAPACITY = 1 << 14  # changes that the first lists hold
_ROUNDED = 1 << 12  # float32 elements rounded at once; they fit the L1 cache with their flags
_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_HALF, _1, _16, _31 = np.uint32(0x7FFF), np.uint32(1), np.uint32(16), np.uint32(31)


def dtype_code(dtype: torch.dtype) -> str:
    """safetensors code of a torch dtype, for example `"BF16"`; ValueError if hubsync cannot carry that dtype."""
    if dtype not in _CODES:
        raise ValueError(f"{dtype} cannot be synced; supported are {', '.join(map(str, _CODES))}")
    return _CODES[dtype]


def integers_in(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor, flat, as integers of their width, on its device. A copy if it is not contiguous."""
    return tensor.detach().contiguous().view(-1).view(_TORCH_INTEGERS[tensor.element_size()])


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns of a contiguous CPU tensor as a flat unsigned array of the element's width, without a copy."""
    dtype_code(tensor.dtype)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"need a contiguous CPU tensor, got {tuple(tensor.shape)} on {tensor.device}")
    flat = tensor.detach().reshape(-1).view(_TORCH_INTEGERS[tensor.element_size()]).numpy()
    return flat.view(UNSIGNED[8 * tensor.element_size()])


def integers_of(patterns: np.ndarray) -> torch.Tensor:
    """Patterns of 8, 16 or 32 bits as a CPU tensor of torch's integers of that width, without a copy."""
    return torch.from_numpy(patterns.view(f"i{patterns.itemsize}" if patterns.itemsize > 1 else np.uint8))


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
    old_bits, new_bits = np.ascontiguousarray(old_bits), np.ascontiguousarray(new_bits)
    cuts = pieces(len(old_bits), _PIECE)
    found = each(lambda cut: _find(old_bits[cut], new_bits[cut]), cuts)
    if len(found) == 1:
        return found[0]
    indices = np.concatenate([own + cut.start for cut, (own, _) in zip(cuts, found, strict=True)])
    return indices, np.concatenate([diffs for _, diffs in found])


def _find(old_bits: np.ndarray, new_bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`find_changes` on one thread."""
    whole = len(old_bits) // _COMPARED * _COMPARED
    indices = np.empty(_CAPACITY, np.int64)
    diffs = np.empty(_CAPACITY, SIGNED[8 * old_bits.itemsize])
    start, found = 0, 0
    while start < whole:
        start, found = _unequal(old_bits, new_bits, start, whole, indices, diffs, found)
        if start < whole:  # the lists may be too short for the next block
            likely = int(1.05 * found * whole / max(start, 1)) + _BLOCK
            capacity = min(max(likely, found + _CAPACITY), 8 * len(indices))
            indices, diffs = _resized(indices, found, capacity), _resized(diffs, found, capacity)
    if len(indices) > found + found // 4:
        indices, diffs = _resized(indices, found, found), _resized(diffs, found, found)
    indices, diffs = indices[:found], diffs[:found]
    return _with_tail(old_bits, new_bits, whole, indices, diffs)


def _with_tail(
    old_bits: np.ndarray, new_bits: np.ndarray, start: int, indices: np.ndarray, diffs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Append the changes of the last elements, fewer than `_COMPARED`."""
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


@intrinsic
def unequal_mask(typing_context, old, new, start):  # type: ignore[no-untyped-def]
    """Bits of a uint64: which of the 64 elements from `start` on differ. For compiled code only.

    LLVM turns it into a few vector comparisons. It does not do so for a loop, whose results it cannot collect in bits.

    Args:
        old, new: contiguous arrays of one unsigned type. Their length is not checked.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        element = context.get_value_type(signature.args[0].dtype)
        sides = []
        for kind, array in zip(signature.args[:2], args[:2], strict=True):
            data = context.make_array(kind)(context, builder, value=array).data
            address = builder.gep(data, [args[2]])
            vector = builder.bitcast(address, ir.VectorType(element, _COMPARED).as_pointer())
            sides.append(builder.load(vector, align=element.width // 8))
        return builder.bitcast(builder.icmp_unsigned("!=", *sides), ir.IntType(_COMPARED))

    return types.uint64(old, new, types.int64), codegen


@intrinsic
def prefetch(typing_context, array, index):  # type: ignore[no-untyped-def]
    """Prefetch the cache line of an element. For compiled code only. An index beyond the end is harmless."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_read, keep, of_data = flag(0), flag(3), flag(1)
        address = builder.bitcast(builder.gep(data, [args[1]]), byte)
        builder.call(function, [address, to_read, keep, of_data])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def ones(typing_context, word):  # type: ignore[no-untyped-def]
    """Number of set bits of a uint64; for compiled code only."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@compiled
def _unequal(
    old: np.ndarray, new: np.ndarray, start: int, stop: int, indices: np.ndarray, diffs: np.ndarray, found: int
) -> tuple[int, int]:
    """Append the changes of `start .. stop`, multiples of 64, while the lists have space for another block.

    A block is read at memory speed. Then its changes are listed, while the next block is prefetched. Without the
    prefetch, memory idles meanwhile, which costs a fifth of the time. Two changes of each 64 elements are written
    unconditionally: more are rare, and an unpredictable branch costs more than both writes (simdjson flattens its bits
    the same way).

    Returns:
        (start, found): the next element, and the number of changes.
    """
    width = np.uint64(8 * diffs.itemsize)
    top = width - np.uint64(1)
    sign = np.uint64(1) << top
    mask = sign | (sign - np.uint64(1))
    unequal = np.empty(_BLOCK // _COMPARED, np.uint64)
    ahead, line = _AHEAD // old.itemsize, _LINE // old.itemsize
    while start < stop and found + _BLOCK <= len(indices):
        end, first, any_unequal = min(start + _BLOCK, stop), found, np.uint64(0)
        count = (end - start) // _COMPARED
        for i in range(count):
            for at in range(start + i * _COMPARED + ahead, start + (i + 1) * _COMPARED + ahead, line):
                prefetch(old, at)
                prefetch(new, at)
            unequal[i] = unequal_mask(old, new, start + i * _COMPARED)
            any_unequal |= unequal[i]
        if any_unequal == 0:
            start = end
            continue
        for i in range(count):
            base, left, slot = np.uint64(start + i * _COMPARED), unequal[i], np.uint64(found)
            found += int(np.int64(ones(left)))
            indices[slot] = base + trailing_zeros(left)
            left &= left - np.uint64(1)
            indices[slot + np.uint64(1)] = base + trailing_zeros(left)
            left &= left - np.uint64(1)
            slot += np.uint64(2)
            while left != 0:
                indices[slot] = base + trailing_zeros(left)
                left &= left - np.uint64(1)
                slot += np.uint64(1)
        for i in range(first, found):
            index = np.uint64(indices[i])
            # The store keeps the low `width` bits: the difference modulo 2^width.
            a, b = np.uint64(old[index]), np.uint64(new[index])
            diffs[i] = _rank(b, top, sign, mask) - _rank(a, top, sign, mask)
        start = end
    return start, found


@compiled
def _rank(bits: np.uint64, top: np.uint64, sign: np.uint64, mask: np.uint64) -> np.uint64:
    """Scalar `ordered` without a branch, because signs are unpredictable: xor with `mask` if negative, else `sign`."""
    return bits ^ (sign | ((np.uint64(0) - (bits >> top)) & mask))


# --- float32 weights and their bfloat16 view, without holding the whole new view -----------------------
#
# Rounding is torch's: to nearest, ties to even. The pattern that torch rounds a NaN to depends on its place in memory
# and on the processor. So these kernels only report that a NaN is present, and the caller casts the tensor with torch.


def round_into(out: np.ndarray, values: np.ndarray) -> bool:
    """Write the bfloat16 patterns of float32 patterns. If there is a NaN, return False; `out` is then undefined.

    Args:
        out: uint16[n].
        values: uint32[n].
    """
    return bool(_round(values, out))


def rounded_changes(values: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Elements whose float32 pattern rounds to another bfloat16 pattern than the old one; None if there is a NaN.

    Args:
        values: uint32[n].
        old: uint16[n].

    Returns:
        (indices, new): int64 ascending, and the new bfloat16 patterns there. Memory is O(changes).
    """
    indices, new = np.empty(_CAPACITY, np.int64), np.empty(_CAPACITY, np.uint16)
    flags = np.empty(_ROUNDED, np.uint8)
    start, found = 0, 0
    while start < len(values):
        if len(indices) - found < _ROUNDED:
            indices, new = (_resized(array, found, 2 * len(indices)) for array in (indices, new))
        start, found = _changes(values, old, start, flags, flags.view(np.uint64), indices, new, found)
        if start < 0:
            return None
    return _resized(indices, found, found), _resized(new, found, found)


# The loops over elements are this plain, and separate, so that LLVM turns them into vector code.


@njit(nogil=True, inline="always")
def _rounded(value: np.uint32) -> np.uint16:
    return np.uint16(np.uint32(value + ((np.uint32(value >> _16) & _1) + _HALF)) >> _16)


@njit(nogil=True, inline="always")
def _has_nan(values: np.ndarray) -> bool:
    beyond = np.uint32(0)
    for i in range(len(values)):
        beyond |= np.uint32(_INFINITY - (values[i] & _MAGNITUDE))  # below zero, hence with the top bit, for a NaN
    return beyond >> _31 != 0


@compiled
def _round(values: np.ndarray, out: np.ndarray) -> bool:
    for first in range(0, len(values), _ROUNDED):
        a, b = values[first : first + _ROUNDED], out[first : first + _ROUNDED]
        if _has_nan(a):
            return False
        for i in range(len(a)):
            b[i] = _rounded(a[i])
    return True


@compiled
def _changes(
    values: np.ndarray,
    old: np.ndarray,
    start: int,
    flags: np.ndarray,
    flag_words: np.ndarray,
    indices: np.ndarray,
    new: np.ndarray,
    found: int,
) -> tuple[int, int]:
    """List changes from element `start` on, while the lists have space for another block.

    Returns the next element (-1 for a NaN) and the number of changes. A block is first compared without a branch, into
    a byte for each element (`flags`, also viewed as `flag_words`). Then eight flags are tested at once.
    """
    for first in range(start, len(values), _ROUNDED):
        if len(indices) - found < _ROUNDED:
            return first, found
        a, b = values[first : first + _ROUNDED], old[first : first + _ROUNDED]
        if _has_nan(a):
            return -1, found
        for i in range(len(a)):
            flags[i] = _rounded(a[i]) != b[i]
        flags[len(a) :] = 0
        for i in range(len(flag_words)):
            eight = flag_words[i]
            while eight != 0:
                at = 8 * i + np.int64(trailing_zeros(eight) >> np.uint64(3))
                indices[found], new[found] = first + at, _rounded(a[at])
                found += 1
                eight &= eight - np.uint64(1)
    return len(values), found
