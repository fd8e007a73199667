"""vLLM's own weight transfer, which sends all weights: CUDA IPC on one GPU, NCCL between two.

The server, its streams and the measure of a gap are those of `server`. As vLLM's documentation does it, generation is
paused with `mode=keep` while weights are loaded. Copy limits are in the rows of `kernels`, the simple way of finding
changes in those of `trainer`.
"""

from __future__ import annotations

import math
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from .device import timed
from .models import Size
from .rows import Row
from .server import ms, server_process, window
from .streams import Streams

_SETTLING_S = 0.5


def measure(size: Size, syncs: int, streams: int) -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield Row("vLLM's own transfer", math.nan, "ms", "not run: it needs GPUs")
        return
    from transformers import AutoModelForCausalLM

    backend = "nccl" if torch.cuda.device_count() > 1 else "ipc"
    with tempfile.TemporaryDirectory(prefix="hubsync-gpu-") as name:
        root = Path(name)
        size.write_checkpoint(root / "base")
        arguments = ["--skip-tokenizer-init", "--weight-transfer-config", f'{{"backend": "{backend}"}}']
        with server_process(root, arguments, {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}) as process:
            process.wait_ready(400)
            policy: torch.nn.Module = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
            send = paused(process.url, sender(policy.to("cuda"), process.url, backend))
            yield from _rows(f"vLLM's {backend.upper()} transfer", size, send, process.url, root, syncs, streams)


def _rows(
    name: str, size: Size, send: Callable[[], None], url: str, root: Path, syncs: int, streams: int
) -> Iterator[Row]:
    for _ in range(2):
        send()
    seconds = [timed(send) for _ in range(syncs)]
    speed = (
        f"{2 * size.numel / 1e9:.1f} GB, {2 * size.numel / min(seconds) / 1e9:.0f} GB/s; generation paused meanwhile"
    )
    yield Row(f"{name}, server idle", ms(seconds), "ms", speed)
    model = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    with Streams(url, model, streams, 1000, root / "peer.npz") as reading:
        quiet = [window(_SETTLING_S) for _ in range(syncs)]
        windows = []
        for _ in range(syncs):
            time.sleep(_SETTLING_S)
            start = time.perf_counter()
            send()
            windows.append((start, time.perf_counter()))
        time.sleep(_SETTLING_S)
        arrivals = reading.finish()

    def longest(spans: list[tuple[float, float]]) -> float:
        return 1e3 * float(np.quantile(np.concatenate([arrivals.longest_gaps(*span) for span in spans]), 0.999))

    yield Row(f"{name}, {streams} streams", ms([end - start for start, end in windows]), "ms")
    yield Row("  longest token gap, p99.9, beyond the usual", longest(windows) - longest(quiet), "ms")


def paused(url: str, send: Callable[[], None]) -> Callable[[], None]:
    """`send` while the server's requests wait."""

    def sent() -> None:
        _post(url, "pause", params={"mode": "keep", "clear_cache": "false"})
        try:
            send()
        finally:
            _post(url, "resume")

    return sent


def sender(policy: torch.nn.Module, url: str, backend: str) -> Callable[[], None]:
    """Sends all weights of a model once: by vLLM's trainer half, or as its release 0.26 does it."""
    try:
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    except ImportError:
        return _static_ipc(policy, url)
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info: Any = IPCTrainerInitInfo(packed=True, rank=0)
    if backend == "nccl":
        info = NCCLTrainerInitInfo("127.0.0.1", _free_port(), 2, packed=True, rank=0)
    client = HTTPVLLMWeightSyncClient(url)
    engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=ModuleSource(policy))
    return engine.send_weights


def _static_ipc(policy: torch.nn.Module, url: str) -> Callable[[], None]:
    from vllm.distributed.weight_transfer import ipc_engine

    engine: Any = ipc_engine.IPCWeightTransferEngine
    _post(url, "init_weight_transfer_engine", json={"init_info": {}})

    def send() -> None:
        _post(url, "start_weight_update")
        how = {"send_mode": "http", "url": url, "packed": True}
        engine.trainer_send_weights(iter(list(policy.named_parameters())), how)
        _post(url, "finish_weight_update")

    return send


def _post(url: str, path: str, **content: Any) -> None:
    httpx.post(f"{url}/{path}", timeout=300, **content).raise_for_status()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
