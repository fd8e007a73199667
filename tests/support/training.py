"""Ranks of one training as real processes, each with a model and an engine.

With enough GPUs each rank has one and uses NCCL. Otherwise the ranks use gloo on the CPU.

A test passes a function `scenario(rank, address) -> value` that each rank runs, and gets the values of all ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hubsync.bucket import LocalBucket
from hubsync.publish import engine as engine_module
from hubsync.publish.publisher import Publisher

from .faults import FaultyBucket

_PATIENCE = 300.0  # seconds for a loaded machine; far below gloo's timeout of half an hour

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.training"])


class Net(torch.nn.Module):
    """A model with tied weights, a buffer, and sizes that neither 2 nor 3 ranks divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(1031, 24)
        self.up = torch.nn.Linear(24, 37)
        self.down = torch.nn.Linear(37, 24)
        self.norm = torch.nn.LayerNorm(24)
        self.head = torch.nn.Linear(24, 1031, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(-1, 1, 24))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return self.head(self.norm(hidden) + self.shift)


def device_of(ranks: int) -> str:
    return "cuda" if torch.cuda.device_count() >= ranks else "cpu"


def spread(how: str) -> torch.nn.Module:
    """A `Net`, sharded or replicated over all ranks. Returns this rank's part."""
    ranks = dist.get_world_size()
    device = device_of(ranks)
    model = Net().to(device)
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if how == "dtensor":
        mesh = init_device_mesh(device, (ranks,))
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                placement = Replicate() if parameter.ndim == 1 else Shard(int(module is model.up))
                placed = distribute_tensor(parameter.detach(), mesh, [placement])
                setattr(module, name, torch.nn.Parameter(placed))
        model.head.weight = model.embed.weight
        return model
    options: dict[str, Any] = {}
    if how == "hsdp":
        options["mesh"] = init_device_mesh(device, (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    else:
        options["mesh"] = init_device_mesh(device, (ranks,))
    if how == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in (model.up, model.down):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One optimizer step, with different data on each rank."""
    if isinstance(next(model.parameters()), DTensor) and not hasattr(model, "unshard"):
        _train_plain_dtensors(model, optimizer, seed)
        return
    torch.manual_seed(100 * seed + dist.get_rank())
    tokens = torch.randint(0, 1031, (2, 5)).to(device_of(dist.get_world_size()))
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def whole_view(model: torch.nn.Module, tied: str = "head.weight") -> dict[str, torch.Tensor]:
    """The expected published view, gathered with torch's methods. A collective."""
    found = {}
    for name, tensor in model.state_dict().items():
        # Offloaded shards are gathered on the device of the process group.
        whole = tensor.to(tensor.device_mesh.device_type).full_tensor() if isinstance(tensor, DTensor) else tensor
        if name.removeprefix("module.") != tied:
            found[name.removeprefix("module.")] = whole.to("cpu", torch.bfloat16, copy=True)
    return found


class Watch(TorchDispatchMode):
    """Records every tensor operation of a thread.

    Attributes:
        largest: elements of the largest tensor that an operation returned, but for bytes.
        collectives: name of each collective -> elements of the largest tensor in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.collectives: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its operations on local tensors are recorded
        out = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, _largest(out))
        if "c10d" in func.namespace:
            name = func.__name__
            self.collectives[name] = max(self.collectives.get(name, 0), _largest((args, out)))
        return out


@contextmanager
def watched() -> Iterator[Watch]:
    """Record operations of this thread, and of publishers in the background."""
    watch, publish = Watch(), Publisher._publish

    def watched_publish(self: Publisher, *args: Any) -> Any:
        with background:
            return publish(self, *args)

    background = Watch()
    background.collectives = watch.collectives
    Publisher._publish = watched_publish  # type: ignore[method-assign]
    try:
        with watch:
            yield watch
    finally:
        Publisher._publish = publish  # type: ignore[method-assign]
        watch.largest = max(watch.largest, background.largest)


def faulty_bucket() -> list[FaultyBucket]:
    """The buckets that engines of this process open from now on. Each can fail on command."""
    opened: list[FaultyBucket] = []

    def open_faulty(address: str, **_: object) -> FaultyBucket:
        opened.append(FaultyBucket(LocalBucket(address, create=True)))
        return opened[-1]

    engine_module.open_bucket = open_faulty  # type: ignore[assignment]
    return opened


def run(ranks: int, scenario: Callable[..., Any], address: Path, *args: Any) -> list[Any]:
    """Run a scenario on this many ranks. Returns each rank's value, or the exit code of a rank that died.

    An exception of any rank, or no message from all for a while, ends all ranks, and fails with their output.
    Under `make test-gpu` skips the test if there are fewer GPUs than ranks, instead of running it on CPUs.
    """
    if os.environ.get("HUBSYNC_TEST_GPU") and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, and there are {torch.cuda.device_count()}")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as directory:
        for rank in range(ranks):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank,
                args=(sender, rank, ranks, directory, scenario, str(address), args),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _results(pipes, processes, Path(directory))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(
    messages: Connection, rank: int, ranks: int, directory: str, scenario: Callable[..., Any], address: str, args: Any
) -> None:
    with _printed(Path(directory), rank).open("wb") as printed:
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
    torch.set_num_threads(1)
    device = device_of(ranks)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    try:
        messages.send_bytes(pickle.dumps(scenario(rank, address, *args)))  # torch would send tensors as handles
    except Exception:
        messages.send_bytes(pickle.dumps(_Raised(traceback.format_exc())))


@dataclass(frozen=True)
class _Raised:
    """The traceback of a scenario that raised."""

    trace: str


def _results(pipes: list[Connection], processes: list[Any], directory: Path) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + _PATIENCE
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {list(waiting.values())} sent nothing for {_PATIENCE:g} s\n{_all_printed(directory)}"
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            results[rank] = _result(pipe, processes[rank])  # type: ignore[arg-type]
            if isinstance(results[rank], _Raised):
                raise AssertionError(f"rank {rank} raised\n{results[rank].trace}\n{_all_printed(directory)}")
    return [results[rank] for rank in range(len(pipes))]


def _result(pipe: Connection, process: Any) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        return process.exitcode


def _printed(directory: Path, rank: int) -> Path:
    return directory / f"printed-{rank}"


def _all_printed(directory: Path) -> str:
    return "\n".join(
        f"--- {path.name}:\n{path.read_text(errors='replace')[-4000:]}" for path in sorted(directory.glob("printed-*"))
    )


def _train_plain_dtensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Set random gradients: a forward pass would need every input as a DTensor."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=random)
        parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
    optimizer.step()
    optimizer.zero_grad()


def _largest(values: Any) -> int:
    if isinstance(values, DTensor):
        return 0
    if isinstance(values, torch.Tensor):
        return values.numel() if values.dtype != torch.uint8 else 0  # bytes of a file
    if isinstance(values, (list, tuple)):
        return max(map(_largest, values), default=0)
    return 0
