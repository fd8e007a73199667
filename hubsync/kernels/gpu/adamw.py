# mypy: disable-error-code="no-untyped-def"
"""torch's fused AdamW for float32 parameters, and the comparison of their published views, in one pass.

It has to give torch's bits, so it repeats torch's arithmetic (`ATen/native/cuda/fused_adam_utils.cuh`), operation by
operation. Another version of torch may compute otherwise: `gives_torchs_bits` tells, on this device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .listing import Ranges
from .numbering import TO_BF16, Numbering, rounded, tile_of

_PART = 512  # elements of one program: more would need more registers than leave room for other programs
_WARPS = 2


@dataclass(frozen=True)
class Options:
    """Arguments of the operator that are numbers."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    eps: float


class AdamW:
    """One update of some tensors.

    Args:
        numbering: of the parameters.
        tensors: their numbers in it, for each entry of the lists.
        lists: gradients, first and second moments: float32, contiguous, of the parameters' sizes.
        steps: a float32 scalar for each, already counted up.
        options: of the operator.
    """

    def __init__(
        self,
        numbering: Numbering,
        tensors: Sequence[int],
        lists: Sequence[Sequence[torch.Tensor]],
        steps: Sequence[torch.Tensor],
        options: Options,
    ):
        self._numbering = numbering
        self._options = options
        table = torch.zeros((len(numbering.address), 3), dtype=torch.int64, pin_memory=numbering.device.type == "cuda")
        columns = [[tensor.data_ptr() for tensor in column] for column in lists]
        table[torch.tensor(tensors)] = torch.tensor(columns, dtype=torch.int64).T
        self._others = table.to(numbering.device, non_blocking=True)
        self._is_aligned = numbering.is_aligned and not any(at % 16 for column in columns for at in column)
        at = torch.tensor(tensors, device=numbering.device)
        count = torch.stack(list(steps)).view(-1)
        self._corrections = torch.ones((len(numbering.address), 2), device=numbering.device)
        for lane, beta in enumerate((options.beta1, options.beta2)):
            self._corrections[at, lane] = 1 - torch.pow(torch.full_like(count, beta), count)
        self._corrections[:, 1].sqrt_()

    def update(self, ranges: Ranges, old: torch.Tensor, marks: torch.Tensor) -> None:
        """Update these tiles.

        Args:
            old: int16[elements of the tiles], takes the patterns of changed elements before the update.
            marks: uint8[elements / 8], takes a bit for each element: its pattern has changed.
        """
        numbers, options, done = self._numbering, self._options, 0
        part = min(_PART, numbers.tile)
        for first, end in ranges:
            _adamw[((end - first) * (numbers.tile // part),)](
                numbers.address, self._others, numbers.owner, self._corrections, old[done * numbers.tile :],
                marks[done * numbers.tile // 8 :], first, options.lr, options.beta1, options.beta2,
                options.weight_decay, options.eps, options.weight_decay != 0, self._is_aligned, numbers.tile, part,
                num_warps=_WARPS,
            )  # fmt: skip
            done += end - first


@functools.cache
def gives_torchs_bits(device: torch.device) -> bool:
    """Whether the kernel computes exactly what this torch computes on this device."""
    rng = torch.Generator(device).manual_seed(0)

    def randoms(scale: float) -> list[torch.Tensor]:
        """Numbers of all sizes around `scale`, of both signs."""
        return [
            torch.randn(size, generator=rng, device=device)
            * torch.exp(3 * torch.randn(size, generator=rng, device=device))
            * scale
            for size in (200_000, 4096, 77)
        ]

    for number, options in enumerate(_TRIED):
        params, grads, means = randoms(0.02), randoms(1e-3), randoms(1e-4)
        squares = [tensor.square() for tensor in randoms(1e-3)]
        ours = [[tensor.clone() for tensor in column] for column in (params, means, squares)]
        steps = [torch.full((), float(1 + 40 * number * t + t), device=device) for t in range(len(params))]
        torch._fused_adamw_(
            params, grads, means, squares, [], steps, amsgrad=False, lr=options.lr, beta1=options.beta1,
            beta2=options.beta2, weight_decay=options.weight_decay, eps=options.eps, maximize=False,
        )  # fmt: skip
        numbering = Numbering(ours[0], [TO_BF16] * len(params))
        ranges = [(0, numbering.tiles)]
        old = torch.empty(numbering.tiles * numbering.tile, dtype=torch.int16, device=device)
        marks = torch.empty(numbering.tiles * numbering.tile // 8, dtype=torch.uint8, device=device)
        AdamW(numbering, range(len(params)), (grads, ours[1], ours[2]), steps, options).update(ranges, old, marks)
        theirs = (params, means, squares)
        if not all(_same(a, b) for column in zip(ours, theirs, strict=True) for a, b in zip(*column, strict=True)):
            return False
    return True


_TRIED = [
    Options(1e-6, 0.9, 0.999, 0.01, 1e-8),
    Options(2.5e-7, 0.9, 0.95, 0.0, 1e-8),
    Options(3e-4, 0.8, 0.99, 0.1, 1e-6),
    Options(1e-2, 0.95, 0.98, 0.3, 1e-15),
]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@triton.jit
def _moved(base, i, size, ALIGNED: tl.constexpr, PART: tl.constexpr):
    """float32 elements i of a part; 0 behind its end."""
    at = base.to(tl.pointer_type(tl.float32)) + i
    if size >= PART:
        if ALIGNED:
            at = tl.multiple_of(at, 16)
        x = tl.load(at)
    else:
        x = tl.load(at, mask=i < size, other=0.0)
    return x


@triton.jit
def _put(base, i, x, size, ALIGNED: tl.constexpr, PART: tl.constexpr):
    at = base.to(tl.pointer_type(tl.float32)) + i
    if size >= PART:
        if ALIGNED:
            at = tl.multiple_of(at, 16)
        tl.store(at, x)
    else:
        tl.store(at, x, mask=i < size)


@triton.jit(do_not_specialize=["first"])
def _adamw(
    address,
    others,
    owner,
    corrections,
    old,
    marks,
    first,
    lr,
    beta1,
    beta2,
    decay,
    eps,
    DECAYS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = first + program // (TILE // PART)
    base, start, size, kind = tile_of(address, owner, tile, TILE)
    tensor = tl.load(owner + tile).to(tl.int64)
    i = tl.arange(0, PART)
    done = program % (TILE // PART) * PART
    size = tl.minimum(size - done, PART)
    skip = (start + done) * 4
    grads = tl.load(others + tensor * 3) + skip
    means = tl.load(others + tensor * 3 + 1) + skip
    squares = tl.load(others + tensor * 3 + 2) + skip
    p = _moved(base + skip, i, size, ALIGNED, PART)
    g = _moved(grads, i, size, ALIGNED, PART)
    m = _moved(means, i, size, ALIGNED, PART)
    v = _moved(squares, i, size, ALIGNED, PART)
    before = rounded(p, kind)
    zero = tl.zeros([PART], tl.float32)
    if DECAYS:
        p = tl.fma(zero - lr * decay, p, p)
    b1, b2, gg = zero + beta1, zero + beta2, g * g
    m = tl.fma(b1, m, tl.fma(-b1, g, g))
    v = tl.fma(b2, v, tl.fma(-b2, gg, gg))
    step_size = tl.div_rn(zero + lr, zero + tl.load(corrections + tensor * 2))
    denominator = tl.div_rn(tl.sqrt_rn(v), zero + tl.load(corrections + tensor * 2 + 1)) + eps
    p = p - tl.div_rn(step_size * m, denominator)
    _put(base + skip, i, p, size, ALIGNED, PART)
    _put(means, i, m, size, ALIGNED, PART)
    _put(squares, i, v, size, ALIGNED, PART)
    differ = (before != rounded(p, kind)) & (i < size)
    tl.store(old + program * PART + i, before, mask=differ)
    by_eight = tl.reshape(differ.to(tl.int32), [PART // 8, 8])
    byte = tl.sum(by_eight << tl.arange(0, 8)[None, :], axis=1)
    tl.store(marks + program * (PART // 8) + tl.arange(0, PART // 8), byte.to(tl.uint8))
