"""The processes of a history: a Hub, publishers, replicas, an auditor. Each obeys one pipe, and may be killed anywhere.

They are forked from a process that has imported everything, compiled all kernels and never started a thread, so one is
there in milliseconds.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, Compactor, retention
from hubsync.chain.replay import replay
from hubsync.errors import HubsyncError, ReplicaRefused
from hubsync.localhub import LocalHub
from hubsync.manifest import Position
from hubsync.parts import open_anchor
from hubsync.trainer.config import VIEW_DTYPES
from vllm_plugin.session import Host, Session

from .model import Policy, States, served

PATIENCE_S = 60.0  # for an answer; a loaded machine needs a few seconds for what takes a fraction of one
_BUSY = ("attaching", "staging", "applied")

_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Setup:
    """What all processes of a history know.

    Attributes:
        seed: of the history.
        home: its directory.
        address: of the run.
        hub_url: of its Hub; None where the run lives in a directory.
        view_dtype, encoding, anchor_every, has_base: of the publisher's config. With a base, servers start from a
            checkpoint that the run names; else version 0 is an anchor.
        wide: has the policy a tensor of several chunks?
    """

    seed: int
    home: Path
    address: str
    hub_url: str | None
    view_dtype: str
    encoding: str
    anchor_every: int
    has_base: bool
    wide: bool

    @property
    def base(self) -> Path:
        return self.home / "base"

    @property
    def states(self) -> States:
        return States(self.home / "states")

    @property
    def dtype(self) -> torch.dtype:
        return VIEW_DTYPES[self.view_dtype]


@dataclass(frozen=True)
class Report:
    """What a replica serves.

    Attributes:
        states: of its ranks; see `vllm_plugin.session.Session.state`.
        positions: of the live weights, by what each rank says; None if it does not know.
        memory: per rank, every byte of every parameter.
    """

    states: tuple[str, ...]
    positions: tuple[Position | None, ...]
    memory: tuple[dict[str, bytes], ...]

    @property
    def in_service(self) -> bool:
        """Does it claim to serve a version? Whatever is poisoned, refused or unattached, on any rank, does not."""
        return None not in self.positions and set(self.states) <= {"ready", "staged", "staging"}

    def __str__(self) -> str:
        return f"{'/'.join(self.states)} at {'/'.join(map(str, self.positions))}"


@dataclass(frozen=True)
class Failed:
    """An actor's answer where it could not do what it was told: a HubsyncError, and for a replica what it serves."""

    error: str
    message: str
    report: Report | None = None

    def __str__(self) -> str:
        return f"{self.error}: {self.message}"


class Hung(Exception):
    """An actor did not answer."""


class Died(Exception):
    """An actor ended by itself."""


@dataclass
class Actor:
    """A running process."""

    name: str
    process: ForkProcess
    pipe: Connection
    details: dict[str, Any] = field(default_factory=dict)

    def tell(self, *command: Any) -> None:
        try:
            self.pipe.send(command)
        except OSError:
            raise Died(f"{self.name} has ended by itself") from None

    def answer(self, patience: float = PATIENCE_S) -> Any:
        """What it says next. Hung, with its stacks in its log, or Died."""
        if not self.pipe.poll(patience):
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
            raise Hung(f"{self.name} did not answer within {patience:g} s")
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise Died(f"{self.name} has ended by itself with exit code {self.process.exitcode}") from None

    def ask(self, *command: Any) -> Any:
        self.tell(*command)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nothing is closed."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def stop(self) -> None:
        """SIGSTOP: all threads stand still wherever they are."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)


def start(name: str, target: Callable[..., None], setup: Setup, *args: Any) -> Actor:
    """Fork an actor. Call it where no thread was ever started."""
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=_run, args=(name, target, setup, theirs, *args), name=name)
    process.start()
    theirs.close()
    return Actor(name, process, ours)


def _run(name: str, target: Callable[..., None], setup: Setup, pipe: Connection, *args: Any) -> None:
    log = (setup.home / "logs" / f"{name}.log").open("ab", buffering=0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    # Each is a machine of its own: no cache is shared between them. hf_xet reads this when it is first used.
    os.environ["HF_XET_CACHE"] = str(setup.home / name / "xet")
    if setup.hub_url is not None:
        os.environ["HF_ENDPOINT"] = setup.hub_url
    # Torch makes its pool of threads anew after a fork, when first asked; two threads that ask at once find none.
    torch.set_num_threads(1)
    try:
        target(pipe, setup, *args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _commands(pipe: Connection) -> Iterator[tuple[Any, ...]]:
    """What the pipe says, until the other end is closed."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


# --- the Hub ------------------------------------------------------------------------------------------


def hub(pipe: Connection, setup: Setup, port: int) -> None:
    """Serves; answers True once it does. Commands: ("fail", arguments), ("left",), ("heal",)."""
    with LocalHub(setup.home / "hub", port) as server:
        pipe.send(True)
        for command, *args in _commands(pipe):
            match command:
                case "fail":
                    server.fail(**args[0])
                    pipe.send(True)
                case "left":
                    pipe.send(server.faults_left())
                case "heal":
                    server.reset()
                    pipe.send(True)


# --- the publisher ------------------------------------------------------------------------------------


def publisher(pipe: Connection, setup: Setup, state: int) -> None:
    """Resumes training at a state and joins the run; answers the run's Position, or Failed and ends.

    Commands, each answered by a Position or Failed: ("publish", None) publishes what the weights are; ("publish",
    number) changes them first, into a new state; ("anchor",); ("serve", version); ("close",).
    """
    policy = Policy(setup.wide)
    setup.states.load(state, policy)
    try:
        engine = DeltaWeightTransferEngine(
            policy,
            None,
            SyncConfig(
                bucket=setup.address,
                view_dtype=setup.view_dtype,
                encoding=setup.encoding,
                base_model=str(setup.base) if setup.has_base else None,
                anchor_every=setup.anchor_every,
            ),
        )
    except HubsyncError as error:
        pipe.send(Failed(type(error).__name__, str(error)))
        return
    pipe.send(engine.position)
    for command, *args in _commands(pipe):
        try:
            match command:
                case "publish":
                    if args[0] is not None:
                        state = args[0]
                        policy.change(setup.seed, state)
                        setup.states.save(state, policy, setup.dtype)
                    pipe.send(engine.publish(state).result().position)
                case "anchor":
                    pipe.send(engine.anchor().position)
                case "serve":
                    pipe.send(engine.serve(args[0]))
                case "close":
                    engine.close()
                    pipe.send(engine.position)
        except HubsyncError as error:
            pipe.send(Failed(type(error).__name__, str(error)))


# --- replicas -----------------------------------------------------------------------------------------


class _Meeting:
    """Where the ranks of a server gather: threads here, processes in vLLM."""

    def __init__(self, size: int):
        self.words: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S / 2)


@dataclass
class _Seat:
    meeting: _Meeting
    rank: int
    size: int

    def gather(self, word: Any) -> list[Any]:
        self.meeting.words[self.rank] = word
        self.meeting.barrier.wait()
        words = list(self.meeting.words)
        self.meeting.barrier.wait()
        return words


class Server:
    """A server without vLLM: the ranks' weights, their sessions, and one thread for each that is its main thread."""

    def __init__(self, setup: Setup, cache: Path, checkpoint: Path, tensors: dict[str, torch.Tensor], ranks: int):
        self.shards = served(tensors, ranks)
        self._reader = ChainReader(open_bucket(setup.address), cache)
        meeting = _Meeting(ranks)
        self._threads = [ThreadPoolExecutor(1) for _ in range(ranks)]
        self.sessions = []
        for rank, shard in enumerate(self.shards):
            host = Host((shard,), torch.device("cpu"), setup.address, cache, checkpoint)
            seat = _Seat(meeting, rank, ranks) if ranks > 1 else None
            self.sessions.append(Session(lambda host=host: host, seat))  # type: ignore[misc]

    def follow(self, served: bool = False) -> None:
        """Bring the server to the newest version, or to the one that is to be served, as a follower beside it would."""
        self._attach()
        position = self._reader.served() if served else self._reader.newest()
        self._all("stage", position)
        self._settle()
        for session in self.sessions:
            status = session.status()
            if position not in (_position(status), _position(status["staged"] or {})):
                raise _recorded(session)
        self._all("commit", position)
        self._settle()

    def undo(self) -> None:
        self._attach()
        self._all("undo")
        self._settle()

    def forward(self) -> None:
        """What comes ahead of every forward pass: poisoned weights are rebuilt, or none is run."""
        self._all("before_forward")

    def report(self) -> Report:
        answers = [session.status() for session in self.sessions]
        return Report(
            states=tuple(answer["state"] for answer in answers),
            positions=tuple(map(_position, answers)),
            memory=tuple(shard.memory() for shard in self.shards),
        )

    def _attach(self) -> None:
        self._all("attach")
        self._settle()
        if "mapped" in self._states():
            self._all("join")
            self._settle()
        for session in self.sessions:
            if session.state == "refused":
                raise _recorded(session)

    def _settle(self) -> None:
        """Wait until the background threads have nothing left to do."""
        deadline = time.monotonic() + PATIENCE_S
        while any(state in _BUSY for state in self._states()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the ranks are {self._states()} for ever")
            time.sleep(0.002)

    def _states(self) -> list[str]:
        return [session.state for session in self.sessions]

    def _all(self, method: str, *args: Any) -> None:
        """One request to all ranks, which meet in it; the first error once all have answered."""
        asked = [
            thread.submit(getattr(session, method), *args)
            for thread, session in zip(self._threads, self.sessions, strict=True)
        ]
        errors = [future.exception() for future in asked]
        for error in errors:
            if error is not None:
                raise error


def _position(status: dict[str, Any]) -> Position | None:
    return None if status.get("version") is None else Position(status["version"], status["digest"])


def _recorded(session: Session) -> HubsyncError:
    """What the background thread could not do."""
    error = session.status()["error"] or {"type": "ReplicaRefused", "message": f"it is {session.state}"}
    return ReplicaRefused(f"{error['type']}: {error['message']}")


def replica(pipe: Connection, setup: Setup, home: Path, ranks: int, from_anchor: bool) -> None:
    """Starts from the base checkpoint, or the newest anchor; answers True, or Failed and ends.

    Commands, answered by a Report or Failed: ("follow",), ("follow served",), ("undo",), ("report",), and
    ("flip", seed), which damages the weights.
    """
    cache = home / "cache"
    try:
        checkpoint = _download_anchor(setup, cache) if from_anchor else setup.base
        tensors = _tensors(setup, checkpoint, cache)
        server = Server(setup, cache, checkpoint, tensors, ranks)
    except HubsyncError as error:
        pipe.send(Failed(type(error).__name__, str(error)))
        return
    pipe.send(True)
    for command, *args in _commands(pipe):
        try:
            match command:
                case "follow" | "follow served":
                    try:
                        server.follow(served=command == "follow served")
                    finally:
                        server.forward()
                case "undo":
                    server.undo()
                case "flip":
                    print(server.shards[0].flip(args[0]), flush=True)
            pipe.send(server.report())
        except HubsyncError as error:
            pipe.send(Failed(type(error).__name__, str(error), server.report()))


def _download_anchor(setup: Setup, cache: Path) -> Path:
    reader = ChainReader(open_bucket(setup.address), cache)
    plan = reader.plan(None)
    assert plan.anchor is not None, "a way from nothing begins with an anchor"
    return reader.fetch(plan.anchor)[0].parent


def _tensors(setup: Setup, checkpoint: Path, cache: Path) -> dict[str, torch.Tensor]:
    if checkpoint == setup.base:
        return load_file(checkpoint / "model.safetensors")
    table = ChainReader(open_bucket(setup.address), cache).run().table
    opened = open_anchor(sorted(checkpoint.glob("*.safetensors")), table)
    return {spec.name: opened[spec.name] for spec in table}


# --- who keeps the run ----------------------------------------------------------------------------------


def keeper(pipe: Connection, setup: Setup, home: Path) -> None:
    """`hubsync compact` and `gc`: ("compact",) and ("collect", versions to keep), answered by a count or Failed."""
    bucket = open_bucket(setup.address)
    for command, *args in _commands(pipe):
        reader = ChainReader(bucket, home / "cache")
        try:
            match command:
                case "compact":
                    base = load_file(setup.base / "model.safetensors") if setup.has_base else None
                    pipe.send(sum(1 for _ in Compactor(bucket, reader, base).run()))
                case "collect":
                    policy = retention.Policy(keep_last=args[0], grace=0.0)
                    pipe.send(len(retention.Collector(bucket, reader, policy).collect()))
        except HubsyncError as error:
            pipe.send(Failed(type(error).__name__, str(error)))


# --- the auditor --------------------------------------------------------------------------------------


def auditor(pipe: Connection, setup: Setup, home: Path) -> None:
    """Rebuilds every version of the current chain from nothing; answers a list of (Position, view as bytes)."""
    reader = ChainReader(open_bucket(setup.address), home / "cache")
    base = load_file(setup.base / "model.safetensors")
    found = []
    for position in dict.fromkeys(manifest.position for manifest in reader.manifests()):
        plan = reader.plan(None, position.version, base_available=setup.has_base)
        view = replay(reader, plan, base if plan.base else None)
        found.append((view.position, [shard.memory() for shard in served(view.tensors, 1)]))
    pipe.send(found)
