"""Tokens that a server generates while its weights are synchronised. benchmarks/README.md explains the columns.

    python -m benchmarks.overlap                 a Hub on this machine, with 50 ms added to each request
    python -m benchmarks.overlap --delay 0.2 --syncs 20 --json

Needs vLLM. The Hub, the server, its bucket and the training loop are real; the gradients are random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import httpx
import torch
from rich.console import Console
from rich.table import Table

from hubsync.demo.serving import ServerProcess
from hubsync.localhub import LocalHub
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.replicas.vllm_http import VLLMServer

from .apply import Stream, write_checkpoint

DENSITY = 1e-2  # share of the elements that a step may change
STREAMS = 4
OURS, PAUSED = "hubsync", "server paused"
ADDRESS = "hf://buckets/me/overlap/run"


@dataclass(frozen=True)
class Row:
    """Synchronisations of one kind.

    Attributes:
        kind: with or without a pause of the server.
        syncs: number of synchronisations.
        seconds: median duration, from the publishing call until the server serves.
        tokens_during: tokens generated during all of them.
        rate_during: tokens per second during them.
        rate_between: tokens per second in the intervals before them, in which only generation runs.
    """

    kind: str
    syncs: int
    seconds: float
    tokens_during: int
    rate_during: float
    rate_between: float


def measure(syncs: int, delay: float) -> list[Row]:
    with tempfile.TemporaryDirectory() as name, LocalHub(Path(name) / "hub") as hub:
        root = Path(name)
        write_checkpoint(root / "base", small=True)
        os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN="hf_local", HF_XET_CACHE=str(root / "xet"))
        environment = {"HUBSYNC_CACHE": str(root / "cache")}
        arguments = ["--skip-tokenizer-init"]
        with ServerProcess(
            root / "base", root / "log", bucket=ADDRESS, environment=environment, arguments=arguments
        ) as process:
            server = process.wait_ready()
            config = SyncConfig(bucket=ADDRESS, servers=[process.url])
            return _train(root / "base", config, server, hub, syncs, delay)


def _train(base: Path, config: SyncConfig, server: VLLMServer, hub: LocalHub, syncs: int, delay: float) -> list[Row]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    name = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"][0]["id"]
    streams = [Stream(server.url, name) for _ in range(STREAMS)]
    during: dict[str, list[tuple[float, int]]] = {OURS: [], PAUSED: []}
    between: dict[str, list[tuple[float, int]]] = {kind: [] for kind in during}
    with DeltaWeightTransferEngine(model, None, config) as engine:
        engine.sync()  # the server finds its position
        hub.fail("", times=2**31, delay=delay)
        for stream in streams:
            stream.start()
        while not all(len(stream.times) > 50 for stream in streams):
            time.sleep(0.05)
        for _ in range(syncs):
            for kind in during:
                change(model)
                between[kind].append(_tokens(streams, lambda: time.sleep(1.0)))
                during[kind].append(_tokens(streams, engine.sync if kind == OURS else partial(_paused, engine, server)))
        for stream in streams:
            stream.ended.set()
        for stream in streams:
            stream.join(60)
        hub.reset()
    return [_row(kind, during[kind], between[kind]) for kind in during]


@torch.no_grad()
def change(model: torch.nn.Module) -> None:
    """Change a random share of all elements by 2 %, so that their bf16 bits change."""
    for parameter in model.parameters():
        chosen = torch.rand_like(parameter) < DENSITY
        parameter.mul_(1 + 0.02 * chosen)


def _paused(engine: DeltaWeightTransferEngine, server: VLLMServer) -> None:
    """Pause the server throughout, as transfers do (for example TRL's) whose weights must not be read during writes."""
    server.pause()
    engine.sync()
    server.resume()


def _tokens(streams: Sequence[Stream], work: Callable[[], object]) -> tuple[float, int]:
    """Seconds that the work takes, and the number of tokens that arrive in that time."""
    start = time.perf_counter()
    work()
    end = time.perf_counter()
    return end - start, sum(start <= moment < end for stream in streams for moment in list(stream.times))


def _row(kind: str, during: list[tuple[float, int]], between: list[tuple[float, int]]) -> Row:
    tokens = sum(count for _, count in during)
    return Row(
        kind,
        len(during),
        statistics.median(seconds for seconds, _ in during),
        tokens,
        tokens / sum(seconds for seconds, _ in during),
        sum(count for _, count in between) / sum(seconds for seconds, _ in between),
    )


def print_table(rows: Sequence[Row], delay: float) -> None:
    title = (
        f"Generation while weights are synchronised: {STREAMS} streams, {1e3 * delay:.0f} ms added to each Hub request"
    )
    table = Table(title=title)
    for column in ("", "syncs", "seconds per sync", "tokens during", "tokens/s during", "tokens/s between"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row.kind, str(row.syncs), f"{row.seconds:.2f}", f"{row.tokens_during:,}", f"{row.rate_during:.0f}",
            f"{row.rate_between:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syncs", type=int, default=8, help="synchronisations of each kind")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds added to each request to the Hub")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.syncs, arguments.delay)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(rows, arguments.delay)


if __name__ == "__main__":
    main()
