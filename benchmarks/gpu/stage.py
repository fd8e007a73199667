"""Staging, commit and verification of one process, each part by itself.

A module of random weights with a real model's shapes is followed as a server's would be (`ServedModel`): parts come
from a directory, and are staged, committed and verified by the product's own calls.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hubsync.apply.engine import ModelHost, RunSource
from hubsync.apply.served_model import ServedModel
from hubsync.bucket import open_bucket
from hubsync.bucket.files import sha256_of
from hubsync.chain import ChainWriter
from hubsync.format.device_patch import DevicePatch
from hubsync.format.digest import Digest, digest_torch, tensor_seed
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position, Run
from hubsync.format.parts import Transition, write_delta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels import Bits

from .device import allocated, peak, peak_from_here, timed
from .models import Size
from .rows import Row

SHARE = 0.008
_LONGEST_S = 15.0  # until no more repetitions begin
_RUN_ID = "5ca1e" * 6 + "00"


class Model(torch.nn.Module):
    """Parameters of these shapes, each loaded by its name."""

    def __init__(self, table: TensorTable, device: torch.device):
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        for spec in table:
            values = torch.empty(spec.shape, device=device).normal_(0, 0.02, generator=generator)
            self.register_parameter(spec.name, torch.nn.Parameter(values.bfloat16(), requires_grad=False))

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            getattr(self, name).data.copy_(tensor)


class Published:
    """A run of which this process makes every version itself, from the live weights of a module."""

    def __init__(self, root: Path, model: Model, table: TensorTable):
        self._table = table
        self._params = [parameter.data.view(-1).view(torch.int16) for parameter in model.parameters()]
        self._firsts = np.concatenate([[0], np.cumsum(table.columns.numel)])
        self._digest = sum(
            (digest_torch(tensor_seed(s.name), p) for s, p in zip(table, self._params, strict=True)), Digest()
        )
        self._version = 0
        self.parts: list[int] = []  # bytes
        self.changed = 0
        run = Run(_RUN_ID, table, self._digest.hex, created=time.time())
        self._writer = ChainWriter.create(open_bucket(str(root / "run"), create=True), run)

    def publish(self, encoding: Encoding, seed: int) -> Position:
        """The next version: a share of all elements, moved by a step; one in twenty by two."""
        patch, change = self._changes(seed)
        parent = Position(self._version, self._digest.hex)
        self._digest, self._version = self._digest + change, self._version + 1
        position = Position(self._version, self._digest.hex)
        old = _Old(self._table, self._params) if encoding.needs_base else None
        part = write_delta(self._table, patch, Transition(_RUN_ID, parent, position), encoding=encoding, old=old)
        self.parts.append(len(part))
        self.changed = len(patch.numbers)
        self._writer.commit_delta([part], digest=position.digest, changed=self.changed)
        return position

    def _changes(self, seed: int) -> tuple[DevicePatch, Digest]:
        device = self._params[0].device
        generator = torch.Generator(device).manual_seed(seed)
        columns, change = [], Digest()
        for spec, bits, first in zip(self._table, self._params, self._firsts.tolist(), strict=False):
            draw = torch.rand(len(bits), device=device, generator=generator)
            at = (draw < SHARE).nonzero().squeeze(1)
            old = bits[at]
            new = old + torch.where(draw[at] < SHARE / 20, 2, 1).short()
            seed_of = tensor_seed(spec.name)
            change += digest_torch(seed_of, new, indices=at) - digest_torch(seed_of, old, indices=at)
            columns.append((at + first, old, new))
        numbers, old, new = (torch.cat(column) for column in zip(*columns, strict=True))
        counts = self._table.columns.numel
        index = np.arange(len(counts))
        spans = np.stack([index, self._firsts[:-1], counts, np.zeros_like(index)], axis=1)
        return DevicePatch(numbers, old, new, spans, {}), change


class _Old:
    """`hubsync.format.codec.layout.WholeOldBits` of live weights."""

    def __init__(self, table: TensorTable, patterns: list[torch.Tensor]):
        self._table, self._patterns = table, patterns

    def whole(self, index: int) -> torch.Tensor:
        return self._patterns[index].view(torch.bfloat16).view(self._table[index].shape)

    def rectangle(self, index: int, rows: slice, cols: slice) -> Bits:
        bits = self._patterns[index].view(self._table[index].matrix)[rows, cols]
        return bits if bits.device.type != "cpu" else bits.numpy().view(np.uint16)


def measure(size: Size, repeats: int, encoding: Encoding) -> Iterator[Row]:
    """All rows of one encoding."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    table = TensorTable([TensorSpec(f"w{n}", shape, "BF16") for n, shape in enumerate(size.shapes)])
    with tempfile.TemporaryDirectory(prefix="hubsync-apply-") as name:
        root, module = Path(name), Model(table, device)
        run = Published(root, module, table)
        source = RunSource(str(root / "run"), root / "cache")
        served = ServedModel(lambda: ModelHost(source, (module,), device))
        attach = timed(served.attach)
        yield Row("attach, with compiling", attach, "s", "in the background of a server")
        kept = allocated()
        yield from _followed(run, served, encoding, device, repeats, root)
        held = allocated() - kept
        yield Row("GPU memory kept for undo", held / run.changed, "B a change", f"{held / 1e6:.0f} MB")


def _followed(
    run: Published, served: ServedModel, encoding: Encoding, device: torch.device, repeats: int, root: Path
) -> Iterator[Row]:
    started = time.perf_counter()
    times: dict[str, list[float]] = {
        name: [] for name in ("stage", "fetch_s", "decode_s", "place_s", "commit", "verify")
    }
    peaks = []
    for repeat in range(repeats + 1):
        position = run.publish(encoding, repeat)
        before = peak_from_here()
        times["stage"].append(timed(partial(served.stage, position, nullcontext())))
        peaks.append(peak() - before)
        for part in ("fetch_s", "decode_s", "place_s"):
            times[part].append(served.metrics[part])
        times["commit"].append(timed(partial(served.commit, position)))
        times["verify"].append(timed(served.verify))
        if time.perf_counter() - started > _LONGEST_S:
            break
    ms = {name: 1e3 * statistics.median(values[1:] or values) for name, values in times.items()}
    view = 2 * int(run._firsts[-1])
    size = run.parts[-1]
    share = f"{run.changed / 1e6:.1f} M changes, {size / 1e6:.1f} MB, {8 * size / run.changed:.1f} bits each"
    yield Row(
        f"{encoding.value}: stage", ms["stage"], "ms", f"goal 150; {share}; the first {1e3 * times['stage'][0]:.0f}"
    )
    path = max((root / "cache").rglob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    hashing = timed(lambda: sha256_of(path))
    yield Row("  fetch and SHA-256", ms["fetch_s"], "ms", f"SHA-256 alone {1e3 * hashing:.0f} ms")
    goal = 150 if encoding is Encoding.FAST else 30
    yield Row("  decode", ms["decode_s"], "ms", f"{view / ms['decode_s'] / 1e6:.0f} GB/s of weights, goal {goal}")
    yield Row("  places, old and new values, digest", ms["place_s"], "ms")
    yield Row("  extra GPU memory at its peak", max(peaks) / 1e6, "MB", f"{max(peaks) / run.changed:.0f} B a change")
    yield Row(f"{encoding.value}: commit", ms["commit"], "ms", "goal 3: memory compared, written, read back")
    yield Row(f"{encoding.value}: verify", ms["verify"], "ms", f"goal 15; {view / ms['verify'] / 1e6:.0f} GB/s")
