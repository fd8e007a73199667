"""One history: its processes, actions on them, and the judge of their weights.

The process that holds a `History` never starts a thread, because it forks all others.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hubsync.format.digest import digest_view
from hubsync.format.keys import SigningKey
from hubsync.format.manifest import Position
from hubsync.publish.view.live import table_of

from . import actors, live
from .actors import Actor, Failed, Report, Setup
from .model import Tensors

_CAN_SIGN = importlib.util.find_spec("cryptography") is not None
_TRIES = 5  # faults repeat at most twice, so one of these tries must succeed
_LASTING = 4  # errors of a follower in a row that count as lasting, with a healthy Hub
_PORTS = range(15_000, 32_000)  # below the ephemeral range: a restarted server finds its port free
_OWN_PORTS = 50  # per history, so that concurrent histories do not collide


class Divergence(Exception):
    """A replica that claims to be in service has other bits than the publisher published. This must never happen."""


class Broken(Exception):
    """Another broken promise."""


class History:
    """The processes of one history, and a record of events.

    Attributes:
        chance: source of every decision of the script, so that the script depends on the seed alone.
        hub, publisher, replicas: running processes; None while there is none.
        followers: of replicas; `details["beside"]` is the name of the replica.
        occurred: how often each kind of event took place.
        loud: number of reported errors, by class.
        out_of_service: why replicas ended without serving the newest version, as they reported.
    """

    def __init__(
        self, seed: int, home: Path, on: str, *, signed: bool = False, hurried: bool = False, vllm: bool = False
    ):
        self.seed = seed
        self._signed, self._hurried, self._vllm = signed, hurried, vllm
        self.home = home
        self.chance = random.Random(seed)
        self._ports = [_PORTS[(seed * _OWN_PORTS + number) % len(_PORTS)] for number in range(_OWN_PORTS)]
        self.port = self.chance.choice(self._ports)
        self.hub: Actor | None = None
        self.publisher: Actor | None = None
        self.replicas: list[Actor] = []
        self.followers: list[Actor] = []
        self._references: list[Actor] = []
        self.occurred: Counter[str] = Counter()
        self.loud: Counter[str] = Counter()
        self.out_of_service: list[str] = []
        self._began = time.monotonic()
        self._states = 0
        self._digests: dict[str, int] = {}
        self._digested: set[int] = set()
        for directory in ("logs", "states", "base"):
            (home / directory).mkdir(parents=True)
        self._log = (home / "history.log").open("w", buffering=1)
        self.setup = self._draw_setup(on)

    def _draw_setup(self, on: str) -> Setup:
        address = "hf://buckets/me/chaos/run" if on == "hub" else str(self.home / "bucket")
        setup = Setup(
            seed=self.seed,
            home=self.home,
            address=address,
            hub_url=None,
            view_dtype=self.chance.choice(["bfloat16", "bfloat16", "float16", "float32"]),
            encoding=self.chance.choice(["fast", "fast", "compact"]),
            anchor_every=self.chance.choice([0, 0, 2, 3]),
            has_base=self.chance.random() < 0.6,
            wide=self.chance.random() < 0.2,
            sliced=self.chance.random() < 0.3,
            signed=(self.chance.random() < 0.3 or self._signed) and _CAN_SIGN,
            windows=self.chance.random() < 0.3,
            hurried=self._hurried,
        )
        if self._vllm:
            setup = replace(setup, vllm=True, view_dtype="bfloat16", has_base=True, wide=False, windows=False)
        if setup.signed:
            SigningKey.generate().save(setup.key_file)
        return setup if on == "directory" else self._with_hub(setup)

    def _with_hub(self, setup: Setup) -> Setup:
        for port in [self.port, *self._ports]:
            hub = actors.start("hub", actors.hub, setup, port)
            try:
                hub.answer()
            except actors.Died:  # another process has this port
                (self.home / "logs" / "hub.log").unlink()
                continue
            self.hub, self.port = hub, port
            return replace(setup, hub_url=f"http://127.0.0.1:{port}")
        raise Broken("no port is free")

    # --- beginning and end --------------------------------------------------------------------------

    def begin(self) -> None:
        """State 0, a publisher with one published version, and one to three replicas that follow."""
        if self.setup.vllm:
            actors.start("base", live.base, self.setup).answer()
        policy = self.setup.policy()
        self.setup.states.save(0, policy, self.setup.dtype)
        if not self.setup.vllm:
            save_file(policy.view(self.setup.dtype), self.setup.base / "model.safetensors")
        self.say(f"seed {self.seed}: {self.setup}")
        self.start_publisher(0)
        self.publish()
        for _ in range(min(self.chance.choice([1, 1, 2, 3]), self.setup.room)):
            self.follow(self.join())

    def finish(self) -> None:
        """Without faults, all replicas and one that joins now must have the publisher's weights, or refuse."""
        self.heal_hub()
        final = self.publish_change()
        followed = {follower.details["beside"] for follower in self.followers}
        present = [*self.replicas, *([] if self.setup.vllm else [self.join("joiner")])]
        for replica in present:
            answer = self.await_follower(replica, final) if replica.name in followed else self.follow(replica)
            for _ in range(2):
                if isinstance(answer, Failed):
                    answer = self.follow(replica)
            self._judge_end(replica, answer, final)
        self._audit(final)
        if self.setup.vllm:
            self._compare_with_fresh_server(present, final)
        self._find_tracebacks()

    def _judge_end(self, replica: Actor, answer: Report | Failed, final: Position) -> None:
        if isinstance(answer, Failed):
            self.out_of_service.append(f"{replica.name}: {answer}")
        elif not answer.in_service:
            self.out_of_service.append(f"{replica.name} is {answer}")
        elif set(answer.positions) != {final}:
            raise Divergence(f"{replica.name} is {answer} without complaint, but {final} is the newest")

    def _compare_with_fresh_server(self, replicas: list[Actor], final: Position) -> None:
        """A fresh server of a checkpoint with the final weights has the same memory and outputs."""
        state = self._state_of(final)
        assert state is not None, "judged earlier"
        checkpoint = self.home / "final"
        shutil.copytree(self.setup.base, checkpoint)
        save_file(self.setup.states.view(state), checkpoint / "model.safetensors", {"format": "pt"})
        behaviours = {}
        for replica in replicas:
            report = replica.ask("report")
            if report.in_service and set(report.positions) == {final}:
                behaviours[replica.name] = replica.ask("behave")
            replica.kill()
        name = "reference"
        reference = actors.start(
            name, live.replica, self.setup, self.home / name, _free_port(self._ports), 1, False, checkpoint
        )
        self._references.append(reference)
        reference.answer()
        right = reference.ask("behave")
        for who, behaviour in behaviours.items():
            for what, expected in right.items():
                if behaviour[what] != expected:
                    raise Divergence(f"the {what} of {who} at {final} differ from those of a server of that checkpoint")
        self.say(f"{', '.join(behaviours)}: as a server of the checkpoint of state {state}")

    def _audit(self, final: Position) -> None:
        """Every version of the chain can be rebuilt from nothing, and is a state of the publisher."""
        found = actors.start("auditor", actors.auditor, self.setup, self.home / "auditor").answer()
        for position, memory in found:
            self._judge_bits("the chain", position, memory)
        if found[-1][0] != final:
            raise Broken(f"the chain ends at {found[-1][0]}, but {final} was published")

    def _find_tracebacks(self) -> None:
        """An unexpected error is a bug, even if it did no harm."""
        for log in sorted((self.home / "logs").iterdir()):
            if "Traceback" in log.read_text(errors="replace"):
                raise Broken(f"an unexpected error in {log.name}")

    def end(self) -> None:
        """Kill all processes."""
        for actor in [self.publisher, *self.followers, *self.replicas, *self._references, self.hub]:
            if actor is not None:
                actor.kill()
        actors.reap_loggers()

    # --- the publisher ------------------------------------------------------------------------------

    def start_publisher(self, state: int) -> Actor:
        """Start a publisher that resumes at a state. It fences the previous one, which keeps running."""
        for _ in range(_TRIES):
            publisher = actors.start(f"publisher-{time.monotonic_ns()}", actors.publisher, self.setup, state)
            answer = publisher.answer()
            if not isinstance(answer, Failed):
                self.say(f"{publisher.name} resumed at state {state}: {answer}")
                self.judge_claim(answer, state)
                self.publisher = publisher
                return publisher
            self.hear(publisher.name, answer)
        raise Broken(f"no publisher can be started: {answer}")

    def kill_publisher(self) -> None:
        assert self.publisher is not None
        self.publisher.kill()
        self.publisher = None

    def newest_state(self) -> int:
        """The state in the trainer's newest checkpoint, which is saved before it is published."""
        return self.setup.states.numbers()[-1]

    def next_state(self) -> int:
        """The number of the next trained state."""
        self._states += 1
        return self._states

    def publish(self, way: str = "step") -> Position:
        """Change the weights in a way of `Policy.change`, and publish, with retries until it is durable."""
        publisher = self.publisher or self.start_publisher(self.newest_state())
        state = self.next_state()
        answer = publisher.ask("publish", state, way)
        for _ in range(_TRIES):
            if not isinstance(answer, Failed):
                self.say(f"published state {state}: {answer}")
                self.judge_claim(answer, state)
                return answer
            self.hear(publisher.name, answer)
            if answer.error == "Fenced":
                self.kill_publisher()
                publisher = self.start_publisher(state)
            answer = publisher.ask("publish", None)
        raise Broken(f"state {state} cannot be published: {answer}")

    def publish_change(self) -> Position:
        """Publish until there is a new version, because some steps change nothing."""
        before = position = self.publish()
        while position == before:
            position = self.publish()
        return position

    # --- replicas -----------------------------------------------------------------------------------

    def join(self, name: str | None = None) -> Actor:
        """Start another server, from the base checkpoint or the newest anchor."""
        name = name or f"replica-{len(self.replicas)}"
        # Ranks that hold parts of small tensors refuse compact deltas, so with those a server has one rank.
        ranks = self.chance.choice([1, 2]) if self.setup.encoding == "fast" and not self.setup.vllm else 1
        replica = self._start_replica(name, ranks, _free_port(self._ports))
        if name != "joiner":
            self.replicas.append(replica)
        return replica

    def restart(self, replica: Actor) -> Actor:
        """Restart a server that was killed. Its downloads are still there."""
        again = self._start_replica(replica.name, replica.details["ranks"], replica.details["port"])
        self.replicas[self.replicas.index(replica)] = again
        return again

    def _start_replica(self, name: str, ranks: int, port: int) -> Actor:
        from_anchor = not self.setup.has_base or self.chance.random() < 0.4
        for _ in range(_TRIES):
            kind = live.replica if self.setup.vllm else actors.replica
            replica = actors.start(name, kind, self.setup, self.home / name, port, ranks, from_anchor)
            answer = replica.answer()
            if not isinstance(answer, Failed):
                self.say(f"{name} started from {'an anchor' if from_anchor else 'the base'} with {ranks} ranks")
                replica.details |= {"ranks": ranks, "port": answer}
                return replica
            self.hear(name, answer)
            if answer.error == "NoPath" and self.setup.has_base:
                from_anchor = False
        raise Broken(f"{name} cannot be started: {answer}")

    def follow(self, replica: Actor) -> Report | Failed:
        """Bring a replica to the newest version that it finds, and judge its weights."""
        return self.ask_replica(replica, "follow")

    def ask_replica(self, replica: Actor, *command: Any) -> Report | Failed:
        answer: Report | Failed = replica.ask(*command)
        report = answer.report if isinstance(answer, Failed) else answer
        if isinstance(answer, Failed):
            self.hear(replica.name, answer)
        if report is not None:
            self.say(f"{replica.name} is {report} after {command}")
            self.judge(replica.name, report)
        return answer

    # --- clients of replicas ------------------------------------------------------------------------

    def start_follower(self, replica: Actor) -> Actor:
        """Start `hubsync follow` for a replica; it runs until it is killed."""
        follower = self._start_client("follower", actors.follower, replica)
        follower.details["beside"] = replica.name
        self.followers.append(follower)
        return follower

    def kill_follower(self, follower: Actor) -> None:
        follower.kill()
        self.followers.remove(follower)
        self.say(f"{follower.name} was killed")

    def start_pusher(self, replica: Actor) -> Actor:
        """Start a client that pushes the newest version to a replica, and answers once."""
        return self._start_client("pusher", actors.pusher, replica)

    def await_follower(self, replica: Actor, position: Position) -> Report | Failed:
        """Wait until followers alone have brought a replica to `position`, the version to be served.

        Returns:
            the replica's report; Failed if a follower keeps reporting errors, or ended with one.

        Raises:
            Divergence: the replica stays elsewhere, and no follower reports why.
        """
        beside = [follower for follower in self.followers if follower.details["beside"] == replica.name]
        told = {follower.name: len(self._errors_of(follower)) for follower in beside}
        deadline = time.monotonic() + self.setup.patience_s
        while True:
            report: Report = replica.ask("report")
            self.judge(replica.name, report)
            if report.in_service and set(report.positions) == {position}:
                self.say(f"{replica.name} was brought to {position}")
                return report
            errors = [error for follower in beside for error in self._errors_of(follower)[told[follower.name] :]]
            late = time.monotonic() > deadline
            if errors and (late or len(errors) >= _LASTING or not any(one.process.is_alive() for one in beside)):
                failed = Failed(errors[-1]["error"], errors[-1]["message"], report)
                self.hear(beside[0].name, failed)
                return failed
            if late:
                raise Divergence(f"{replica.name} is {report} and not at {position}, and its follower reports nothing")
            time.sleep(0.03)

    def _start_client(self, kind: str, target: Callable[..., None], replica: Actor) -> Actor:
        name, url = f"{kind}-{time.monotonic_ns()}", f"http://127.0.0.1:{replica.details['port']}"
        self.say(f"{name} beside {replica.name}")
        return actors.start(name, target, self.setup, self.home / replica.name / "cache", url)

    def _errors_of(self, follower: Actor) -> list[dict[str, Any]]:
        """Errors that it reported, oldest first."""
        log = self.home / "logs" / f"{follower.name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        ends = [line for line in lines if line.startswith("hubsync: ")]
        return [event for event in events if event["event"] == "error"] + [
            {"error": line.split(": ")[1], "message": line} for line in ends
        ]

    # --- the Hub ------------------------------------------------------------------------------------

    def break_hub(self, **fault: Any) -> None:
        """Inject a fault; see `LocalHub.fail`."""
        assert self.hub is not None
        self.say(f"the Hub: {fault}")
        self.hub.ask("fail", fault)

    def heal_hub(self) -> int:
        """Remove all faults. Returns how many had not struck."""
        if self.hub is None:
            return 0
        left: int = self.hub.ask("left")
        self.hub.ask("heal")
        return left

    def restart_hub(self) -> None:
        """Restart the killed Hub at the same address."""
        self.hub = actors.start("hub", actors.hub, self.setup, self.port)
        self.hub.answer()

    # --- the judge ----------------------------------------------------------------------------------

    def judge(self, who: str, report: Report) -> None:
        """Raise Divergence if a replica claims to be in service but does not have, bit for bit, a published state."""
        if report.mixed is not None:
            raise Divergence(f"{who}: {report.mixed}")
        if not report.in_service:
            return
        position, *others = set(report.positions)
        if others:
            raise Divergence(f"the ranks of {who} serve different versions: {report}")
        assert position is not None
        self._judge_bits(who, position, report.memory)

    def _judge_bits(self, who: str, position: Position, memory: Any) -> None:
        state = self._state_of(position)
        if state is None:
            raise Divergence(f"{who} has {position}, which is no state of the publisher")
        expected = self.setup.memory(self.setup.states.view(state), len(memory))
        for rank, tensors in enumerate(expected):
            for name, right in tensors.items():
                if memory[rank][name] != right:
                    different = sum(a != b for a, b in zip(memory[rank][name], right, strict=True))
                    raise Divergence(
                        f"{who}, rank {rank}: {different} bytes of {name} at {position} differ from state {state}"
                    )

    def judge_claim(self, position: Position, state: int) -> None:
        """Raise Divergence if the digest of a published version is not that of the publisher's weights."""
        if position.digest != self._digest(self.setup.states.view(state)):
            raise Divergence(f"the publisher reports state {state} as {position}, which has another digest")

    def _state_of(self, position: Position) -> int | None:
        for state in self.setup.states.numbers():
            if state not in self._digested:
                self._digested.add(state)
                self._digests[self._digest(self.setup.states.view(state))] = state
        return self._digests.get(position.digest)

    def _digest(self, view: Tensors) -> str:
        return digest_view(table_of(view, self.setup.dtype), view).hex

    # --- the log ------------------------------------------------------------------------------------

    def say(self, what: str) -> None:
        self._log.write(f"{time.monotonic() - self._began:7.3f}  {what}\n")

    def hear(self, who: str, failed: Failed) -> None:
        """Record an error that a process reported, as it should."""
        self.loud[failed.error] += 1
        self.say(f"{who} reports {failed}")


def _free_port(ports: list[int]) -> int:
    """A free port, which a server keeps when it restarts."""
    for port in random.sample(ports, len(ports)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Broken("no port is free")
