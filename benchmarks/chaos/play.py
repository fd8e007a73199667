"""Play many histories, several at a time, each in its own process, forked from this one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from hubsync.apply.applier import Applier
from hubsync.format.digest import digest_view
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position
from hubsync.format.parts import Transition, read_delta, write_delta
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import bits_of
from hubsync.publish.config import VIEW_DTYPES
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view.live import published_tensors, table_of

from .actors import PID_FILE, Report, end_group
from .events import ENDLESS, EVENTS, SIGNED, Event
from .history import Divergence, History
from .model import Policy, served

_LAST_LINES = 12
_fork = multiprocessing.get_context("fork")


@dataclass
class Outcome:
    """The result of one history.

    Attributes:
        divergence: what was wrong with the weights of a replica in service, or None.
        failure: another broken promise, an unexpected error, or a process that hangs; or None.
        log: the last lines of its logs, if it failed.
    """

    seed: int
    divergence: str | None = None
    failure: str | None = None
    occurred: list[str] = field(default_factory=list)
    loud: Counter[str] = field(default_factory=Counter)
    out_of_service: list[str] = field(default_factory=list)
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return self.divergence is None and self.failure is None


@dataclass
class Script:
    """The events of a history: what it promises to show, and others. `on` is its storage, "hub" or "directory"."""

    on: str
    promised: list[Event]
    others: list[Event] = field(default_factory=list)


def _shares(count: int) -> list[Script]:
    """Deal all kinds of events to so many histories, every third one on a directory."""
    scripts = [Script("directory" if number % 3 == 2 else "hub", []) for number in range(count)]
    for event in sorted(EVENTS.values(), key=lambda event: len(event.on)):
        able = [script for script in scripts if script.on in event.on]
        min(able, key=lambda script: len(script.promised)).promised.append(event)
    return scripts


@dataclass(frozen=True)
class Manner:
    """How histories are played.

    Attributes:
        plant: flip a bit of a replica after its last verification.
        endless: each has one fault of the Hub that outlasts all retries; seeds go through the kinds.
        vllm: replicas are real vLLM servers.
        cover: this many histories share all kinds of events, and have no others; 0 for random events.
    """

    plant: bool = False
    endless: bool = False
    vllm: bool = False
    cover: int = 0

    def script(self, seed: int, chance: random.Random) -> Script:
        """The events of a history. The seed chooses the event that it promises; the others are random."""
        if self.cover:
            return _shares(self.cover)[seed % self.cover]
        promised = list((ENDLESS if self.endless else EVENTS).values())
        must = promised[seed % len(promised)]
        on = chance.choice(must.on)
        others = [event for event in EVENTS.values() if on in event.on]
        return Script(on, [must], chance.choices(others, k=self._others(chance)))

    def _others(self, chance: random.Random) -> int:
        if self.endless:
            return 0
        return chance.randint(7, 10) if self.vllm else chance.randint(2, 4)  # it takes long to start a server

    @property
    def deadline_s(self) -> float:
        """Of one history. Without load it takes a small part of this."""
        return 5400.0 if self.vllm else 180.0


def play_all(seeds: Sequence[int], jobs: int, root: Path, manner: Manner) -> Iterator[Outcome]:
    """Play a history for each seed, `jobs` at a time, and yield outcomes as they come.

    Directories of failed histories are kept. Call it in a process that has never started a thread, after `prepare`.
    """
    waiting = list(reversed(seeds))
    running: dict[Connection, _Running] = {}
    gc.collect()
    gc.freeze()  # otherwise the first collection in each child copies all memory that it shares with this process
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                started = _Running.start(waiting.pop(), root, manner)
                running[started.pipe] = started
            ready = wait(list(running), timeout=1.0)
            late = [pipe for pipe, one in running.items() if one.late and pipe not in ready]
            for pipe in [*(pipe for pipe in running if pipe in ready), *late]:
                yield running.pop(pipe).outcome()
    finally:
        gc.unfreeze()
        for one in running.values():
            one.end()


@dataclass
class _Running:
    seed: int
    home: Path
    process: ForkProcess
    pipe: Connection
    began: float
    deadline_s: float

    @classmethod
    def start(cls, seed: int, root: Path, manner: Manner) -> _Running:
        home = root / str(seed)
        ours, theirs = _fork.Pipe()
        process = _fork.Process(target=_play, args=(seed, home, manner, theirs))
        process.start()
        theirs.close()
        return cls(seed, home, process, ours, time.monotonic(), manner.deadline_s)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.began > self.deadline_s

    def outcome(self) -> Outcome:
        outcome = Outcome(self.seed, failure=f"it hangs: not done after {self.deadline_s:g} s")
        if self.pipe.poll():
            try:
                outcome = self.pipe.recv()
            except EOFError:
                outcome = Outcome(self.seed, failure="the process that plays it died")
        self.end()
        outcome.seconds = time.monotonic() - self.began
        if outcome.exact:
            shutil.rmtree(self.home)
        else:
            outcome.log = _last_lines(self.home)
        return outcome

    def end(self) -> None:
        """End the history and all processes that it started: one process group, and one per vLLM server."""
        end_group(self.process.pid or 0)
        for file in self.home.glob(f"*/{PID_FILE}"):
            end_group(int(file.read_text()))
        self.process.join()
        self.pipe.close()


def _play(seed: int, home: Path, manner: Manner, pipe: Connection) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    outcome = Outcome(seed)
    try:
        _play_script(seed, home, manner, outcome)
    except Divergence as error:
        outcome.divergence = str(error)
    except Exception as error:
        outcome.failure = f"{type(error).__name__}: {error}"
        (home / "logs" / "play.log").write_text(traceback.format_exc())
    pipe.send(outcome)


def _play_script(seed: int, home: Path, manner: Manner, outcome: Outcome) -> None:
    chance = random.Random(seed)
    script = manner.script(seed, chance)
    events = [*script.promised, *script.others]
    chance.shuffle(events)
    signed = any(event.kind in SIGNED for event in script.promised)
    history = History(seed, home, script.on, signed=signed, hurried=manner.endless, vllm=manner.vllm)
    outcome.loud, outcome.out_of_service = history.loud, history.out_of_service
    try:
        history.begin()
        for number, event in enumerate(events):
            # A promised event is tried again if it found nothing to strike.
            for attempt in range(4 if event in script.promised else 1):
                # The moment of a kill changes how many decisions an event takes. Later events decide the same anyway.
                history.chance = random.Random(f"{seed}/{number}/{attempt}")
                history.say(f"--- {event.kind}")
                if event.happen(history):
                    history.occurred[event.kind] += 1
                    break
        if manner.plant:
            _plant(history)
        history.finish()
    finally:
        outcome.occurred = sorted(history.occurred)
        history.end()


def _plant(history: History) -> None:
    """Change a weight after the last verification."""
    history.publish()
    replica = history.replicas[0]
    history.follow(replica)
    report: Report = replica.ask("flip", history.seed)
    history.judge(replica.name, report)


def _last_lines(home: Path) -> list[str]:
    lines = []
    for log in [home / "history.log", *sorted((home / "logs").glob("*.log"))]:
        if log.exists():
            lines += [f"{log.name}: {line}" for line in log.read_text(errors="replace").splitlines()[-_LAST_LINES:]]
    return lines


# --- before the first fork ----------------------------------------------------------------------------


def prepare() -> None:
    """Compile every kernel in this one thread, so that forked processes have them."""
    torch.set_num_threads(1)
    for dtype in VIEW_DTYPES.values():
        policy = Policy.small(wide=True)
        old = policy.view(dtype)
        tensors = published_tensors(policy)
        table = table_of(tensors, dtype)
        snapshot = Snapshot(tensors, table)
        start = Position(0, snapshot.digest.hex)
        shard = served(old, 1)[0]
        applier = Applier(shard, table, torch.device("cpu"))
        applier.join([applier.inventory()])
        applier.adopt(start)
        for tensor in policy.parameters():
            bits_of(tensor.detach())[::3] ^= 1
            bits_of(tensor.detach())[1::50] ^= 1 << 9
        detected = snapshot.detect()
        target = Position(1, digest_view(table, policy.view(dtype)).hex)
        view = ViewBits(table, old)
        for encoding in (Encoding.FAST, Encoding.COMPACT):
            part = write_delta(table, detected.patch, Transition("0" * 32, start, target), encoding=encoding, old=view)
            with tempfile.NamedTemporaryFile() as file:
                Path(file.name).write_bytes(part)
                read_delta(Path(file.name), table, None, applier.old_bits())
        applier.stage_patch(dict(detected.patch), target)
        applier.commit(target)
        applier.verify()
