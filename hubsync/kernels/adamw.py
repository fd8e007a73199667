"""torch's fused AdamW on a CPU, and in the same pass what it changes in the bfloat16 view of its float32 weights.

AdamW on a CPU waits for memory: whoever reads the weights once more, before or after it, adds a good part of its time.
Here a weight is compared while it is in a register. The price is that torch's arithmetic is done by other code than
torch's. `is_torchs` shows on this processor and with this build of torch that both give the same bits; where they do
not, for want of fused multiply-add or because a new torch rounds otherwise, nobody may use `step`.
"""

from __future__ import annotations

import math
import threading
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .bits import bits_of, build_prefetch, trailing_zeros

LANES = 16  # elements updated by one instruction, where the processor has such ones
_BLOCK = 1 << 12  # elements whose old patterns are remembered; they fit the nearest cache
_AHEAD = 1024  # bytes; what is needed this much later is fetched meanwhile
_ROOM = 1 << 14  # changes that lists are first made for
_TRIALS = 64  # settings of the optimizer under which `is_torchs` compares

Lists = tuple[np.ndarray, np.ndarray, np.ndarray]  # indices, old and new patterns


@dataclass(frozen=True)
class Scalars:
    """What all elements have in common in one step of AdamW. They are computed in double, and rounded when used."""

    decay: float  # of the weight
    weight: float  # of the gradient in the mean
    beta2: float
    square_weight: float  # of the squared gradient in the mean of squares
    correction: float  # of the root of that
    eps: float
    rate: float  # below zero

    @classmethod
    def of(cls, step: float, lr: float, beta1: float, beta2: float, weight_decay: float, eps: float) -> Scalars | None:
        """Those of step number `step`, counted from 1; None where torch does other arithmetic than `step` does."""
        if not (0.5 < beta1 < 1 and 0 <= beta2 < 1):
            return None
        correction = math.sqrt(1 - math.pow(beta2, step))
        rate = -(lr / (1 - math.pow(beta1, step)))
        return cls(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, correction, eps, rate)


@dataclass(frozen=True)
class Found:
    """What a step has changed in the bfloat16 view.

    Attributes:
        indices: int64[n] ascending.
        old: uint16[n], the patterns before.
        new: uint16[n], the patterns after.
        unclear: (index of the first element, uint16 old patterns of all) of blocks where there is or was a NaN. They
            are not in the lists: what torch makes of a NaN depends on where in memory it is, so torch has to cast them.
    """

    indices: np.ndarray
    old: np.ndarray
    new: np.ndarray
    unclear: list[tuple[int, np.ndarray]]


class Room(threading.local):
    """What `step` needs beside its tensors. It grows to the changes of one call; each thread has its own."""

    def __init__(self) -> None:
        self.old = np.empty(_BLOCK, np.uint16)
        self.masks = np.empty(_BLOCK // LANES, np.uint16)
        self.lists: Lists = (np.empty(_ROOM, np.int64), np.empty(_ROOM, np.uint16), np.empty(_ROOM, np.uint16))

    def grow(self, used: int) -> None:
        indices, old, new = (np.empty(2 * len(array), array.dtype) for array in self.lists)
        for array, source in zip((indices, old, new), self.lists, strict=True):
            array[:used] = source[:used]
        self.lists = indices, old, new


def step(
    param: np.ndarray,
    grad: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    scalars: Scalars,
    start: int,
    stop: int,
    room: Room,
) -> Found:
    """Update elements `start .. stop`, both multiples of LANES, of a weight and its moments. Memory is O(changes).

    Args:
        param: float32[n], contiguous as all of them; written to, and so are `mean` and `square`.
        grad: float32[n].
        mean: float32[n], torch's `exp_avg`.
        square: float32[n], torch's `exp_avg_sq`.
        room: to be used again for the next call.
    """
    constants, words = np.array(astuple(scalars), np.float32), room.masks.view(np.uint64)
    found, unclear = 0, []
    while start < stop:
        if len(room.lists[0]) - found < _BLOCK:
            room.grow(found)
        start, found, first = _step(
            param, grad, mean, square, constants, start, stop, room.old, room.masks, words, *room.lists, found
        )
        if first >= 0:
            unclear.append((first, room.old[: start - first].copy()))
    indices, old, new = (array[:found].copy() for array in room.lists)
    return Found(indices, old, new, unclear)


@cache
def is_torchs(operator: Any) -> bool:
    """Whether `step` gives the same bits as this operator (`torch._fused_adamw_`, or `torch._fused_adam_` without
    weight decay) here: on numbers of all sizes, under random settings of the optimizer."""
    random = np.random.default_rng(0)
    for _ in range(_TRIALS):
        settings = {
            "lr": 10 ** random.uniform(-7, 0),
            "beta1": random.uniform(0.55, 0.999),
            "beta2": random.uniform(0.0, 0.9999),
            "weight_decay": random.uniform(0, 1) if operator is torch._fused_adamw_ else 0.0,
            "eps": 10 ** random.uniform(-12, -3),
        }
        taken = float(random.integers(1, 100_000))
        scalars = Scalars.of(taken, **settings)
        assert scalars is not None
        tensors = [torch.from_numpy(_numbers(random)) for _ in range(4)]
        tensors[3].abs_()
        theirs = [tensor.clone() for tensor in tensors]
        _apply(operator, theirs, torch.tensor(taken, device="cpu"), settings)
        param, grad, mean, square = (tensor.numpy() for tensor in tensors)
        step(param, grad, mean, square, scalars, 0, len(param), Room())
        if any(not np.array_equal(bits_of(a), bits_of(b)) for a, b in zip(tensors, theirs, strict=True)):
            return False
    return True


def _apply(operator: Any, tensors: list[torch.Tensor], step: torch.Tensor, settings: dict[str, float]) -> None:
    param, grad, mean, square = tensors
    operator([param], [grad], [mean], [square], [], [step], amsgrad=False, maximize=False, **settings)


def _numbers(random: np.random.Generator) -> np.ndarray:
    size = 64 * LANES
    exponents = random.uniform(-30, 6, size) if random.integers(2) else random.uniform(-4, 1, size)
    return (random.standard_normal(size) * 10**exponents).astype(np.float32)


@njit(nogil=True, cache=True)
def _step(
    param: np.ndarray,
    grad: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    constants: np.ndarray,
    start: int,
    stop: int,
    remembered: np.ndarray,
    masks: np.ndarray,
    mask_words: np.ndarray,
    indices: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
    found: int,
) -> tuple[int, int, int]:
    """Go on from element `start` while there is room for the changes of a block.

    Returns where it stopped, how many changes there are, and -1, or where the last block began if that one is unclear.
    """
    decay, weight, beta2, square_weight, correction, eps, rate = constants
    patterns = param.view(np.uint32)
    for first in range(start, stop, _BLOCK):
        if len(indices) - found < _BLOCK:
            return first, found, -1
        last = min(first + _BLOCK, stop)
        seen = np.uint32(0)
        masks[:] = 0
        for at in range(first, last, LANES):
            mask = _step_lanes(
                param.ctypes.data + 4 * at,
                grad.ctypes.data + 4 * at,
                mean.ctypes.data + 4 * at,
                square.ctypes.data + 4 * at,
                remembered.ctypes.data + 2 * (at - first),
                decay,
                weight,
                beta2,
                square_weight,
                correction,
                eps,
                rate,
            )
            masks[(at - first) // LANES] = mask
            seen |= mask
        if seen >> np.uint32(LANES):
            return last, found, first
        for number in range(len(mask_words)):
            left = mask_words[number]
            while left:
                bit = 64 * number + np.int64(trailing_zeros(left))
                indices[found], old[found] = first + bit, remembered[bit]
                new[found] = _rounded(patterns[first + bit])
                found += 1
                left &= left - np.uint64(1)
    return stop, found, -1


@njit(nogil=True, inline="always")
def _rounded(value: np.uint32) -> np.uint16:
    odd = np.uint32(value >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(value + (odd + np.uint32(0x7FFF))) >> np.uint32(16))


_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_WORD = ir.IntType(32)


@intrinsic
def _step_lanes(  # type: ignore[no-untyped-def]
    typing_context, param, grad, mean, square, old, decay, weight, beta2, square_weight, correction, eps, rate
):
    """Update the LANES elements at addresses, and write their old bfloat16 patterns to the address `old`.

    Returns a uint32: below, a bit for each element whose pattern has changed; above, one for each that is or was a NaN.
    The order of operations and the two fused ones are those of torch's compiled code: each rounds, and none may move.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        b = builder
        param, grad, mean, square, old = args[:5]
        decay, weight, beta2, square_weight, correction, eps, rate = (_splat(b, scalar) for scalar in args[5:])
        fma, root = _function(b, "llvm.fma.v16f32", 3), _function(b, "llvm.sqrt.v16f32", 1)

        p, g, m, v = (_fetched(b, address) for address in (param, grad, mean, square))
        m = b.call(fma, [weight, b.fsub(g, m), m])
        v = b.call(fma, [b.fmul(square_weight, g), g, b.fmul(v, beta2)])
        divisor = b.fadd(b.fdiv(b.call(root, [v]), correction), eps)
        q = b.fadd(b.fmul(p, decay), b.fdiv(b.fmul(rate, m), divisor))
        for value, address in ((m, mean), (v, square), (q, param)):
            b.store(value, b.inttoptr(address, _FLOATS.as_pointer()), align=4)

        before, after = _bfloat16(b, p), _bfloat16(b, q)
        b.store(before, b.inttoptr(old, _HALVES.as_pointer()), align=2)
        changed, nan = b.icmp_unsigned("!=", before, after), b.fcmp_unordered("uno", p, q)
        low, high = (b.zext(b.bitcast(bits, ir.IntType(LANES)), _WORD) for bits in (changed, nan))
        return b.or_(low, b.shl(high, ir.Constant(_WORD, LANES)))

    return types.uint32(*[types.intp] * 5, *[types.float32] * 7), codegen


def _fetched(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The elements at an address. Asks for those that come later, as the processor itself does too late."""
    build_prefetch(b, b.inttoptr(b.add(address, ir.Constant(address.type, _AHEAD)), _FLOATS.as_pointer()))
    return b.load(b.inttoptr(address, _FLOATS.as_pointer()), align=4)


def _bfloat16(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """Rounded to nearest, ties to even; a NaN stays one."""
    bits, sixteen = b.bitcast(values, _WORDS), _same(16)
    half = b.add(b.and_(b.lshr(bits, sixteen), _same(1)), _same(0x7FFF))
    number, nan = b.lshr(b.add(bits, half), sixteen), b.or_(b.lshr(bits, sixteen), _same(0x40))
    return b.trunc(b.select(b.fcmp_unordered("uno", values, values), nan, number), _HALVES)


def _function(b: ir.IRBuilder, name: str, operands: int) -> ir.Value:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * operands), name)


def _same(number: int) -> ir.Constant:
    return ir.Constant(_WORDS, [number] * LANES)


def _splat(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    return b.shuffle_vector(b.insert_element(nothing, scalar, ir.Constant(_WORD, 0)), nothing, _same(0))
