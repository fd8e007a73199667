"""A trainer and a real vLLM server on one GPU: how long a sync takes, and how long token streams wait for it.

    python -m benchmarks.gpu_server                        Qwen3-0.6B's shape, random weights, 8 syncs
    python -m benchmarks.gpu_server --model qwen3-4b --kv-cache keep

The server is compiled and uses CUDA graphs. The trainer's gradients are random. The digest of the server's live weights
is recomputed after every commit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.demo.serving import ServerProcess
from hubsync.publish.results import SyncReport
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer

from .apply import Stream
from .gpu_publish import Row, print_rows

_SIZES = {  # hidden, intermediate, layers, heads
    "qwen3-0.6b": (1024, 3072, 28, 16),
    "qwen3-4b": (2560, 9728, 36, 32),
}
_RATE = 2e-7  # learning rate: changes about 0.8 % of the view in a step


def write_checkpoint(directory: Path, model: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, inner, layers, heads = _SIZES[model]
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def measure(model: str, syncs: int, streams: int, kv_cache: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="hubsync-gpu-") as name:
        root = Path(name)
        write_checkpoint(root / "base", model)
        yield from _served(root, model, syncs, streams, kv_cache)


def _served(root: Path, model: str, syncs: int, streams: int, kv_cache: str) -> Iterator[Row]:
    started = time.perf_counter()
    with ServerProcess(
        root / "base",
        root / "log",
        bucket=str(root / "run"),
        environment={"HUBSYNC_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": ""},
        arguments=["--skip-tokenizer-init", "--no-enforce-eager", "--gpu-memory-utilization", "0.25"],
        max_model_len=2048,
    ) as process:
        process.wait_ready(400)
        yield Row("server started", time.perf_counter() - started, "s")
        yield from _trained(root, process.url, model, syncs, streams, kv_cache)


def _trained(root: Path, url: str, model: str, syncs: int, streams: int, kv_cache: str) -> Iterator[Row]:
    from transformers import AutoModelForCausalLM

    policy: torch.nn.Module = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    policy.to("cuda")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=_RATE, fused=True)
    for parameter in policy.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    plain = statistics.median(_timed(optimizer) for _ in range(5))
    policy.load_state_dict(AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).state_dict())
    name = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    clients = [Stream(url, name) for _ in range(streams)]
    config = SyncConfig(bucket=str(root / "run"), base_model=str(root / "base"), servers=[url], kv_cache=kv_cache)  # type: ignore[arg-type]
    with DeltaWeightTransferEngine(policy, optimizer, config) as engine:
        engine.sync()
        for client in clients:
            client.start()
        while not all(len(client.times) > 50 for client in clients):
            time.sleep(0.05)
        quiet, begun = _longest(clients, 3.0), time.perf_counter()
        server = Replica(VLLMServer(url))
        steps, calls, walls, reports, gaps, verified = [], [], [], [], [], []
        for _ in range(syncs):
            steps.append(_timed(optimizer))
            start = time.perf_counter()
            ticket = engine.publish()
            calls.append(time.perf_counter() - start)
            reports.append(engine.deliver(ticket))
            walls.append(time.perf_counter() - start)
            server.wait_verified(reports[-1].published.position)  # raises if the live weights are others
            verified.append(time.perf_counter() - start - walls[-1])
            time.sleep(0.3)
            gaps.append(max(client.longest_gap(start, time.perf_counter()) for client in clients))
        tokens = sum(moment > begun for client in clients for moment in client.times)
        for client in clients:
            client.ended.set()
        yield Row("tokens generated meanwhile", tokens, "", f"{streams} streams, kv_cache={kv_cache}")
    yield from _rows(reports, steps, calls, walls, plain)
    yield Row(
        "verified after the commit", 1e3 * statistics.median(verified[1:]), "ms", f"{len(verified)} of {syncs} right"
    )
    yield Row("longest gap between tokens, without syncs", 1e3 * quiet, "ms")
    yield Row("  around a sync, median and longest", 1e3 * statistics.median(gaps), "ms", f"{1e3 * max(gaps):.0f} ms")


def _rows(
    reports: list[SyncReport], steps: list[float], calls: list[float], walls: list[float], plain: float
) -> Iterator[Row]:
    later = reports[1:]
    published = later[-1].published

    def median(values: list[float]) -> float:
        return 1e3 * statistics.median(values)

    yield Row("changed", published.changed / 1e6, "M", f"{published.changed / published.total:.2%}")
    yield Row("plain step, beside the idle server", 1e3 * plain, "ms")
    yield Row("followed step, beside the generating server", median(steps[1:]), "ms", f"the first {1e3 * steps[0]:.0f}")
    yield Row("publish call", median(calls[1:]), "ms", f"the first {1e3 * calls[0]:.0f}")
    yield Row("encode", median([r.published.encode_s for r in later]), "ms")
    yield Row("upload to a directory", median([r.published.upload_s for r in later]), "ms")
    for phase in ("stage", "commit", "pause"):
        yield Row(phase, median([getattr(commit, f"{phase}_s") for r in later for commit in r.commits]), "ms")
    yield Row("publish to committed", median(walls[1:]), "ms", f"the first {1e3 * walls[0]:.0f}")


def _longest(clients: list[Stream], seconds: float) -> float:
    start = time.perf_counter()
    time.sleep(seconds)
    return max(client.longest_gap(start, time.perf_counter()) for client in clients)


def _timed(optimizer: torch.optim.Optimizer) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(_SIZES), default="qwen3-0.6b")
    parser.add_argument("--syncs", type=int, default=8)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--kv-cache", choices=["recompute", "keep"], default="recompute")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    options = parser.parse_args()
    rows = measure(options.model, options.syncs, options.streams, options.kv_cache)
    print_rows(rows, options.model, options.json)


if __name__ == "__main__":
    main()
