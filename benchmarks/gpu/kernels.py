"""Speed of the passes of a publish on a GPU, each over all tensors of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from hubsync.format.codec import encode
from hubsync.format.device_patch import DevicePatch
from hubsync.format.digest import device_constants, key_of
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.gpu.digest import Digests
from hubsync.kernels.gpu.listing import ChangeList
from hubsync.kernels.gpu.numbering import RAW, TO_BF16, Numbering

from .models import Shapes, Size
from .rows import Row

_STEP = 2.8e-5  # a weight changes by chance `_STEP / |weight|`: about 0.8 % of all


def measure(size: Size, repeats: int) -> Iterator[Row]:
    """All passes, for float32 and for bfloat16 parameters. Speeds count the bytes of a bfloat16 view."""
    if not torch.cuda.is_available():
        yield Row("passes of a publish", math.nan, "GB/s", "not run: it needs a GPU")
        return
    shapes, view = size.shapes, 2 * size.numel
    device = torch.device("cuda")
    copy = _copy_milliseconds(view, device, repeats)
    yield Row("copy of the bfloat16 view", view / copy / 1e6, "GB/s", f"{copy:.2f} ms")

    def row(name: str, work: Callable[[], object], note: str = "") -> Row:
        spent = milliseconds(work, repeats)
        return Row(name, view / spent / 1e6, "GB/s", f"{spent:.2f} ms, {copy / spent:.2f} of the copy{note}")

    for dtype in (torch.float32, torch.bfloat16):
        yield from _passes(shapes, dtype, device, row)


def _copy_milliseconds(nbytes: int, device: torch.device, repeats: int) -> float:
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source), repeats)


def _passes(shapes: Shapes, dtype: torch.dtype, device: torch.device, row: Callable[..., Row]) -> Iterator[Row]:
    name = str(dtype).removeprefix("torch.")
    tensors = _random(shapes, dtype, device)
    table = TensorTable([TensorSpec(f"w{n}", shape, "BF16") for n, shape in enumerate(shapes)])
    numbering = Numbering(tensors, [TO_BF16 if dtype == torch.float32 else RAW] * len(tensors))
    changes = ChangeList(numbering)
    ranges = [(0, numbering.tiles)]
    yield row(f"{name}: save the view", lambda: changes.save(ranges))
    old = changes.save(ranges)
    _move(old)
    changes.compare(ranges, old)
    share = f"; {changes.length() / numbering.first[-1]:.2%} changed"

    def compare() -> None:
        """A list of its own for each call, without waiting."""
        changes.clear()
        changes.begin()
        changes.compare(ranges, old)
        changes.end()

    for _ in range(16):  # the first steps wait for the device
        compare()
    yield row(f"{name}: compare and list", compare, share)
    yield row("  bring the list into order", changes.collect)
    listed = changes.collect()
    spans = np.array([(n, 0, tensor.numel(), 0) for n, tensor in enumerate(tensors)], np.int64)
    keys = np.array([key_of(n) for n in range(len(tensors))], np.int64)
    digests = Digests(numbering, spans, keys, device_constants(device))
    yield row(f"{name}: digest of the live view", digests.live)
    yield row("  digest of the changes", lambda: digests.changes(listed))
    if dtype == torch.bfloat16:
        numbered = np.stack([spans[:, 0], numbering.first[:-1], spans[:, 2], spans[:, 3]], axis=1)
        patch = DevicePatch(listed.numbers, listed.old, listed.new, numbered, {})
        view = {
            spec.name: old[first : first + spec.numel].view(torch.bfloat16).view(spec.shape)
            for spec, first in zip(table, numbering.first.tolist(), strict=False)
        }
        for name, weights in (("fast", None), ("compact", ViewBits(table, view))):
            part = encode(table, patch, weights)
            bits, floor = 8 * part.nbytes / len(patch.numbers), _floor(patch, view, by_class=weights is not None)
            note = f"; {bits:.2f} bits a change, {bits / floor:.3f} of the floor"
            yield row(f"encode {name}, payload on the host", partial(encode, table, patch, weights), note)


def _floor(patch: DevicePatch, view: Mapping[str, torch.Tensor], *, by_class: bool) -> float:
    """Bits a change if positions are independent, and steps too: the entropy of both. `by_class`: for each exponent."""
    keep = 0x7F80 if by_class else 0
    elements = torch.zeros(256, dtype=torch.int64, device=patch.old.device)
    for weights in view.values():
        for part in weights.view(torch.int16).view(-1).split(1 << 26):
            elements += torch.bincount((part.int() & keep) >> 7, minlength=256)
    exponents, steps = (patch.old.int() & keep) >> 7, (patch.new - patch.old).abs().clamp(max=255).int()
    table = torch.bincount(exponents * 256 + steps, minlength=1 << 16).view(256, 256).cpu().numpy()
    changed, rest = table.sum(axis=1), elements.cpu().numpy() - table.sum(axis=1)
    positions = _entropy(np.stack([changed, rest], axis=1))
    signs = changed.sum()
    return float(positions + _entropy(table) + signs) / int(changed.sum())


def _entropy(counts: np.ndarray) -> float:
    """Bits of the choices that were made so often, row by row."""
    totals = np.broadcast_to(counts.sum(axis=1, keepdims=True), counts.shape)
    made = counts > 0
    return float(-(counts[made] * np.log2(counts[made] / totals[made])).sum())


def _random(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.empty(math.prod(shape), device=device).normal_(0, 0.02, generator=generator).to(dtype) for shape in shapes
    ]


def _move(patterns: torch.Tensor) -> None:
    """Move patterns by a step, some by two, in pieces: random numbers need memory."""
    generator = torch.Generator(patterns.device).manual_seed(1)
    for start in range(0, len(patterns), 1 << 28):
        part = patterns[start : start + (1 << 28)]
        draw = torch.empty(len(part), device=part.device).uniform_(0, 1, generator=generator)
        draw *= part.view(torch.bfloat16).float().abs() / _STEP
        part += (draw < 1).to(torch.int16) + (draw < 1 / 20).to(torch.int16)
        part -= 2 * (draw < 1 / 2).to(torch.int16) + (draw < 1 / 40).to(torch.int16) * 2


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median, after one call that compiles."""
    work()
    events: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]] = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2]
