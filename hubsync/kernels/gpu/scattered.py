# mypy: disable-error-code="no-untyped-def"
"""Reading and writing elements anywhere in the memory of a GPU, by their distance from one address.

So one launch reaches the elements of all tensors of a width, whatever lies between them. `base` is an address, `places`
(int64) count elements from there on, and the patterns beside them are integers of the elements' width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def read(base: int, places: torch.Tensor, out: torch.Tensor) -> None:
    """Copy the patterns at these places to `out`."""
    if len(places):
        _read[_programs(places)](base, places, out, len(places), _BLOCK)


def step(base: int, places: torch.Tensor, diffs: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
    """Copy the patterns at these places (16 bits) to `old`, and those so many steps further (int16) to `new`."""
    if len(places):
        _step[_programs(places)](base, places, diffs, old, new, len(places), _BLOCK)


def write(base: int, places: torch.Tensor, new: torch.Tensor) -> None:
    """Write patterns. Of those for the same place any may be there afterwards."""
    if len(places):
        _write[_programs(places)](base, places, new, len(places), _BLOCK)


def compare(base: int, places: torch.Tensor, expected: torch.Tensor, differs: torch.Tensor) -> None:
    """Set `differs` (int32[1]) to 1 if any of these places holds another pattern. It is not set to 0 otherwise."""
    if len(places):
        _compare[_programs(places)](base, places, expected, differs, len(places), _BLOCK)


def _programs(places: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(len(places), _BLOCK),)


@triton.jit
def _elements(base, places, patterns, count, BLOCK: tl.constexpr):
    """Pointers to elements, of the type of `patterns`, their numbers in the list, and which of them exist."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    return base.to(patterns.dtype) + tl.load(places + i, mask=inside, other=0), i, inside


@triton.jit(do_not_specialize=["base", "count"])
def _read(base, places, out, count, BLOCK: tl.constexpr):
    at, i, inside = _elements(base, places, out, count, BLOCK)
    tl.store(out + i, tl.load(at, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["base", "count"])
def _step(base, places, diffs, old, new, count, BLOCK: tl.constexpr):
    at, i, inside = _elements(base, places, old, count, BLOCK)
    before = tl.load(at, mask=inside, other=0)
    pattern = before.to(tl.int32) & 0xFFFF  # as an integer in the order of the numbers, and back
    there = (pattern ^ tl.where(pattern >= 0x8000, 0xFFFF, 0x8000)) + tl.load(diffs + i, mask=inside, other=0)
    there = there & 0xFFFF
    after = (there ^ tl.where(there >= 0x8000, 0x8000, 0xFFFF)).to(tl.int16)
    tl.store(old + i, before, mask=inside)
    tl.store(new + i, after, mask=inside)


@triton.jit(do_not_specialize=["base", "count"])
def _write(base, places, new, count, BLOCK: tl.constexpr):
    at, i, inside = _elements(base, places, new, count, BLOCK)
    tl.store(at, tl.load(new + i, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["base", "count"])
def _compare(base, places, expected, differs, count, BLOCK: tl.constexpr):
    at, i, inside = _elements(base, places, expected, count, BLOCK)
    found = tl.load(at, mask=inside, other=0)
    other = (found != tl.load(expected + i, mask=inside, other=0)) & inside
    if tl.sum(other.to(tl.int32), axis=0) > 0:
        tl.store(differs, 1)
