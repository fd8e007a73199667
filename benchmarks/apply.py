"""Time to change weights in place, compared with vLLM's own sparse path. benchmarks/README.md explains the rows.

    python -m benchmarks.apply                     one model, one process, one thread; then a server under load
    python -m benchmarks.apply --no-server --json

Without vLLM plain modules replace the model and there is no peer. On GPUs: `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hubsync.apply.applier import Applier
from hubsync.bucket import open_bucket
from hubsync.chain import ChainWriter
from hubsync.format.digest import Digest, digest_change, digest_view, tensor_seed
from hubsync.format.manifest import Position, Run
from hubsync.format.parts import Transition, write_delta
from hubsync.format.patch import Patch, TensorDelta, changes_of
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import TORCH_DTYPES, advance, bits_of, dtype_code

DENSITIES = (1e-2, 1e-3, 1e-4)
RUN_ID = "be9c4" * 6 + "00"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Times:
    """Seconds of repeated measurements."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> list[float]:
        return [min(self.values), max(self.values)]


@dataclass(frozen=True)
class Row:
    """One density. Seconds are medians; `*_spread` their minima and maxima; `native_s` None without a peer.

    Attributes:
        density: share of all elements that change.
        changed: elements that change.
        stage_s: from a decoded patch to the staged writes and the target's digest; runs during serving.
        commit_s: the time that serving waits.
        native_s: vLLM's `load_checkpoint_weight_patches` with the same change; serving waits for all of it.
        commit_peak_bytes: peak growth of the process's memory in the commit; None if unknown.
        scatter_gb_s: bytes read and written by the commit (offset, old, new, three times the element) per second.
    """

    density: float
    changed: int
    stage_s: float
    commit_s: float
    native_s: float | None
    commit_peak_bytes: int | None
    scatter_gb_s: float
    stage_spread: list[float]
    commit_spread: list[float]
    native_spread: list[float] | None


# --- the model --------------------------------------------------------------------------------------


def write_checkpoint(directory: Path, *, small: bool = False) -> None:
    """A random Qwen3 of 159 M parameters (a tiny one if `small`), in bf16."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 13,
        "vocab_size": 48000,
    }
    if small:
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 4000}
    config = transformers.Qwen3Config(
        **sizes, num_attention_heads=8, num_key_value_heads=4, head_dim=sizes["hidden_size"] // 8,
        tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


class Plain(torch.nn.Module):
    """A model whose loader copies every tensor into a parameter of the same shape."""

    def __init__(self, tensors: Tensors, device: torch.device):
        super().__init__()
        self._by_name = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            self._by_name[name] = torch.nn.Parameter(tensor.to(device), requires_grad=False)
            self.register_parameter(f"p{number}", self._by_name[name])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self._by_name[name].data.copy_(tensor)


def table_of(tensors: Tensors) -> TensorTable:
    return TensorTable([TensorSpec(name, tuple(t.shape), dtype_code(t.dtype)) for name, t in tensors.items()])


def step(table: TensorTable, tensors: Tensors, density: float, seed: int) -> tuple[Patch, Digest]:
    """A patch of +-1 steps at random places, and the change of the digest."""
    rng = np.random.default_rng(seed)
    patch: Patch = {}
    change = Digest()
    for index, spec in enumerate(table):
        places = np.flatnonzero(rng.random(spec.numel, np.float32) < density)
        if len(places) == 0:
            continue
        diffs = rng.choice(np.array([-1, 1], np.int16), len(places))
        old = bits_of(tensors[spec.name])[places]
        change += digest_change(tensor_seed(spec.name), places, old, advance(old, diffs))
        patch[index] = TensorDelta(places, diffs)
    return patch, change


# --- in one process ---------------------------------------------------------------------------------


def measure(
    model: torch.nn.Module, tensors: Tensors, device: torch.device, native: Callable[[Patch], None] | None, repeats: int
) -> list[Row]:
    """Stage, commit and undo at each density, then make the same change with the peer. Live weights are compared."""
    table = table_of(tensors)
    applier = Applier(model, table, device)
    digest = applier.join([applier.inventory()])
    start = Position(0, digest.hex)
    applier.adopt(start)
    rows = []
    for density in DENSITIES:
        stages, commits, natives, peaks = [], [], [], []
        changed = 0
        for repeat in range(repeats + 1):
            patch, change = step(table, tensors, density, repeat)
            target = Position(1, (digest + change).hex)
            began = time.perf_counter()
            staged = applier.stage_patch(patch, target)
            _wait(device)
            stages.append(time.perf_counter() - began)
            reset_peak()
            before, began = resident(), time.perf_counter()
            applier.commit(target)
            _wait(device)
            commits.append(time.perf_counter() - began)
            peaks.append(peak() - before)
            assert applier.verify(), "the live weights are the target's"
            applier.undo()
            assert applier.verify()
            changed = staged.changed
            if native is not None:
                began = time.perf_counter()
                native(patch)
                natives.append(time.perf_counter() - began)
                assert sum(applier._live.digests(), Digest()).hex == target.digest, "the peer wrote the same"
                applier.heal(tensors, start)
        stage, commit = Times(tuple(stages[1:])), Times(tuple(commits[1:]))  # the first run compiles
        peer = Times(tuple(natives[1:])) if natives else None
        rows.append(
            Row(
                density,
                changed,
                stage.median,
                commit.median,
                peer.median if peer else None,
                max(peaks[1:]) if device.type == "cpu" else None,
                changed * (8 + 2 + 2 + 3 * 2) / commit.median / 1e9,
                stage.spread,
                commit.spread,
                peer.spread if peer else None,
            )
        )
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident() -> int:
    """Current resident memory of this process, in bytes."""
    return _status("VmRSS")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Peak resident memory since `reset_peak`, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def in_vllm(directory: Path, repeats: int) -> list[Row]:
    """Measure in an in-process vLLM engine, with vLLM's own sparse path as the peer."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    # vLLM for CPUs reads `__dict__` of every object of every module, including numba's library handle.
    from llvmlite.binding import ffi
    from safetensors.torch import load_file

    ask = ffi._lib_wrapper.__getattr__

    def without_dunders(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return ask(self, name)

    ffi._lib_wrapper.__getattr__ = without_dunders
    from vllm import LLM
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    engine = LLM(
        model=str(directory), worker_extension_cls="vllm_plugin.DeltaWorkerExtension", skip_tokenizer_init=True,
        max_model_len=512, max_num_seqs=4, dtype="bfloat16", enforce_eager=True, seed=0,
    )  # fmt: skip
    (model,) = engine.collective_rpc(lambda worker: worker.model_runner.get_model())
    tensors = load_file(directory / "model.safetensors")
    table = table_of(tensors)

    def native(patch: Patch) -> None:
        patches = []
        for index, delta in patch.items():
            spec = table[index]
            at, _, new = changes_of(delta, bits_of(tensors[spec.name]))
            values = torch.from_numpy(new.view(np.int16)).view(TORCH_DTYPES[spec.dtype])
            indices = torch.from_numpy(at)
            patches.append(CheckpointWeightPatch(spec.name, spec.shape, values.dtype, values, indices))
        with torch.inference_mode():
            load_checkpoint_weight_patches(model, patches)

    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = measure(model, tensors, torch.device("cpu"), native, repeats)
    engine.llm_engine.engine_core.shutdown()
    return rows


def in_plain_modules(repeats: int) -> list[Row]:
    """Measure plain modules of the same size, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    shapes = [(48000, 768), *[(9216, 1024)] * 13]
    tensors = {f"w{i}": (torch.randn(shape, generator=generator) * 0.02).bfloat16() for i, shape in enumerate(shapes)}
    return measure(Plain(tensors, device), tensors, device, None, repeats)


# --- a server under load ------------------------------------------------------------------------------


class Stream(threading.Thread):
    """Sends streamed requests one by one and records when tokens arrive."""

    def __init__(self, url: str, model: str):
        super().__init__(daemon=True)
        self.times: list[float] = []
        self.ended = threading.Event()
        self._url, self._model = url, model

    def run(self) -> None:
        request = {"model": self._model, "prompt": [7] * 16, "max_tokens": 400, "ignore_eos": True, "stream": True}
        while not self.ended.is_set():
            with httpx.stream("POST", f"{self._url}/v1/completions", json=request, timeout=120) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self.times.append(time.perf_counter())
                    if self.ended.is_set():
                        return

    def longest_gap(self, start: float, end: float) -> float:
        """Longest time between two tokens that overlaps the interval, in seconds."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return max((after - before for before, after in pairs if after > start and before < end), default=0.0)


def under_load(repeats: int) -> dict[str, float]:
    """Median of the longest gap between tokens of two streams, in milliseconds.

    Measured without commits, with commits that keep caches, with commits after which running requests recompute theirs,
    and with the latter between vLLM's pause and resume.
    """
    from safetensors.torch import load_file

    from hubsync.demo.serving import ServerProcess
    from hubsync.replicas.replica import Replica

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_checkpoint(root / "base", small=True)
        tensors = load_file(root / "base" / "model.safetensors")
        table = table_of(tensors)
        digest = digest_view(table, tensors)
        run = Run(RUN_ID, table, digest.hex, created=time.time())
        writer = ChainWriter.create(open_bucket(str(root / "bucket"), create=True), run)
        environment = {"HUBSYNC_CACHE": str(root / "cache")}
        arguments = ["--skip-tokenizer-init"]
        with ServerProcess(
            root / "base", root / "log", bucket=str(root / "bucket"), environment=environment, arguments=arguments
        ) as process:
            server = process.wait_ready()
            Replica(server).attach()
            model = httpx.get(f"{process.url}/v1/models", timeout=60).json()["data"][0]["id"]
            streams = [Stream(process.url, model) for _ in range(2)]
            for stream in streams:
                stream.start()
            while not all(len(stream.times) > 50 for stream in streams):
                time.sleep(0.05)
            clients = {
                "unpaused": Replica(server, "keep"),
                "recompute": Replica(server, "recompute"),
                "paused": Replica(server, "recompute", pause=True),
            }
            gaps: dict[str, list[float]] = {"baseline": [], **{kind: [] for kind in clients}}
            for version in range(1, len(clients) * repeats + 1):
                began = time.perf_counter()
                time.sleep(0.3)
                gaps["baseline"].append(max(stream.longest_gap(began, time.perf_counter()) for stream in streams))
                patch, change = step(table, tensors, 1e-2, version)
                for index, delta in patch.items():
                    bits = bits_of(tensors[table[index].name])
                    indices, _, after = changes_of(delta, bits)
                    bits[indices] = after
                parent, digest = Position(version - 1, digest.hex), digest + change
                position = Position(version, digest.hex)
                part = write_delta(table, patch, Transition(RUN_ID, parent, position))
                writer.commit_delta([part], digest=position.digest, changed=sum(map(len, patch.values())))
                kind, replica = list(clients.items())[version % len(clients)]
                replica.wait_staged(position)
                began = time.perf_counter()
                replica.commit(position)
                ended = time.perf_counter()
                time.sleep(0.2)
                gaps[kind].append(max(stream.longest_gap(began, ended) for stream in streams))
                replica.wait_verified(position)
            for stream in streams:
                stream.ended.set()
    return {f"gap_ms_{kind}": 1e3 * statistics.median(values) for kind, values in gaps.items()}


# --- output -----------------------------------------------------------------------------------------


def print_table(rows: Sequence[Row], gaps: dict[str, float] | None) -> None:
    table = Table(title="In-place apply, one thread; medians")
    for column in ("density", "changed", "stage", "commit", "native", "native / commit", "peak in commit", "scatter"):
        table.add_column(column, justify="right")
    for row in rows:
        native = "-" if row.native_s is None else f"{1e3 * row.native_s:.0f} ms"
        ratio = "-" if row.native_s is None else f"{row.native_s / row.commit_s:.0f} x"
        grown = "-" if row.commit_peak_bytes is None else f"{row.commit_peak_bytes / 1e6:.1f} MB"
        table.add_row(
            f"{row.density:.2%}", f"{row.changed:,}", f"{1e3 * row.stage_s:.2f} ms", f"{1e3 * row.commit_s:.2f} ms",
            native, ratio, grown, f"{row.scatter_gb_s:.1f} GB/s",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    if gaps is not None:
        text = ", ".join(f"{key.removeprefix('gap_ms_')} {value:.1f} ms" for key, value in gaps.items())
        console.print(f"Longest gap between tokens, two streams on a server, 1 % changed: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-server", action="store_true", help="leave out the server under load")
    parser.add_argument("--plain", action="store_true", help="use plain modules even if vLLM is installed")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain = arguments.plain or not _has_vllm()
    if plain:
        rows, gaps = in_plain_modules(arguments.repeats), None
    else:
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(Path(name))
            rows = in_vllm(Path(name), arguments.repeats)
        gaps = None if arguments.no_server else under_load(arguments.repeats)
    if arguments.json:
        print(json.dumps([asdict(row) | (gaps or {}) for row in rows], indent=2))
    else:
        print_table(rows, gaps)


def _has_vllm() -> bool:
    from importlib.util import find_spec

    return find_spec("vllm") is not None


if __name__ == "__main__":
    main()
