"""Publishers and followers as real processes that stop at a given call and wait to be killed or resumed.

The weights depend only on the step, so each process knows the weights of every step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.bucket.base import Bucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import replay
from hubsync.errors import HubsyncError
from hubsync.publish import engine as engine_module

from .faults import FaultyBucket

_PATIENCE = 120.0  # seconds for a step on a loaded machine; it takes a fraction of one

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.processes"])


class Model(torch.nn.Module):
    """A model whose weights depend only on the step."""

    def __init__(self, step: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(64, 16)
        self.norm = torch.nn.LayerNorm(16)
        for number in range(1, step + 1):
            self.train_step(number)

    @torch.no_grad()
    def train_step(self, number: int) -> None:
        random = torch.Generator().manual_seed(number)
        for parameter in self.parameters():
            chosen = torch.rand(parameter.shape, generator=random) < 0.1
            parameter.add_(chosen * torch.randn(parameter.shape, generator=random))


def weights(step: int) -> dict[str, torch.Tensor]:
    """The published view after a step."""
    return {name: tensor.detach().bfloat16() for name, tensor in Model(step).named_parameters()}


@dataclass
class Child:
    """A running process and its messages."""

    process: BaseProcess
    messages: Connection

    def expect(self, kind: str) -> Any:
        """The content of the next message, which must have this kind."""
        assert self.messages.poll(_PATIENCE), f"no {kind} after {_PATIENCE} seconds"
        got, content = self.messages.recv()
        assert got == kind, (got, content)
        return content

    def expect_stop(self) -> None:
        """Wait until the process has stopped at the given call."""
        self.expect("stopping")
        while _state(self.process.pid) != "T":
            time.sleep(0.001)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wake(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)


@contextmanager
def publisher(
    address: Path, *, first: int, last: int, stop: tuple[str, str] | None = None, **config: Any
) -> Iterator[Child]:
    """A process that publishes steps `first + 1` to `last`, starting with the weights of step `first`.

    It sends ("published", (step, version)) for each step, ("closed", None) at the end, or ("error", class name).

    Args:
        stop: (verb, part of a path): stop right before the first such call to the bucket.
    """
    with _started(_publish, str(address), first, last, stop, config) as child:
        yield child


@contextmanager
def follower(address: Path, cache: Path, *, until: int) -> Iterator[Child]:
    """A process that follows the run from the weights of step 0. It sends ("at", (version, digest)) at the end."""
    with _started(_follow, str(address), str(cache), until) as child:
        yield child


@contextmanager
def _started(target: Any, *args: Any) -> Iterator[Child]:
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=target, args=(sender, *args), daemon=True)
    process.start()
    sender.close()
    try:
        yield Child(process, receiver)
    finally:
        process.kill()
        process.join()


def _publish(
    messages: Connection, address: str, first: int, last: int, stop: tuple[str, str] | None, config: dict[str, Any]
) -> None:
    engine_module.open_bucket = lambda address, **_: _StoppingBucket(LocalBucket(address, create=True), messages, stop)
    model = Model(first)
    try:
        with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, **config)) as engine:
            for step in range(first + 1, last + 1):
                model.train_step(step)
                messages.send(("published", (step, engine.publish(step).result().version)))
        messages.send(("closed", None))
    except HubsyncError as error:
        messages.send(("error", type(error).__name__))


class _StoppingBucket(FaultyBucket):
    def __init__(self, inner: Bucket, messages: Connection, stop: tuple[str, str] | None):
        super().__init__(inner)
        self._messages = messages
        self._stop = stop

    def _call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        if self._stop is not None and verb == self._stop[0]:
            path = args[0] if verb == "commit" else args[0][0].name
            if self._stop[1] in path:
                self._stop = None
                self._messages.send(("stopping", path))
                # To this thread: a signal to the process may be taken by another thread, while this one continues.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return super()._call(verb, *args, **kwargs)


def _follow(messages: Connection, address: str, cache: str, until: int) -> None:
    reader = ChainReader(LocalBucket(address), cache)
    tensors, position = weights(0), reader.run().origin
    deadline = time.monotonic() + _PATIENCE
    while position.version < until and time.monotonic() < deadline:
        plan = reader.plan(position)
        view = replay(reader, plan, tensors)
        tensors, position = view.tensors, view.position
    messages.send(("at", (position.version, position.digest)))


def _state(pid: int | None) -> str:
    """State letter of a process; T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
