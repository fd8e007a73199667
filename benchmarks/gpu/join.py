"""Cold join: seconds from the start of a server until it serves the newest version, proved.

A run of some versions lies in a directory, with a merged delta and an anchor. The server starts from the base
checkpoint, or from a checkpoint that `hubsync pull` makes of the anchor, once with an empty cache of what vLLM compiles
and once with that of the first start.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.cli.main import main as hubsync
from hubsync.format.manifest import Position
from hubsync.replicas.replica import Replica

from .device import release
from .models import Size
from .rows import Row
from .server import server_process
from .trainer import RATES

VERSIONS = 8


def measure(size: Size, *, from_anchor: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="hubsync-gpu-") as name:
        root = Path(name)
        size.write_checkpoint(root / "base")
        newest = _publish(size, root, anchor=from_anchor)
        gc.collect()
        release()
        start, pulled = "base and merged delta", 0.0
        if from_anchor:
            start, begun = "anchor", time.perf_counter()
            _hubsync("pull", str(root / "run"), str(root / "pulled"), "--version", str(newest.version))
            pulled = time.perf_counter() - begun
            yield Row("anchor: pull", pulled, "s", "download, verify and write the checkpoint")
        for caches in ("empty", "warm"):
            yield from _joined(root, root / ("pulled" if from_anchor else "base"), newest, f"{start}, {caches} caches")


def _publish(size: Size, root: Path, *, anchor: bool) -> Position:
    """A run with deltas, and what a late replica reads instead of them."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy: torch.nn.Module = AutoModelForCausalLM.from_pretrained(root / "base", dtype=size.dtype)
    policy.to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATES[size.dtype])
    config = SyncConfig(bucket=str(root / "run"), base_model=str(root / "base"))
    with DeltaWeightTransferEngine(policy, optimizer, config) as engine:
        for _ in range(VERSIONS):
            for parameter in policy.parameters():
                parameter.grad = torch.randn_like(parameter) * 1e-3
            optimizer.step()
            engine.publish().result()
        if anchor:
            engine.anchor()
        newest = engine.position
    if not anchor:
        _hubsync("compact", str(root / "run"))
    return newest


def _joined(root: Path, checkpoint: Path, newest: Position, name: str) -> Iterator[Row]:
    begun = time.perf_counter()
    environment = {"VLLM_CACHE_ROOT": str(root / "compiled"), "TRITON_CACHE_DIR": str(root / "triton")}
    with server_process(root, ["--skip-tokenizer-init"], environment, checkpoint=checkpoint, follows=True) as process:
        replica = Replica(process.wait_ready(400))
        ready = time.perf_counter()
        replica.attach()
        replica.wait_staged(newest)
        replica.commit(newest)
        served = time.perf_counter()
        replica.wait_verified(newest)
        proved = time.perf_counter()
    yield Row(f"{name}: from start to proved", proved - begun, "s", f"{VERSIONS} versions behind")
    yield Row("  server ready", ready - begun, "s", "vLLM's own start")
    yield Row("  attach, stage, commit", served - ready, "s")


def _hubsync(*words: str) -> None:
    with redirect_stdout(StringIO()) as printed:
        if hubsync(words) != 0:
            raise RuntimeError(f"hubsync {' '.join(words)} failed: {printed.getvalue()}")
