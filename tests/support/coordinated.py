"""Ranks of a torch.distributed job, as real processes, whose saves end when and as the test says."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hubsync.lifecycle.checkpoint_coordinator import CheckpointCoordinator

_PATIENCE = 120.0  # seconds that a loaded machine may need for a step that takes a fraction of one

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.coordinated"])


@dataclass
class Rank:
    """A rank, which does one call after the other, and the directory in which all of them meet."""

    process: BaseProcess
    calls: Connection
    root: Path
    number: int

    def call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Have it call a method of its coordinator; `save` starts a save in the background that waits for `end`."""
        self.calls.send((method, args, kwargs))

    def heard(self) -> str | None:
        """The error of its last call, or None."""
        assert self.calls.poll(_PATIENCE), f"rank {self.number} does not answer"
        return self.calls.recv()

    def end(self, name: str, how: str = "durable") -> None:
        """End its save of this name: "durable", or with an error of this text."""
        end = self.root / f"{self.number}-{name}"
        end.with_suffix(".new").write_text(how)
        end.with_suffix(".new").rename(end)


@contextmanager
def job(root: Path, size: int = 2) -> Iterator[list[Rank]]:
    """The ranks of a job, which end with it."""
    pipes = [_context.Pipe() for _ in range(size)]
    processes = [
        _context.Process(target=_rank, args=(str(root), number, size, theirs), daemon=True)
        for number, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    try:
        yield [
            Rank(*pair, root, number) for number, pair in enumerate(zip(processes, (p for p, _ in pipes), strict=True))
        ]
    finally:
        for process in processes:
            process.kill()
            process.join()


def commits(root: Path) -> list[str]:
    """What was committed so far, in order, as "rank step is_state_dict"."""
    path = root / "commits"
    return path.read_text().splitlines() if path.exists() else []


def _rank(root: str, number: int, size: int, calls: Connection) -> None:
    where = Path(root)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=number, world_size=size)

    def commit(step: int, is_state_dict: bool) -> None:
        if step == 13:
            raise OSError("the bucket is away")
        with (where / "commits").open("a") as file:
            file.write(f"{number} {step} {is_state_dict}\n")

    def save(name: str, step: int, is_state_dict: bool = False) -> None:
        coordinator.save_async(name, lambda: _ended(where / f"{number}-{name}"), step, is_state_dict)

    coordinator = CheckpointCoordinator(commit)
    while True:
        method, args, kwargs = calls.recv()
        try:
            (save if method == "save" else getattr(coordinator, method))(*args, **kwargs)
            calls.send(None)
        except Exception as error:
            calls.send(f"{type(error).__name__}: {error}")


def _ended(end: Path) -> None:
    while not end.exists():
        time.sleep(0.002)
    if (how := end.read_text()) != "durable":
        raise OSError(how)
