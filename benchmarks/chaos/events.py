"""The kinds of events in a history. Each is a small function in one registry.

A new kind needs only this:

    @event("compacted")
    def compact(history: History) -> bool:
        ...
        return True

It may leave the publisher dead and replicas in any state, but no fault. It returns whether the event took place (a
fault may find nothing to strike), and raises `Broken` if a promise is broken.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubsync.format.documents import SIGNATURE
from hubsync.format.manifest import Head

from . import actors, adapters
from .actors import Actor, Failed, Report
from .history import Broken, Divergence, History
from .model import WAYS

Happening = Callable[[History], bool]


@dataclass(frozen=True)
class Event:
    """One kind of event, and the storages ("hub", "directory") on which it can happen."""

    kind: str
    happen: Happening
    on: tuple[str, ...]


EVENTS: dict[str, Event] = {}
SIGNED = {"head forged"}  # happen in signed runs only


def event(kind: str, on: tuple[str, ...] = ("hub", "directory")) -> Callable[[Happening], Happening]:
    """Register a kind of event."""

    def register(happen: Happening) -> Happening:
        EVENTS[kind] = Event(kind, happen, on)
        return happen

    return register


# --- nothing goes wrong -------------------------------------------------------------------------------


@event("published")
def publish(history: History) -> bool:
    """A version that all replicas follow."""
    history.publish()
    for replica in history.replicas:
        history.follow(replica)
    return True


@event("lagged")
def lag(history: History) -> bool:
    """Several versions that one replica takes in one step, and the others do not take."""
    for _ in range(history.chance.randint(2, 4)):
        history.publish()
    history.follow(_some_replica(history))
    return True


@event("written outside of steps")
def write_outside(history: History) -> bool:
    """One to three versions whose weights no observed optimizer step made."""
    for _ in range(history.chance.randint(1, 3)):
        history.publish(history.chance.choice(WAYS))
        history.follow(_some_replica(history))
    return True


@event("anchored")
def anchor(history: History) -> bool:
    publisher = _publisher(history)
    answer = publisher.ask("anchor")
    history.say(f"anchor: {answer}")
    if isinstance(answer, Failed):
        raise Broken(f"no anchor on a healthy storage: {answer}")
    return True


@event("joined")
def join(history: History) -> bool:
    if len(history.replicas) >= history.setup.room:
        return False
    history.follow(history.join())
    return True


@event("undone")
def undo(history: History) -> bool:
    """A replica undoes its last commit; later it follows again."""
    replica = _some_replica(history)
    history.publish_change()
    history.follow(replica)
    return isinstance(history.ask_replica(replica, "undo"), Report)


@event("rolled back in service")
def serve_an_older_version(history: History) -> bool:
    """Replicas go back to an older version by undoing deltas; the trainer continues where it is."""
    publisher = _publisher(history)
    older = history.publish_change()
    history.publish_change()
    replica = _some_replica(history)
    history.follow(replica)
    if history.publisher is not publisher:
        return False  # it was fenced in the meantime
    answer = publisher.ask("serve", older.version)
    if isinstance(answer, Failed):
        raise Broken(f"a committed version cannot be served: {answer}")
    back = history.ask_replica(replica, "follow served")
    if isinstance(back, Report) and back.in_service and set(back.positions) != {older}:
        raise Broken(f"{replica.name} was to serve {older}, and is {back}")
    return isinstance(back, Report)


@event("compacted")
def compact(history: History) -> bool:
    """Merged deltas, while the publisher continues; lagging replicas take them."""
    for _ in range(history.chance.randint(2, 4)):
        history.publish_change()
    made = _keep(history, "compact")
    history.follow(_some_replica(history))
    if len(history.replicas) < history.setup.room:
        history.follow(history.join())
    return bool(made)


@event("collected")
def collect(history: History) -> bool:
    """Old versions are deleted without a grace period, while replicas may need them."""
    anchor(history)  # the versions before it are not needed by the versions after it
    for _ in range(history.chance.randint(1, 3)):
        history.publish_change()
    if history.chance.random() < 0.5:
        history.follow(_some_replica(history))
    deleted = _keep(history, "collect", history.chance.randint(1, 3))
    for replica in history.replicas:
        history.follow(replica)
    return bool(deleted)


@event("keeper killed")
def kill_keeper(history: History) -> bool:
    """At any point of a compaction or a collection."""
    for _ in range(history.chance.randint(1, 3)):
        history.publish_change()
    keeper = _start_keeper(history)
    keeper.tell(*history.chance.choice([("compact",), ("collect", 1)]))
    _wait_anywhere(history)
    keeper.kill()
    history.publish()
    for replica in history.replicas:
        history.follow(replica)
    return True


# --- processes die and stall --------------------------------------------------------------------------


@event("publisher killed")
def kill_publisher(history: History) -> bool:
    """At any point of a publish. It resumes from the trainer's newest checkpoint, published or not."""
    publisher = _publisher(history)
    publisher.tell("publish", history.next_state())
    _wait_anywhere(history)
    history.kill_publisher()
    _maybe_follow(history)
    history.start_publisher(history.newest_state())
    return True


@event("creator killed")
def kill_while_joining(history: History) -> bool:
    """At any point of joining the run: while it opens its epoch, or uploads an anchor."""
    if history.publisher is not None:
        history.kill_publisher()
    state = history.chance.choice([history.newest_state(), 0])
    doomed = actors.start(f"publisher-doomed-{time.monotonic_ns()}", actors.publisher, history.setup, state)
    _wait_anywhere(history)
    doomed.kill()
    _maybe_follow(history)
    history.start_publisher(history.newest_state())
    return True


@event("trainer rolled back")
def roll_back(history: History) -> bool:
    """The trainer loses published steps, and continues from an older checkpoint."""
    if history.publisher is not None:
        history.kill_publisher()
    states = history.setup.states.numbers()
    history.start_publisher(history.chance.choice(states[:-1] or states))
    _maybe_follow(history)
    history.publish()
    return len(states) > 1


@event("publisher stalled")
def stall_publisher(history: History) -> bool:
    publisher = _publisher(history)
    publisher.tell("publish", history.next_state())
    _wait_anywhere(history)
    publisher.stop()
    for replica in history.replicas:
        history.follow(replica)
    publisher.wake()
    answer = publisher.answer()
    if isinstance(answer, Failed):
        raise Broken(f"a stall on a healthy storage: {answer}")
    return True


@event("late writer")
def wake_up_late(history: History) -> bool:
    """A publisher stalls in a publish, another one takes over, and the first wakes up: it must be fenced."""
    old = _publisher(history)
    old.tell("publish", history.next_state())
    _wait_anywhere(history)
    old.stop()
    history.start_publisher(history.newest_state())
    history.publish()
    _maybe_follow(history)
    old.wake()
    try:
        first = answer = old.answer()  # it may have passed the fence before; the result is a dead branch
        history.say(f"the late writer: {first}")
        while answer == first and not isinstance(answer, Failed):  # steps that change nothing write nothing either
            answer = old.ask("publish", history.next_state())
        if not (isinstance(answer, Failed) and answer.error == "Fenced"):
            raise Broken(f"a replaced writer continued: {answer}")
        history.hear(old.name, answer)
    finally:
        old.kill()
    history.publish()
    history.follow(_some_replica(history))
    return True


@event("replica killed")
def kill_replica(history: History) -> bool:
    """At any point of following. After a restart it finds its downloads, whole or not."""
    replica = _some_replica(history)
    history.publish()
    replica.tell("follow")
    _wait_anywhere(history)
    replica.kill()
    history.follow(history.restart(replica))
    return True


# --- clients of a server die and stall -----------------------------------------------------------------


@event("followed")
def follow_by_itself(history: History) -> bool:
    """`hubsync follow` for a server, without any other client."""
    replica = _followed_replica(history)
    for _ in range(history.chance.randint(1, 3)):
        newest = history.publish_change()
    return isinstance(history.await_follower(replica, newest), Report)


@event("follower killed")
def kill_follower(history: History) -> bool:
    """At any point of staging or committing. The next follower continues."""
    replica = _followed_replica(history)
    history.publish()
    _wait_anywhere(history)
    history.kill_follower(_follower_of(history, replica))
    newest = history.publish_change()
    history.start_follower(replica)
    return isinstance(history.await_follower(replica, newest), Report)


@event("follower stalled")
def stall_follower(history: History) -> bool:
    """At any point. The run and its keeper continue, and it wakes up far behind."""
    replica = _followed_replica(history)
    history.publish()
    _wait_anywhere(history)
    follower = _follower_of(history, replica)
    follower.stop()
    for _ in range(history.chance.randint(1, 4)):
        newest = history.publish_change()
    if history.chance.random() < 0.5:
        _keep(history, *history.chance.choice([("compact",), ("collect", 1)]))
    follower.wake()
    return isinstance(history.await_follower(replica, newest), Report)


@event("push client killed")
def kill_pusher(history: History) -> bool:
    """At any point of staging or committing. The watchdog or the next client ends a window that it left open."""
    replica = _some_replica(history)
    history.publish()
    pusher = history.start_pusher(replica)
    _wait_anywhere(history)
    pusher.kill()
    if history.chance.random() < 0.5:
        history.publish()
    history.follow(replica)
    return True


@event("pushed beside a follower")
def push_beside_follower(history: History) -> bool:
    """Both bring the server to each version, without disturbing each other."""
    replica = _followed_replica(history)
    for _ in range(history.chance.randint(1, 3)):
        newest = history.publish_change()
        answer = history.start_pusher(replica).answer()
        if isinstance(answer, Failed):
            history.hear("the pusher", answer)
    return isinstance(history.await_follower(replica, newest), Report)


@event("server of a follower killed")
def kill_server_of_follower(history: History) -> bool:
    """At any point of following. It restarts from the beginning, and its follower finds it."""
    replica = _followed_replica(history)
    history.publish()
    _wait_anywhere(history)
    replica.kill()
    newest = history.publish_change()
    replica = history.restart(replica)
    return isinstance(history.await_follower(replica, newest), Report)


@event("rolled back beside a follower")
def serve_an_older_version_to_follower(history: History) -> bool:
    """The served version goes back, and forward again with the next version; the follower goes along."""
    publisher = _publisher(history)
    older = history.publish_change()
    newest = history.publish_change()
    replica = _followed_replica(history)
    history.await_follower(replica, newest)
    if history.publisher is not publisher:
        return False  # it was fenced in the meantime
    answer = publisher.ask("serve", older.version)
    if isinstance(answer, Failed):
        raise Broken(f"a committed version cannot be served: {answer}")
    back = history.await_follower(replica, older)
    history.await_follower(replica, history.publish_change())
    return isinstance(back, Report)


@event("hub away from a follower", on=("hub",))
def kill_hub_of_follower(history: History) -> bool:
    """For several polls of a follower in a row."""
    replica = _followed_replica(history)
    history.publish()
    assert history.hub is not None
    history.hub.kill()
    time.sleep(history.chance.uniform(0.2, 2.0))
    history.restart_hub()
    return isinstance(history.await_follower(replica, history.publish_change()), Report)


@event("replica damaged")
def damage_replica(history: History) -> bool:
    """A bit of its weights flips. The digest of the next commit detects it, and no forward pass runs on it."""
    replica = _some_replica(history)
    if isinstance(history.follow(replica), Failed):
        return False
    replica.ask("flip", history.chance.randrange(1 << 30))
    history.publish_change()
    history.follow(replica)
    return True


@event("hub killed", on=("hub",))
def kill_hub(history: History) -> bool:
    """At any point of a publish or of following. It restarts a moment later."""
    publisher, replica = _publisher(history), _some_replica(history)
    history.publish()
    victim = history.chance.choice([publisher, replica])
    victim.tell(*(("publish", history.next_state()) if victim is publisher else ("follow",)))
    _wait_anywhere(history)
    assert history.hub is not None
    history.hub.kill()
    time.sleep(0.1)
    history.restart_hub()
    answer = victim.answer()
    if isinstance(answer, Failed):
        history.hear(victim.name, answer)
    history.publish()
    history.follow(replica)
    return True


# --- full disks ---------------------------------------------------------------------------------------

_ROOM = (0, 100, 2000)  # bytes that a file may have on a full disk


@event("disk of a trainer full")
def fill_disk_of_trainer(history: History) -> bool:
    """Of TMPDIR and caches, and of the bucket if it is a directory. No change is lost, and none is half published."""
    publisher, state = _publisher(history), history.next_state()
    publisher.ask("train", state)
    publisher.fill_disk(history.chance.choice(_ROOM))
    answers = [publisher.ask("publish", None), publisher.ask("anchor")]
    publisher.free_disk()
    failures = [answer for answer in answers if isinstance(answer, Failed)]
    for failure in failures:
        history.hear(publisher.name, failure)
    answer = publisher.ask("publish", None)
    if isinstance(answer, Failed):
        raise Broken(f"the disk has room again, and nothing can be published: {answer}")
    history.judge_claim(answer, state)
    history.follow(_some_replica(history))
    return bool(failures)


@event("disk of a server full")
def fill_disk_of_server(history: History) -> bool:
    """Of its cache and TMPDIR. It keeps its version, and follows once there is room."""
    if history.setup.vllm:
        return False  # the server is another process
    replica = _some_replica(history)
    history.publish_change()
    replica.fill_disk(history.chance.choice(_ROOM))
    answer = history.follow(replica)
    replica.free_disk()
    again = history.follow(replica)
    if isinstance(again, Failed) and again.error != "NoPath":
        raise Broken(f"the disk has room again, and {replica.name} does not follow: {again}")
    return isinstance(answer, Failed)


@event("disk of a follower full")
def fill_disk_of_follower(history: History) -> bool:
    """At any point of following, with that of its server or without. It goes on by itself once there is room."""
    replica = _followed_replica(history)
    full = [_follower_of(history, replica)]
    if history.chance.random() < 0.5 and not history.setup.vllm:
        full.append(replica)
    room = history.chance.choice(_ROOM)
    history.publish()
    _wait_anywhere(history)
    for actor in full:
        actor.fill_disk(room)
    history.publish_change()
    _wait_anywhere(history)
    for actor in full:
        actor.free_disk()
    return isinstance(history.await_follower(replica, history.publish_change()), Report)


@event("adapter merged")
def merge_adapter(history: History) -> bool:
    """A LoRA trainer in a run of its own: its adapter is merged into the base and unmerged, which rounds."""
    name = f"adapter-trainer-{time.monotonic_ns()}"
    trainer = actors.start(name, adapters.merge_and_unmerge, history.setup, history.home / name)
    try:
        found: adapters.Merged = trainer.answer()
    finally:
        trainer.kill()
    history.say(f"{name}: {found}")
    if found.drifted and not (found.error == "ConfigError" and "frozen base model" in found.message):
        raise Divergence(f"{found.drifted} elements of an adapter's base have changed, and the trainer says {found}")
    if found.newest != found.before or not found.exact:
        raise Divergence(f"an adapter's run holds something else than was published: {found}")
    return found.drifted > 0


# --- faults of the Hub --------------------------------------------------------------------------------

_PUBLISHING = ["POST .*/batch", "POST /v1/xorbs/", "POST /v1/shards", "GET .*/xet-write-token", "GET .*/tree"]
_READING = [
    "POST .*/paths-info",
    "HEAD .*/resolve/",
    "GET .*/xet-read-token",
    "GET /v2/reconstructions/",
    "GET /xorbs/",
]
_ANY = _PUBLISHING + _READING
_NAMES = ["GET .*/tree", "POST .*/paths-info", "HEAD .*/resolve/"]

_RETRIED = (408, 429, 500, 502, 503, 504)
_FINAL = (400, 401, 403, 404, 409, 416)

# Faults that no client should report: they end before the retries do.
PASSING = {*(f"hub {status}" for status in _RETRIED), "connection dropped", "answer delayed"}

_FAULTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    **{f"hub {status}": (_ANY, {"status": status}) for status in (*_RETRIED, *_FINAL)},
    "connection dropped": (_ANY, {"drop": True}),
    "answer lost": (_ANY, {"lose_answer": True}),
    "answer delayed": (_ANY, {"delay": 0.4}),
    "bytes corrupted": (["GET /xorbs/"], {"corrupt": True}),
    "bytes truncated": ([*_NAMES[:2], "GET /v2/reconstructions/", "GET /xorbs/"], {"truncate": True}),
    "names late": (_NAMES, {"lag": 0.5}),
}


def _fault(kind: str, routes: list[str], fault: dict[str, Any]) -> Happening:
    def strike(history: History) -> bool:
        times = history.chance.randint(1, 2)
        route = history.chance.choice(routes)
        before = history.loud.copy()
        history.break_hub(match=route, times=times, **fault)
        actions = [_publish_and_follow, _publish_and_await_follower, _resume_and_publish, _join_and_follow]
        history.chance.choice(actions)(history)
        if history.heal_hub() == times:
            history.say(f"{kind} found nothing to strike")
            return False
        errors = history.loud - before
        del errors["NoPath"]  # without an anchor to start from: not caused by the fault
        if kind in PASSING and errors and not history.followers:  # several clients of one server may refuse each other
            raise Broken(f"retries did not outlast {kind}, {times} times: {dict(errors)}")
        return True

    return strike


for _kind, (_routes, _arguments) in _FAULTS.items():
    event(_kind, on=("hub",))(_fault(_kind, _routes, _arguments))


# --- faults of the Hub that do not end, once for each kind ---------------------------------------------

ENDLESS: dict[str, Event] = {}
_FOREVER = 1 << 20
_QUIET = {"answer delayed", "names late"}  # clients wait, and need not report these
_LASTING: dict[str, tuple[list[str], dict[str, Any]]] = {
    **_FAULTS,
    "hub silent": (_ANY, {"silent": True}),
    "storage silent": (["/v1/", "/v2/", "/xorbs/"], {"silent": True}),
}


def _endless(kind: str, routes: list[str], fault: dict[str, Any]) -> Happening:
    def outlast(history: History) -> bool:
        """The fault outlasts all retries: clients report it, keep serving, and recover after it."""
        answer = newest = history.publish_change()
        publisher, replica = _publisher(history), _followed_replica(history)
        before = history.loud.copy()
        history.break_hub(match="|".join(routes), times=_FOREVER, **fault)
        while answer == newest:  # some steps change nothing
            answer = publisher.ask("publish", history.next_state())
        if isinstance(answer, Failed):
            history.hear(publisher.name, answer)
        history.follow(replica)
        if history.heal_hub() == _FOREVER:
            return False
        if history.loud == before and kind not in _QUIET:
            raise Broken(f"{kind} without end, and no client reports it")
        back = history.await_follower(replica, history.publish_change())
        if isinstance(back, Failed):
            raise Broken(f"{kind} has ended, and the follower does not recover: {back}")
        return True

    return outlast


for _kind, (_routes, _arguments) in _LASTING.items():
    ENDLESS[_kind] = Event(f"{_kind} without end", _endless(_kind, _routes, _arguments), ("hub",))


# --- faults of a directory ----------------------------------------------------------------------------


@event("file corrupted", on=("directory",))
def corrupt_file(history: History) -> bool:
    """A bit of a delta flips on the disk, and is corrected later."""
    return _with_damaged_delta(history, lambda good: bytes([*good[:-1], good[-1] ^ 1]))


@event("file truncated", on=("directory",))
def truncate_file(history: History) -> bool:
    return _with_damaged_delta(history, lambda good: good[: len(good) // 2])


@event("head stale", on=("directory",))
def go_back_in_the_head(history: History) -> bool:
    """A file system returns an old head, or a replaced writer wakes up and writes one."""
    head = Path(history.setup.address, "head.json")
    if not head.exists():
        return False
    old = head.read_bytes()
    history.publish()
    _replace(head, old)
    for replica in history.replicas:
        history.follow(replica)
    if len(history.replicas) < history.setup.room:
        history.follow(history.join())
    history.publish()
    return True


@event("head forged", on=("directory",))
def forge_head(history: History) -> bool:
    """A head written without the key serves an old version: replicas with the public key must not follow it."""
    head = Path(history.setup.address, "head.json")
    if not (history.setup.signed and head.exists()):
        return False
    newest = history.publish_change()
    signed = head.read_bytes()
    forged = json.loads(replace(Head.loads(signed), serve=0).dumps())
    if history.chance.random() < 0.5:
        forged[SIGNATURE] = json.loads(signed)[SIGNATURE]
    _replace(head, json.dumps(forged).encode())
    for replica in history.replicas:
        answer = history.ask_replica(replica, "follow served")
        if isinstance(answer, Report) and answer.in_service and set(answer.positions) != {newest}:
            raise Broken(f"{replica.name} accepted a forged head, and is {answer}")
    history.publish()
    return True


# --- helpers of events --------------------------------------------------------------------------------


def _publisher(history: History) -> Actor:
    return history.publisher or history.start_publisher(history.newest_state())


def _some_replica(history: History) -> Actor:
    return history.chance.choice(history.replicas)


def _start_keeper(history: History) -> Actor:
    name = f"keeper-{time.monotonic_ns()}"
    return actors.start(name, actors.keeper, history.setup, history.home / name)


def _keep(history: History, *command: Any) -> int:
    """The number of deltas merged or objects deleted, on a healthy storage."""
    keeper = _start_keeper(history)
    try:
        answer = keeper.ask(*command)
    finally:
        keeper.kill()
    history.say(f"{command}: {answer}")
    if isinstance(answer, Failed):
        raise Broken(f"{command[0]} on a healthy storage: {answer}")
    return int(answer)


def _wait_anywhere(history: History) -> None:
    """Wait a random time, at most as long as a publish takes."""
    time.sleep(history.chance.uniform(0.0, 0.6 if history.hub is not None else 0.06))


def _maybe_follow(history: History) -> None:
    if history.chance.random() < 0.5:
        history.follow(_some_replica(history))


def _publish_and_follow(history: History) -> None:
    history.publish()
    history.follow(_some_replica(history))


def _publish_and_await_follower(history: History) -> None:
    history.await_follower(_followed_replica(history), history.publish_change())


def _followed_replica(history: History) -> Actor:
    """The replica that has a follower; there is at most one."""
    for follower in history.followers:
        return next(replica for replica in history.replicas if replica.name == follower.details["beside"])
    replica = _some_replica(history)
    history.start_follower(replica)
    return replica


def _follower_of(history: History, replica: Actor) -> Actor:
    return next(follower for follower in history.followers if follower.details["beside"] == replica.name)


def _resume_and_publish(history: History) -> None:
    if history.publisher is not None:
        history.kill_publisher()
    history.start_publisher(history.newest_state())
    history.publish()
    _maybe_follow(history)


def _join_and_follow(history: History) -> None:
    if len(history.replicas) < history.setup.room:
        history.follow(history.join())
        return
    replica = _some_replica(history)
    replica.kill()
    history.follow(history.restart(replica))
    history.publish()


def _with_damaged_delta(history: History, damage: Callable[[bytes], bytes]) -> bool:
    before = set(_deltas(history))
    history.publish()
    new = sorted(set(_deltas(history)) - before)
    if not new:
        return False
    good = new[-1].read_bytes()
    _replace(new[-1], damage(good))
    answers = [history.follow(replica) for replica in history.replicas]
    _replace(new[-1], good)
    return any(isinstance(answer, Failed) for answer in answers)


def _deltas(history: History) -> list[Path]:
    return list(Path(history.setup.address).rglob("deltas/*.safetensors"))


def _replace(path: Path, data: bytes) -> None:
    staged = path.with_name("." + path.name)
    staged.write_bytes(data)
    os.replace(staged, path)
