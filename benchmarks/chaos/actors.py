"""The processes of a history: a Hub, publishers, replicas, an auditor. Each obeys one pipe, and may be killed anywhere.

They are forked from a process that has imported everything, compiled all kernels and never started a thread, so they
start in milliseconds.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.apply.engine import ModelHost, RunSource
from hubsync.apply.served_model import ServedModel
from hubsync.apply.session import Session
from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, Compactor, retention
from hubsync.chain.replay import replay
from hubsync.cli.main import main
from hubsync.errors import HubsyncError
from hubsync.format.keys import PublicKey, SigningKey
from hubsync.format.manifest import Position
from hubsync.format.parts import open_anchor
from hubsync.kernels.bits import bits_of
from hubsync.localhub import LocalHub
from hubsync.publish.config import VIEW_DTYPES, DeltaEncoding, ViewDtype
from hubsync.replicas.deployment import Deployment
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer

from .model import Policy, States, Tensors, fingerprint, served
from .serving import Engine, listen

PID_FILE = "server.pid"  # in a replica's directory: the process group of its vLLM server


_fork = multiprocessing.get_context("fork")
loggers: list[int] = []  # of the actors of this process


@dataclass(frozen=True)
class Setup:
    """Settings of a history, known to all of its processes.

    Attributes:
        seed: of the history.
        home: its directory.
        address: of the run.
        hub_url: of its Hub; None if the run is in a directory.
        view_dtype, encoding, anchor_every, has_base: of the publisher's config. With a base, servers start from a
            checkpoint that the run names; otherwise version 0 is an anchor.
        wide: whether the policy has a tensor of several chunks.
        sliced: whether an optimizer changes the weights, and the publisher detects changes in its steps.
        signed: whether the publisher signs the run, and replicas require signatures.
        windows: whether servers must be paused for a commit, as servers that share experts must.
        hurried: whether sleeps are cut short, so that clients give up in a second instead of half a minute.
        vllm: whether servers are real ones.
    """

    seed: int
    home: Path
    address: str
    hub_url: str | None
    view_dtype: ViewDtype
    encoding: DeltaEncoding
    anchor_every: int
    has_base: bool
    wide: bool
    sliced: bool
    signed: bool
    windows: bool
    hurried: bool = False
    vllm: bool = False

    @property
    def patience_s(self) -> float:
        """How long to wait for an answer. A loaded machine needs a few seconds for what takes a fraction of one."""
        return 900.0 if self.vllm else 60.0

    @property
    def room(self) -> int:
        """The most replicas at a time, besides one that joins at the end."""
        return 1 if self.vllm else 3

    def policy(self) -> Policy:
        return Policy.of_checkpoint(self.base) if self.vllm else Policy.small(self.wide)

    def memory(self, view: Tensors, ranks: int) -> list[dict[str, bytes]]:
        """The memory that each rank must report if it serves this view."""
        if self.vllm:
            return [{name: fingerprint(bits_of(tensor)) for name, tensor in view.items()}]
        return [shard.memory() for shard in served(view, ranks)]

    @property
    def base(self) -> Path:
        return self.home / "base"

    @property
    def states(self) -> States:
        return States(self.home / "states")

    @property
    def dtype(self) -> torch.dtype:
        return VIEW_DTYPES[self.view_dtype]

    @property
    def key_file(self) -> Path:
        return self.home / "key"

    @property
    def key(self) -> SigningKey | None:
        return SigningKey.load(str(self.key_file)) if self.signed else None

    @property
    def public_key(self) -> PublicKey | None:
        key = self.key
        return None if key is None else key.public

    def reader(self, cache: Path) -> ChainReader:
        return ChainReader(open_bucket(self.address, key=self.public_key), cache)


@dataclass(frozen=True)
class Report:
    """The weights that a replica serves.

    Attributes:
        states: of its ranks; see `hubsync.apply.session.Session.state`.
        positions: of the live weights, as each rank reports; None if it does not know.
        memory: per rank, every byte of every parameter.
        mixed: set if a forward pass met weights of several versions.
    """

    states: tuple[str, ...]
    positions: tuple[Position | None, ...]
    memory: tuple[dict[str, bytes], ...]
    mixed: str | None = None

    @property
    def in_service(self) -> bool:
        """Whether it claims to serve a version. It does not if any rank is poisoned, refused or unattached."""
        return None not in self.positions and set(self.states) <= {"ready", "staged", "staging"}

    def __str__(self) -> str:
        return f"{'/'.join(self.states)} at {'/'.join(map(str, self.positions))}"


@dataclass(frozen=True)
class Failed:
    """An actor's answer if a command failed: a HubsyncError, and of a replica also its report."""

    error: str
    message: str
    report: Report | None = None

    def __str__(self) -> str:
        return f"{self.error}: {self.message}"


class Hung(Exception):
    """An actor did not answer."""


class Died(Exception):
    """An actor ended without a command."""


@dataclass
class Actor:
    """A running process."""

    name: str
    process: ForkProcess
    pipe: Connection
    home: Path
    patience_s: float
    details: dict[str, Any] = field(default_factory=dict)

    def tell(self, *command: Any) -> None:
        try:
            self.pipe.send(command)
        except OSError:
            raise Died(f"{self.name} has ended by itself") from None

    def answer(self) -> Any:
        """The next answer. Raises Hung, with the actor's stacks in its log, or Died."""
        if not self.pipe.poll(self.patience_s):
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
            raise Hung(f"{self.name} did not answer within {self.patience_s:g} s")
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise Died(f"{self.name} has ended by itself with exit code {self.process.exitcode}") from None

    def ask(self, *command: Any) -> Any:
        self.tell(*command)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL: nothing is flushed or closed."""
        self.process.kill()
        if (self.home / PID_FILE).exists():
            end_group(int((self.home / PID_FILE).read_text()))
        self.process.join()
        self.pipe.close()

    def fill_disk(self, room: int) -> None:
        """No file of this process can grow beyond `room` bytes, as on a disk that is full: writes end early, or fail.

        The kernel says "file too large" instead of "no space left". Logs are written by another process.
        """
        self._limit_files(room)

    def free_disk(self) -> None:
        self._limit_files(resource.RLIM_INFINITY)

    def _limit_files(self, size: int) -> None:
        assert self.process.pid is not None
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def stop(self) -> None:
        """SIGSTOP: all threads stop wherever they are."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)


def start(name: str, target: Callable[..., None], setup: Setup, *args: Any) -> Actor:
    """Fork an actor. Call it in a process that never started a thread."""
    ours, theirs = _fork.Pipe()
    log = _logger(setup.home / "logs" / f"{name}.log")
    process = _fork.Process(target=_run, args=(name, target, setup, log, theirs, *args), name=name)
    process.start()
    theirs.close()
    os.close(log)
    return Actor(name, process, ours, setup.home / name, setup.patience_s)


def _logger(path: Path) -> int:
    """A pipe to a process that appends to a log, and ends with the last writer: the writing end."""
    reading, writing = os.pipe()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    into = [(os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_OPEN, 1, str(path), flags, 0o644)]
    loggers.append(os.posix_spawnp("cat", ["cat"], os.environ, file_actions=into))
    os.close(reading)
    os.set_inheritable(writing, False)
    return writing


def reap_loggers() -> None:
    """Forget the processes that write the logs, of actors that have ended."""
    loggers[:] = [number for number in loggers if os.waitpid(number, os.WNOHANG) == (0, 0)]


def end_group(number: int) -> None:
    """SIGKILL for a process group, unless it has ended."""
    try:
        os.killpg(number, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _run(name: str, target: Callable[..., None], setup: Setup, log: int, pipe: Connection, *args: Any) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    # Each actor stands for a machine, so no cache is shared. hf_xet reads this at its first use.
    os.environ["HF_XET_CACHE"] = str(setup.home / name / "xet")
    if setup.hub_url is not None:
        os.environ["HF_ENDPOINT"] = setup.hub_url
    # After a fork torch recreates its thread pool at the first request; two threads that request it at once fail.
    torch.set_num_threads(1)
    if setup.hurried:
        _hurry()
    try:
        target(pipe, setup, *args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _hurry() -> None:
    """Shorten sleeps, and the deadlines and patience of bucket calls."""
    from hubsync.bucket import hub as hub_bucket
    from hubsync.bucket import hub_api, xet  # here: huggingface_hub reads the environment at import

    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(float(seconds), 0.02))
    hub_api.SILENCE_SECONDS, hub_api.PATIENCE_SECONDS, hub_bucket.OPEN_SECONDS = 3.0, 2.0, 2.0
    hub_bucket.LAG_SECONDS, hub_bucket._RESEND_SECONDS, hub_bucket._MISSING_SECONDS = 3.0, 1.5, 1.5
    xet.STALL_SECONDS = 4.0


def _commands(pipe: Connection) -> Iterator[tuple[Any, ...]]:
    """Commands from the pipe, until the other end is closed."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


# --- the Hub ------------------------------------------------------------------------------------------


def hub(pipe: Connection, setup: Setup, port: int) -> None:
    """Serve, and answer True once ready. Commands: ("fail", arguments), ("left",), ("heal",).

    A fault that is a "lag" delays what readers see of all later writes.
    """
    with LocalHub(setup.home / "hub", port) as server:
        pipe.send(True)
        for command, *args in _commands(pipe):
            match command:
                case "fail":
                    if "lag" in args[0]:
                        server.lag(args[0]["lag"])
                    else:
                        server.fail(**args[0])
                    pipe.send(True)
                case "left":
                    pipe.send(server.faults_left())
                case "heal":
                    server.reset()
                    pipe.send(True)


# --- the publisher ------------------------------------------------------------------------------------


def publisher(pipe: Connection, setup: Setup, state: int) -> None:
    """Resume training at a state and join the run; answer the run's Position, or Failed and end.

    Commands, each answered by a Position or Failed: ("publish", None) publishes the current weights; ("publish",
    number, way) first changes them to a new state, see `Policy.change`; ("anchor",); ("serve", version); ("close",).
    ("train", number) only changes them, and is answered by True.
    """
    policy = setup.policy()
    setup.states.load(state, policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0) if setup.sliced else None
    try:
        engine = DeltaWeightTransferEngine(
            policy,
            optimizer,
            SyncConfig(
                bucket=setup.address,
                view_dtype=setup.view_dtype,
                encoding=setup.encoding,
                base_model=str(setup.base) if setup.has_base else None,
                anchor_every=setup.anchor_every,
                signing_key=str(setup.key_file) if setup.signed else None,
            ),
        )
    except HubsyncError as error:
        pipe.send(Failed(type(error).__name__, str(error)))
        return
    pipe.send(engine.position)
    for command, *args in _commands(pipe):
        try:
            match command:
                case "train" | "publish":
                    if args[0] is not None:
                        state = args[0]
                        policy.change(setup.seed, state, optimizer, *args[1:])
                        setup.states.save(state, policy, setup.dtype)
                    pipe.send(command == "train" or engine.publish(state).result().position)
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
    """Gathers messages of all ranks of a server: threads here, processes in vLLM."""

    def __init__(self, size: int):
        self.words: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30.0)


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


def replica(pipe: Connection, setup: Setup, home: Path, port: int, ranks: int, from_anchor: bool) -> None:
    """Serve the base checkpoint or the newest anchor; answer the port, or Failed and end.

    Commands, answered by a Report or Failed: ("report",), ("flip", seed), which damages the weights, and those of
    `_command`, carried out by a client in the server's process.
    """
    cache = home / "cache"
    try:
        checkpoint = download_anchor(setup, cache) if from_anchor else setup.base
        shards = served(_tensors(setup, checkpoint, cache), ranks)
    except HubsyncError as error:
        pipe.send(Failed(type(error).__name__, str(error)))
        return
    meeting, sessions = _Meeting(ranks), []
    for rank, shard in enumerate(shards):
        source = RunSource(setup.address, cache, setup.public_key)
        host = ModelHost(source, (shard,), torch.device("cpu"), checkpoint)
        seat = _Seat(meeting, rank, ranks) if ranks > 1 else None
        sessions.append(Session(ServedModel(lambda host=host: host, seat)))  # type: ignore[misc]
    engine = Engine(sessions, alone=not setup.windows)
    port = _listen(engine, port)
    threading.Thread(target=engine.run, name="engine", daemon=True).start()

    def report() -> Report:
        answers = engine.statuses()
        return Report(
            states=tuple(answer["state"] for answer in answers),
            positions=tuple(map(_position, answers)),
            memory=tuple(shard.memory() for shard in shards),
            mixed=engine.mixed,
        )

    pipe.send(port)
    obey(
        pipe,
        Replica(VLLMServer(f"http://127.0.0.1:{port}")),
        setup,
        cache,
        report=lambda: engine.between(report),
        flip=lambda seed: engine.between(lambda: shards[0].flip(seed)),
    )


def obey(
    pipe: Connection,
    client: Replica,
    setup: Setup,
    cache: Path,
    *,
    report: Callable[[], Report],
    flip: Callable[[int], str],
    behave: Callable[[], Any] = lambda: None,
) -> None:
    """Carry out the commands of a server's pipe; ("behave",) too, if there is more to compare than memory."""
    reader = setup.reader(cache)
    for command, *args in _commands(pipe):
        try:
            if command == "flip":
                print(flip(args[0]), flush=True)
            else:
                _command(client, reader, command, setup.patience_s / 2)
            pipe.send(behave() if command == "behave" else report())
        except HubsyncError as error:
            pipe.send(Failed(type(error).__name__, str(error), report()))


def _command(client: Replica, reader: ChainReader, command: str, patience_s: float) -> None:
    """("follow",) brings the server to the newest version, ("follow served",) to the served one; ("undo",)."""
    match command:
        case "follow" | "follow served":
            target = reader.served() if command == "follow served" else reader.newest()
            client.prepare(target, patience_s)
            client.commit(target)
            client.wait_verified(target, patience_s)
        case "undo":
            client.attach(patience_s)
            client.server.rpc("hubsync_undo")


def _listen(engine: Engine, port: int) -> int:
    """Listen on `port`, which a server that was just killed may still hold for a moment."""
    for _ in range(50):
        try:
            listen(engine, port)
        except OSError:
            time.sleep(0.05)
            continue
        return port
    raise RuntimeError(f"port {port} is taken")


def _position(status: dict[str, Any]) -> Position | None:
    return None if status.get("version") is None else Position(status["version"], status["digest"])


def download_anchor(setup: Setup, cache: Path) -> Path:
    reader = setup.reader(cache)
    plan = reader.plan(None)
    assert plan.anchor is not None, "a path without a base begins with an anchor"
    return reader.fetch(plan.anchor)[0].parent


def _tensors(setup: Setup, checkpoint: Path, cache: Path) -> dict[str, torch.Tensor]:
    if checkpoint == setup.base:
        return load_file(checkpoint / "model.safetensors")
    table = setup.reader(cache).run().table
    opened = open_anchor(sorted(checkpoint.glob("*.safetensors")), table)
    return {spec.name: opened[spec.name] for spec in table}


# --- clients of a server --------------------------------------------------------------------------------


def follower(pipe: Connection, setup: Setup, cache: Path, url: str) -> None:
    """`hubsync follow`, as it runs next to a server. Its output is in its log."""
    options = ["--bucket", setup.address, "--server", url, "--cache", str(cache), "--interval", "0.1", "--json"]
    if setup.public_key is not None:
        options += ["--public-key", setup.public_key.hex]
    code = main(["follow", *options])
    print(json.dumps({"event": "ended", "code": code}), flush=True)
    os._exit(code)


def pusher(pipe: Connection, setup: Setup, cache: Path, url: str) -> None:
    """Push the newest version to a server once, as a trainer does; answer True, or Failed."""
    deployment = Deployment([url])
    try:
        deployment.hotload(setup.reader(cache).newest(), timeout=setup.patience_s / 2).raise_for_quorum()
        pipe.send(True)
    except HubsyncError as error:
        pipe.send(Failed(type(error).__name__, str(error)))
    deployment.close()


# --- retention and compaction ----------------------------------------------------------------------------------


def keeper(pipe: Connection, setup: Setup, home: Path) -> None:
    """`hubsync compact` and `gc`: ("compact",) and ("collect", versions to keep), answered by a count or Failed."""
    bucket = open_bucket(setup.address, key=setup.key)
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
    """Rebuild every version of the current chain from nothing; answer a list of (Position, view as bytes)."""
    reader = setup.reader(home / "cache")
    base = load_file(setup.base / "model.safetensors")
    found = []
    for position in dict.fromkeys(manifest.position for manifest in reader.manifests()):
        plan = reader.plan(None, position.version, base_available=setup.has_base)
        view = replay(reader, plan, base if plan.base else None)
        found.append((view.position, setup.memory(view.tensors, 1)))
    pipe.send(found)
