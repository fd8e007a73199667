"""What following and publishing cost a trainer on a GPU.

One process trains weights of a model's shapes with torch's fused AdamW and publishes every step to a directory. The
simple way is measured beside it: clone the bfloat16 view before the step, compare, list, copy int32 indices and values
to the host.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from hubsync import DeltaWeightTransferEngine as Engine
from hubsync import SyncConfig
from hubsync.publish.results import Published

from .device import allocated, peak, peak_from_here, release, synchronize, timed
from .models import Size, Weights
from .rows import Row

RATES = {torch.float32: 1.45e-7, torch.bfloat16: 1.5e-6}  # learning rates that change about 0.8 % of the view


Detector = Literal["sliced", "snapshot"]


@dataclass(frozen=True)
class Step:
    """Times of one step and publish, in seconds; and what was published."""

    step: float
    call: float
    published: Published


def measure(size: Size, rounds: int) -> Iterator[Row]:
    """All rows of one model."""
    dtype = size.dtype
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = Weights(size.shapes, dtype, device)
    weights.receive_gradients()
    optimizer = torch.optim.AdamW(weights.parameters(), lr=RATES[dtype], fused=True)
    view = 2 * size.numel
    copy = _copy_seconds(view, device)
    yield Row("parameters", size.numel / 1e6, "M")
    yield Row("copy of the bfloat16 view", 1e3 * copy, "ms", f"{view / copy / 1e9:,.0f} GB/s")
    plain = _median([timed(optimizer.step) for _ in range(rounds + 2)][2:])
    yield Row("plain step", 1e3 * plain, "ms", "torch's fused AdamW")
    detectors: tuple[Detector, ...] = ("sliced", "snapshot")
    for detector in detectors:
        yield from _followed(weights, optimizer, detector, rounds, plain)
        gc.collect()
        release()
    yield from _simple(weights, optimizer, rounds, plain)


def _followed(
    weights: Weights, optimizer: torch.optim.Optimizer, detector: Detector, rounds: int, plain: float
) -> Iterator[Row]:
    size = weights.numel
    before = allocated()
    with _engine(weights, optimizer, detector) as engine:
        synchronize()
        held = allocated() - before
        compiling = timed(_wait_for_compilation)
        first = _publish(engine, optimizer)
        for _ in range(16):  # the first steps wait for the device
            _publish(engine, optimizer)
        steps = [_publish(engine, optimizer) for _ in range(rounds)]
        at_rest = peak_from_here()
        _publish(engine, optimizer)
        most = peak() - at_rest
        published = steps[-1].published
        unfused = _unfused(engine, optimizer, rounds)
    changed = published.changed
    yield Row(f"{detector}: followed step", 1e3 * _median([s.step for s in steps]), "ms")
    yield Row("  of the plain step", _median([s.step for s in steps]) / plain, "x")
    if detector == "sliced":
        yield Row("  by torch's operator in slices", unfused / plain, "x", "where the fused kernel gives other bits")
    yield Row("  memory kept", held / size, "B a parameter", "without the list of changes")
    yield Row("  peak in step and publish", most / size, "B a parameter", "with the list, and what is encoded")
    yield Row("  detection in it", 1e3 * _median([s.published.detect_s for s in steps]), "ms")
    yield Row("  publish call", 1e3 * _median([s.call for s in steps]), "ms", "digest of the whole view included")
    yield Row("  encode", 1e3 * _median([s.published.encode_s for s in steps]), "ms", f"{changed / 1e6:.1f} M changes")
    yield Row("    speed", 2 * size / _median([s.published.encode_s for s in steps]) / 1e9, "GB/s of weights")
    yield Row("  upload to a directory", 1e3 * _median([s.published.upload_s for s in steps]), "ms")
    yield Row("  bits a change", 8 * published.payload_bytes / changed, "bits", f"{changed / size:.2%} changed")
    note = f"call and encode, after {compiling:.1f} s of compiling in the background"
    yield Row("  first delta of the process", 1e3 * (first.call + first.published.encode_s), "ms", note)


def _unfused(engine: Engine, optimizer: torch.optim.Optimizer, rounds: int) -> float:
    """Seconds of a step in which torch's own operator updates the parameters, in slices."""
    recorder = getattr(engine._publisher.detector, "_recorder", None)
    if recorder is None:
        return 0.0
    recorder._fuses = False
    seconds = _median([_publish(engine, optimizer).step for _ in range(rounds)])
    recorder._fuses = True
    return seconds


def _wait_for_compilation() -> None:
    """Training does something else before its first step."""
    for thread in threading.enumerate():
        if thread.name == "hubsync-compile":
            thread.join()


def _publish(engine: Engine, optimizer: torch.optim.Optimizer) -> Step:
    step = timed(optimizer.step)
    started = time.perf_counter()
    ticket = engine.publish()
    call = time.perf_counter() - started
    return Step(step, call, ticket.result())


@contextmanager
def _engine(weights: Weights, optimizer: torch.optim.Optimizer, detector: Detector) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="hubsync-benchmark-") as bucket:
        config = SyncConfig(bucket=bucket, base_model="random", detector=detector)
        with Engine(weights, optimizer, config) as engine:
            yield engine


def _simple(weights: Weights, optimizer: torch.optim.Optimizer, rounds: int, plain: float) -> Iterator[Row]:
    """As in drafts for TRL."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step() -> None:
        before = [parameter.detach().to(torch.bfloat16, copy=True) for parameter in weights.parameters()]
        optimizer.step()
        found.clear()
        for old, parameter in zip(before, weights.parameters(), strict=True):
            new = parameter.detach().bfloat16()
            at = (old != new).view(-1).nonzero().view(-1)
            found.append((at.int().cpu(), new.view(-1)[at].cpu()))

    seconds = _median([timed(step) for _ in range(rounds + 1)][1:])
    changed = sum(len(at) for at, _ in found)
    yield Row(
        "simple way: clone, step, !=, nonzero, to the host", 1e3 * seconds, "ms", f"{changed / 1e6:.1f} M changes"
    )
    yield Row("  of the plain step", seconds / plain, "x", "48 bits a change; 2 B a parameter while it lasts")


def _copy_seconds(nbytes: int, device: torch.device) -> float:
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _median([timed(lambda: target.copy_(source)) for _ in range(5)])


def _median(values: list[float]) -> float:
    return statistics.median(values)
