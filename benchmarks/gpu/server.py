"""A trainer and a real vLLM server on GPUs: what a sync takes, and how long token streams and threads wait for it.

The server is compiled and uses CUDA graphs; it has a GPU of its own if
there are two. The trainer's gradients are random. Token streams are read by another process, and the engine's process
watches itself (`ticking`). The digest of the server's live weights is recomputed after every commit.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.demo.serving import ServerProcess
from hubsync.publish.results import SyncReport
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer

from .device import timed
from .models import Size
from .rows import Row
from .streams import Arrivals, Streams
from .trainer import RATES

_SETTLING_S = 0.5  # around a sync
_FLOORS = 4  # times that running requests are computed again without a sync

Window = tuple[float, float]


@dataclass
class Measured:
    """What the syncs of one policy took. Windows are from before the publish until the weights are verified."""

    reports: list[SyncReport] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Seen:
    """What the engine's process has seen of itself: `benchmarks.gpu.ticking`."""

    steps: np.ndarray
    late: np.ndarray
    extra: int

    @classmethod
    def of(cls, begun: dict[str, Any], ended: dict[str, Any]) -> Seen:
        late = np.array(ended["late"], float).reshape(-1, 2)
        return cls(np.array(ended["steps"], float), late, ended["peak"] - begun["allocated"])

    def longest_step(self, window: Window) -> tuple[float, float]:
        """Longest time between two forward passes' beginnings, and from the window's begin to the first of them."""
        own = self.steps[(self.steps > window[0]) & (self.steps < window[1])]
        steps = np.append(np.diff(own), 0.0)
        return float(steps.max()), float(np.append(own, window[0])[steps.argmax()] - window[0])

    def longest_delay(self, window: Window) -> float:
        own = self.late[(self.late[:, 0] > window[0]) & (self.late[:, 0] < window[1])]
        return float(own[:, 1].max(initial=0.0))


def measure(size: Size, syncs: int, streams: int) -> Iterator[Row]:
    """All rows: with kept KV caches, then with recomputed ones."""
    with tempfile.TemporaryDirectory(prefix="hubsync-gpu-") as name:
        root = Path(name)
        size.write_checkpoint(root / "base")
        started = time.perf_counter()
        arguments = ["--skip-tokenizer-init", "--worker-extension-cls", "benchmarks.gpu.ticking.TickingExtension"]
        with server_process(root, arguments, {}, follows=True) as process:
            process.wait_ready(400)
            apart = "a GPU of its own" if torch.cuda.device_count() > 1 else "on the trainer's GPU"
            yield Row("server started", time.perf_counter() - started, "s", apart)
            yield from _Site(size, root, process.url, streams).rows(syncs)


def server_process(
    root: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    checkpoint: Path | None = None,
    follows: bool = False,
) -> ServerProcess:
    """A server as users run it: compiled and with CUDA graphs, on a GPU of its own if there are two.

    Args:
        root: directory of the benchmark: a checkpoint `base`, a run `run`.
        checkpoint: another one to serve.
        follows: whether it has hubsync's worker extension, and the run.
    """
    settings = {"HUBSYNC_CACHE": str(root / "cache"), **environment}
    arguments = list(arguments)
    if torch.cuda.is_available():
        settings |= {"OMP_NUM_THREADS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": ""}
        arguments += ["--no-enforce-eager", "--gpu-memory-utilization", "0.25"]
    if torch.cuda.device_count() > 1:
        settings["CUDA_VISIBLE_DEVICES"] = "1"
    return ServerProcess(
        checkpoint or root / "base",
        root / "log",
        bucket=str(root / "run") if follows else None,
        environment=settings,
        arguments=arguments,
        max_model_len=2048,
    )


class _Site:
    """A trainer, and the server that follows it."""

    def __init__(self, size: Size, root: Path, url: str, streams: int):
        self._size = size
        self._root, self._url, self._streams = root, url, streams
        self._server = VLLMServer(url)
        self._replica = Replica(self._server)
        self._model = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]

    def rows(self, syncs: int) -> Iterator[Row]:
        policy, optimizer, plain = self._trainer()
        policies: tuple[Literal["recompute", "keep"], ...] = ("keep", "recompute")
        for kv_cache in policies:
            with DeltaWeightTransferEngine(policy, optimizer, self._config([self._url], kv_cache)) as engine:
                yield from self._synced(engine, optimizer, kv_cache, syncs, plain)
        with DeltaWeightTransferEngine(policy, optimizer, self._config([])) as engine:
            yield from self._trainer_idle(engine, optimizer, syncs)

    def _config(self, servers: list[str], kv_cache: Literal["recompute", "keep"] = "keep") -> SyncConfig:
        run, base = str(self._root / "run"), str(self._root / "base")
        return SyncConfig(bucket=run, base_model=base, servers=servers, kv_cache=kv_cache)

    def _trainer(self) -> tuple[torch.nn.Module, torch.optim.Optimizer, float]:
        """And the seconds of a step that nothing follows."""
        from transformers import AutoModelForCausalLM

        def load() -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(self._root / "base", dtype=self._size.dtype)

        policy = load().to("cuda" if torch.cuda.is_available() else "cpu")
        optimizer = torch.optim.AdamW(policy.parameters(), lr=RATES[self._size.dtype], fused=True)
        for parameter in policy.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer.step()
        plain = statistics.median(timed(optimizer.step) for _ in range(5))
        policy.load_state_dict(load().state_dict())
        if self._size.dtype == torch.float32:
            _spread(policy)
        return policy, optimizer, plain

    def _synced(
        self,
        engine: DeltaWeightTransferEngine,
        optimizer: torch.optim.Optimizer,
        kv_cache: str,
        syncs: int,
        plain: float,
    ) -> Iterator[Row]:
        engine.sync()
        for _ in range(2):  # what is compiled or allocated once
            self._sync(engine, optimizer, Measured())
        measured, floors = Measured(), []
        with Streams(self._url, self._model, self._streams, 1000, self._root / f"{kv_cache}.npz") as streams:
            begun = self._server.rpc("benchmark_watch")[0]
            quiet = [window(_SETTLING_S) for _ in range(syncs)]
            for _ in range(syncs):
                self._sync(engine, optimizer, measured)
            if kv_cache == "recompute":
                floors = [self._compute_again() for _ in range(_FLOORS)]
            seen = Seen.of(begun, self._server.rpc("benchmark_seen")[0])
            arrivals = streams.finish()
        if kv_cache == "keep":
            yield from _sync_rows(measured, plain)
            yield from _engine_rows(measured, seen, quiet)
        yield from _gap_rows(kv_cache, measured, seen, arrivals, quiet, [window for window in floors if window])

    def _trainer_idle(
        self, engine: DeltaWeightTransferEngine, optimizer: torch.optim.Optimizer, syncs: int
    ) -> Iterator[Row]:
        """Gaps where nothing of the trainer runs: it has published all versions before."""
        replica, measured, positions = Replica(self._server, "keep"), Measured(), []
        for _ in range(syncs):
            optimizer.step()
            positions.append(engine.publish().result().position)
        with Streams(self._url, self._model, self._streams, 1000, self._root / "idle.npz") as streams:
            begun = self._server.rpc("benchmark_watch")[0]
            quiet = [window(_SETTLING_S) for _ in range(syncs)]
            for position in positions:
                time.sleep(_SETTLING_S)
                start = time.perf_counter()
                replica.wait_staged(position)
                replica.commit(position)
                replica.wait_verified(position)
                measured.windows.append((start, time.perf_counter()))
                time.sleep(_SETTLING_S)
            seen = Seen.of(begun, self._server.rpc("benchmark_seen")[0])
            arrivals = streams.finish()
        yield from _gap_rows("keep, trainer idle", measured, seen, arrivals, quiet, [])

    def _sync(self, engine: DeltaWeightTransferEngine, optimizer: torch.optim.Optimizer, measured: Measured) -> None:
        time.sleep(_SETTLING_S)
        measured.steps.append(timed(optimizer.step))
        start = time.perf_counter()
        report = engine.deliver(engine.publish())
        measured.walls.append(time.perf_counter() - start)
        measured.reports.append(report)
        self._replica.wait_verified(report.published.position)  # raises if the live weights are others
        measured.windows.append((start, time.perf_counter()))
        time.sleep(_SETTLING_S)
        measured.metrics.append(self._replica.status().ranks[0]["metrics"])

    def _compute_again(self) -> Window | None:
        """Have all running requests computed again, without new weights. None if this vLLM has no call for that."""
        time.sleep(2 * _SETTLING_S)
        start = time.perf_counter()
        answer = httpx.post(f"{self._url}/reset_prefix_cache", params={"reset_running_requests": "true"}, timeout=60)
        time.sleep(_SETTLING_S)
        done = answer.is_success and (not answer.content or answer.json().get("success", True))
        return (start, time.perf_counter()) if done else None


def _spread(policy: torch.nn.Module) -> None:
    """Move weights off the bfloat16 numbers that they are, as training does, not so far that they round to others."""
    with torch.no_grad():
        for parameter in policy.parameters():
            moved = parameter * torch.empty_like(parameter).uniform_(1 - 2**-9, 1 + 2**-9)
            parameter.copy_(moved.where(moved.bfloat16() == parameter.bfloat16(), parameter))


def window(seconds: float) -> Window:
    start = time.perf_counter()
    time.sleep(seconds)
    return start, time.perf_counter()


def _sync_rows(measured: Measured, plain: float) -> Iterator[Row]:
    published = measured.reports[-1].published
    reports = measured.reports
    changed = f"{published.changed / 1e6:.1f} M, {published.changed / published.total:.2%} changed"
    walls = ms(measured.walls)
    yield Row("publish to committed", walls, "ms", f"goal 350; longest {1e3 * max(measured.walls):.0f}; {changed}")
    yield Row("  encode", ms([r.published.encode_s for r in reports]), "ms")
    yield Row("  upload to a directory", ms([r.published.upload_s for r in reports]), "ms")
    for metric, name in [
        ("stage_s", "stage"), ("fetch_s", "  fetch and SHA-256"), ("decode_s", "  decode"),
        ("place_s", "  places, old and new values, digest"), ("commit_s", "commit"), ("verify_s", "verify"),
    ]:  # fmt: skip
        values = [metrics[metric] for metrics in measured.metrics if metric in metrics]
        goal = {"stage_s": "goal 150", "commit_s": "goal 3", "verify_s": "goal 15"}.get(metric, "")
        if values:
            yield Row(f"  {name}", ms(values), "ms", goal)
    pauses = [commit.pause_s for report in reports for commit in report.commits]
    yield Row("    the engine's turn with the commit", ms(pauses), "ms", "caches and label included")
    share = statistics.median(measured.steps) / plain
    yield Row("followed step of the trainer", ms(measured.steps), "ms", f"{share:.2f} of a plain one")


def _engine_rows(measured: Measured, seen: Seen, quiet: Sequence[Window]) -> Iterator[Row]:
    late, usual = ([seen.longest_delay(window) for window in windows] for windows in (measured.windows, quiet))
    note = f"goal 5; without a sync {1e3 * max(usual):.1f}"
    yield Row("longest delay of a thread that ticks each ms", 1e3 * max(late), "ms", note)
    yield Row("extra GPU memory of the engine's process", seen.extra / 1e6, "MB", "at its peak, KV caches apart")


def _gap_rows(
    kv_cache: str, measured: Measured, seen: Seen, arrivals: Arrivals, quiet: Sequence[Window], floors: Sequence[Window]
) -> Iterator[Row]:
    def longest(windows: Sequence[Window]) -> float:
        return 1e3 * float(np.quantile(np.concatenate([arrivals.longest_gaps(*window) for window in windows]), 0.999))

    def step(windows: Sequence[Window]) -> tuple[float, float]:
        length, begins = max(seen.longest_step(window) for window in windows)
        return 1e3 * length, 1e3 * begins

    tokens = statistics.mean(arrivals.between(*window) / (window[1] - window[0]) for window in quiet)
    running = statistics.mean(arrivals.in_flight(start) for start, _ in measured.windows)
    usual, syncing = longest(quiet), longest(measured.windows)
    note = f"{syncing:.1f} - {usual:.1f} without; {arrivals.streams} streams, {tokens:,.0f} tokens/s"
    yield Row(f"{kv_cache}: longest token gap, p99.9, beyond the usual", syncing - usual, "ms", f"goal 5; {note}")
    (forward, begins), (undisturbed, _) = step(measured.windows), step(quiet)
    note = f"{forward:.1f} - {undisturbed:.1f} without; it begins {begins:.0f} ms after the publish call"
    yield Row("  between two forward passes of the engine", forward - undisturbed, "ms", note)
    yield Row("  tokens in flight", running, "", "prompts included")
    if floors:
        floor = longest(floors)
        yield Row(
            "  of the gap when they are only computed again", syncing / floor, "x", f"goal 1.2; floor {floor:.1f} ms"
        )


def ms(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)
