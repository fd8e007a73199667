"""Speed of the passes of a publish on a GPU, each over all tensors of a model.

`python -m benchmarks.kernels --model` prints these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from hubsync.format.codec import encode
from hubsync.format.device_patch import DevicePatch
from hubsync.format.digest import device_constants, key_of
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.gpu.digest import Digests
from hubsync.kernels.gpu.listing import ChangeList
from hubsync.kernels.gpu.numbering import RAW, TO_BF16, Numbering

from .gpu_models import MODELS, Shapes
from .gpu_publish import Row

_SHARE = 0.008


def measure(model: str, repeats: int) -> Iterator[Row]:
    """All passes, for float32 and for bfloat16 parameters. Speeds count the bytes of a bfloat16 view."""
    shapes, _ = MODELS[model]
    view = 2 * sum(math.prod(shape) for shape in shapes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        part = encode(table, patch)
        bits, floor = 8 * part.nbytes / len(listed.numbers), _floor(patch, int(spans[:, 2].sum()))
        note = f"; {bits:.2f} bits a change, {bits / floor:.3f} of the floor"
        yield row("encode fast, payload on the host", lambda: encode(table, patch), note)


def _floor(patch: DevicePatch, elements: int) -> float:
    """Bits a change if positions are independent, and steps too: the entropy of both."""
    share = len(patch.numbers) / elements
    _, steps = patch.listed(np.array([0]), np.array([min(1_000_000, len(patch.numbers))]))
    odds = np.unique(steps, return_counts=True)[1] / len(steps)
    positions = -math.log2(share) - (1 - share) / share * math.log2(1 - share)
    return positions - float(odds @ np.log2(odds))


def _random(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.empty(math.prod(shape), device=device).normal_(0, 0.02, generator=generator).to(dtype) for shape in shapes
    ]


def _move(patterns: torch.Tensor) -> None:
    """Move a share of the patterns by a step, some by several, in pieces: random numbers need memory."""
    generator = torch.Generator(patterns.device).manual_seed(1)
    for start in range(0, len(patterns), 1 << 28):
        part = patterns[start : start + (1 << 28)]
        draw = torch.empty(len(part), device=part.device).uniform_(0, 1, generator=generator)
        part += (draw < _SHARE).to(torch.int16) + (draw < _SHARE / 20).to(torch.int16)
        part -= 2 * (draw < _SHARE / 2).to(torch.int16) + (draw < _SHARE / 40).to(torch.int16) * 2


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median, after one call that compiles."""
    work()
    if not torch.cuda.is_available():
        return math.nan
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
