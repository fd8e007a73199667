"""The commit window as a state machine: after any client crash, the next client completes the server."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from hubsync.apply.protocol import PROTOCOL, REPORTING, error_from_json
from hubsync.errors import (
    ConfigError,
    NoPath,
    ReplicaPoisoned,
    ReplicaRefused,
    ReplicaUnreachable,
    ReplicaUnsuitable,
    WrongParent,
)
from hubsync.format.manifest import Position
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer

BASE, NEXT, LATER = (Position(version, f"{version:032x}") for version in (0, 1, 2))


class Killed(BaseException):
    """The client process was killed."""


class ModelServer(VLLMServer):
    """The worker protocol of docs/ARCHITECTURE.md as an executable model: one server of `engines`, `ranks` in each.

    `fault(call, before)` runs before and after every call that reaches the server; it may raise.
    """

    def __init__(self, ranks: int = 1, *, engines: int = 1, atomic: bool = True):
        super().__init__("http://model")
        self.positions = [[BASE] * ranks for _ in range(engines)]
        self.atomic = atomic
        self.spans_engines = False
        self.staged: Position | None = None
        self.window: dict[str, Any] | None = None
        self.window_age_s = 3600.0
        self.watched: str | None = None  # token of the window that the server's watchdog would end
        self.state = "ready"
        self.paused = False
        self.labels = ["default"] * engines
        self.caches = [BASE] * engines  # position whose keys and values a request could hit
        self.looks = {"verified": True, "share": 0.02, "passes": 1, "age_s": 3.0, "asked": 0, "answered": 0}
        self.healed: str | None = None
        self.wrong: str | None = None  # found by the next verification
        self.heals_itself = False  # before the client asks again
        self.refusing: list[int] = []  # engines that refuse their next commit, one entry per refusal
        self.waits = False  # does it know `hubsync_wait`?
        self.calls: list[str] = []
        self.fault: Callable[[str, bool], None] = lambda call, before: None

    def reached(self, call: str, change: Callable[[], Any]) -> Any:
        self.fault(call, True)
        self.calls.append(call)
        result = change()
        self.fault(call, False)
        return result

    def version(self) -> str:
        return "0.32.0"

    def world_size(self) -> int:
        return sum(map(len, self.positions))

    def pause(self) -> None:
        self.reached("pause", lambda: setattr(self, "paused", True))

    def resume(self) -> None:
        self.reached("resume", lambda: setattr(self, "paused", False))

    def rpc(self, method: str, *args: Any) -> list[dict[str, Any]]:
        return self.reached(method, lambda: self._answer(method, *args))

    def _answer(self, method: str, *args: Any) -> list[dict[str, Any]]:
        results = []
        for engine in range(len(self.positions)):
            about = {"index": engine, "atomic": self.atomic, "paused": self.paused, "window_timeout_s": 15.0}
            about["waits"] = self.waits
            answers = getattr(self, method)(engine, *args)
            versions = {answer.get("version") for answer in answers}
            if len(versions) == 1 and versions != {None}:
                self.labels[engine] = str(versions.pop())
            for answer in answers:
                results.append({**answer, "engine": {"turn_s": 0.003, "label": self.labels[engine], **about}})
        for rank, result in enumerate(results):
            if "error" in result and method not in REPORTING:
                raise error_from_json(result["error"], f"rank {rank}: ")
        return results

    def hubsync_status(self, engine: int) -> list[dict[str, Any]]:
        return [
            {
                "protocol": PROTOCOL,
                "rank": rank,
                "state": self.state,
                "parallel": {"dp": len(self.positions) if self.spans_engines else 1},
                "version": position.version,
                "digest": position.digest,
                "staged": self.staged and {"version": self.staged.version, "digest": self.staged.digest},
                "window": self.window and {**self.window, "age_s": self.window_age_s},
                "verification": {**self.looks, "healed": self.healed},
                "metrics": {"heals": 0 if self.healed is None else 1},
                "error": {"type": "ReplicaPoisoned", "message": self.wrong} if self.state == "poisoned" else None,
            }
            for rank, position in enumerate(self.positions[engine])
        ]

    def hubsync_wait(self, engine: int, seconds: float) -> list[dict[str, Any]]:
        assert self.waits
        assert 0 < seconds <= 1, "the client looks from time to time whether anybody still waits"
        self.state = "ready"  # what was under way has ended
        return self.hubsync_status(engine)

    def hubsync_verify(self, engine: int) -> list[dict[str, Any]]:
        self.looks = {**self.looks, "asked": 1, "answered": 1, "age_s": 0.0}
        if self.wrong is not None:
            self.state, self.healed = ("ready", self.wrong) if self.heals_itself else ("poisoned", None)
        return [{"verification": self.looks} for _ in self.positions[engine]]

    def hubsync_attach(self, engine: int) -> list[dict[str, Any]]:
        return [{} for _ in self.positions[engine]]

    def hubsync_hold(self, engine: int, token: str) -> list[dict[str, Any]]:
        self.watched = token
        return [{}]

    def hubsync_join(self, engine: int) -> list[dict[str, Any]]:
        assert self.paused or not self.spans_engines, "engines would wait for each other"
        self.state = "ready"
        return [{} for _ in self.positions[engine]]

    def hubsync_stage(self, engine: int, version: int, digest: str) -> list[dict[str, Any]]:
        self.staged = Position(version, digest)
        return [{} for _ in self.positions[engine]]

    def hubsync_open(self, engine: int, version: int, digest: str, token: str) -> list[dict[str, Any]]:
        if self.window is not None and self.window["token"] != token:
            return [{"error": {"type": "ReplicaRefused", "message": f"window {self.window} is open"}}]
        self.window = {"version": version, "digest": digest, "token": token}
        self.watched = token
        return [{} for _ in self.positions[engine]]

    def hubsync_commit(self, engine: int, version: int, digest: str, kv_cache: str) -> list[dict[str, Any]]:
        assert kv_cache in ("recompute", "keep")
        target, ranks = Position(version, digest), self.positions[engine]
        if target not in (self.staged, ranks[0]) or engine in self.refusing:
            self.refusing = self.refusing[1:]
            return [{"error": {"type": "ReplicaRefused", "message": f"{target} is not staged"}}]
        assert self.paused or self.atomic
        self.positions[engine] = [target] * len(ranks)
        self.caches[engine], self.labels[engine] = target, str(version)
        return [{"changed": 10} for _ in ranks]

    def hubsync_close(self, engine: int, token: str) -> list[dict[str, Any]]:
        if self.window is not None and self.window["token"] == token:
            self.window = None
        if self.watched == token:
            self.watched = None
        return [{} for _ in self.positions[engine]]

    def assert_whole(self) -> None:
        """Assert: running, one version, labelled with it, no cache entries of another version, no window."""
        assert not self.paused
        assert self.window is None
        assert self.watched is None
        assert len({position for engine in self.positions for position in engine}) == 1
        assert set(self.labels) == {str(self.positions[0][0].version)}
        assert set(self.caches) == {self.positions[0][0]}


def staged_server(ranks: int = 1, **options: Any) -> ModelServer:
    server = ModelServer(ranks, **options)
    Replica(server).attach()
    Replica(server).wait_staged(NEXT)
    server.calls.clear()
    return server


# The requests of a commit on a server that must be paused, after the status request.
WINDOW = ["hubsync_open", "pause", "hubsync_commit", "resume", "hubsync_close"]


def test_the_server_says_when_a_version_is_staged() -> None:
    """The client does not ask again and again."""
    server = ModelServer()
    server.waits = True
    replica = Replica(server)
    replica.attach()
    server.calls.clear()
    server.state = "staging"
    replica.wait_staged(NEXT)
    assert server.calls == ["hubsync_stage", "hubsync_wait"]


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_a_commit_is_one_request(kv_cache: str) -> None:
    server = staged_server(ranks=2)
    report = Replica(server, kv_cache).commit(NEXT)
    assert server.calls == ["hubsync_status", "hubsync_commit"]
    assert (report.version, report.changed, report.pause_s) == (1, 20, 0.003)
    server.assert_whole()


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_a_commit_without_an_atomic_request_follows_the_documented_steps_in_order(kv_cache: str) -> None:
    server = staged_server(ranks=2, atomic=False)
    report = Replica(server, kv_cache).commit(NEXT)
    assert server.calls == ["hubsync_status", *WINDOW]
    assert (report.version, report.changed) == (1, 20)
    server.assert_whole()


def test_a_commit_can_pause_the_server() -> None:
    server = staged_server()
    Replica(server, pause=True).commit(NEXT)
    assert server.calls == ["hubsync_status", *WINDOW]


@pytest.mark.parametrize("spans_engines", [False, True])
def test_ranks_join_once_all_have_mapped_their_weights(spans_engines: bool) -> None:
    server = ModelServer(ranks=2, engines=2)
    server.state, server.spans_engines = "mapped", spans_engines
    watched: list[str | None] = []
    server.fault = lambda call, before: watched.append(server.watched) if call == "pause" else None
    Replica(server).attach()
    assert server.calls.count("hubsync_join") == 1
    assert ("pause" in server.calls) == spans_engines
    assert all(watched), "the server ends the pause if the client dies here"
    assert (server.paused, server.watched) == (False, None)


def test_committing_the_served_position_is_a_no_op() -> None:
    server = staged_server(atomic=False)
    assert Replica(server).commit(BASE).pause_s == 0
    assert server.calls == ["hubsync_status"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("look", [lambda replica: replica.attach(), lambda replica: replica.commit(BASE)])
def test_no_late_label_hides_the_commit_of_another_client(
    look: Callable[[Replica], object], number: int, before: bool
) -> None:
    """As when a follower and a pushing publisher share a server that has just attached."""
    server = staged_server()
    server.labels = ["default"]

    def commit_in_between(call: str, is_before: bool) -> None:
        if len(server.calls) == number + (not before) and is_before == before:
            server.fault = lambda call, before: None
            Replica(server).commit(NEXT)

    server.fault = commit_in_between
    with suppress(ReplicaRefused):  # the other client was first, and BASE is not staged
        look(Replica(server))
    Replica(server).status()
    server.assert_whole()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", WINDOW)
def test_the_next_client_completes_a_commit_killed_at_any_step(step: str, before: bool) -> None:
    server = staged_server(atomic=False)
    dead = False

    def kill(call: str, is_before: bool) -> None:
        nonlocal dead
        dead = dead or (call == step and is_before == before)
        if dead:
            raise Killed

    server.fault = kill
    with pytest.raises(Killed):
        Replica(server).commit(NEXT)
    server.fault = lambda call, is_before: None
    assert server.watched or not server.paused, "the server's watchdog would end the pause"

    Replica(server).attach()
    server.assert_whole()
    Replica(server).wait_staged(LATER)
    Replica(server).commit(LATER)
    server.assert_whole()
    assert server.positions == [[LATER]]


@pytest.mark.parametrize("before", [True, False], ids=["request lost", "answer lost"])
@pytest.mark.parametrize("step", WINDOW)
def test_a_connection_lost_at_any_step_never_leaves_the_server_paused(step: str, before: bool) -> None:
    server, lost = staged_server(atomic=False), []

    def lose_once(call: str, is_before: bool) -> None:
        if call == step and is_before == before and not lost:
            lost.append(call)
            raise ReplicaUnreachable("connection reset")

    server.fault = lose_once
    client = Replica(server)
    with pytest.raises(ReplicaUnreachable):
        client.commit(NEXT)
    assert not server.paused
    client.recover()  # has work to do only if an answer was lost before `pause`
    client.commit(NEXT)
    server.assert_whole()
    assert server.positions == [[NEXT]]


def test_the_next_commit_completes_a_server_lost_during_a_window() -> None:
    server = staged_server(atomic=False)

    def cut(call: str, before: bool) -> None:
        if before and "hubsync_commit" in server.calls:
            raise ReplicaUnreachable("network down")

    server.fault = cut
    client = Replica(server)
    with pytest.raises(ReplicaUnreachable):
        client.commit(NEXT)
    assert server.paused
    assert server.window
    server.fault = lambda call, before: None
    client.wait_staged(LATER)
    client.commit(LATER)
    server.assert_whole()


def test_an_engine_that_does_not_commit_when_others_do_is_not_left_behind() -> None:
    server = staged_server(engines=3)
    server.refusing = [1]
    Replica(server).commit(NEXT)
    assert server.calls.count("hubsync_commit") == 2
    server.assert_whole()


def test_engines_at_different_versions_are_reported_and_join_the_next_commit() -> None:
    server = staged_server(engines=3)
    server.refusing = [1, 1]
    client = Replica(server)
    with pytest.raises(ReplicaRefused, match=r"some engines of .* commit again"):
        client.commit(NEXT)
    assert server.positions == [[NEXT], [BASE], [NEXT]]
    assert server.labels[:2] == ["1", "0"], "each engine is labelled with the version it serves"
    assert client.status().position is None
    client.wait_staged(LATER)
    client.commit(LATER)
    server.assert_whole()


def test_a_window_of_another_client_is_waited_for() -> None:
    server = staged_server()
    server.window, server.window_age_s = {"version": 1, "digest": NEXT.digest, "token": "of a living client"}, 0.1
    calls: list[str] = []

    def close_after_five_calls(call: str, before: bool) -> None:
        calls.append(call)
        if len(calls) == 5:
            server.window = None

    server.fault = close_after_five_calls
    Replica(server).commit(NEXT)
    assert "resume" not in server.calls
    server.assert_whole()


def test_two_clients_never_share_a_window() -> None:
    server = staged_server(atomic=False)
    late = Replica(server)
    late._without_window = lambda: Replica(server).status()  # type: ignore[method-assign]  # had checked just before
    server.window, server.window_age_s = {"version": 1, "digest": NEXT.digest, "token": "of a living client"}, 0.1
    with pytest.raises(ReplicaRefused, match="living client"):
        late.commit(NEXT)
    assert "pause" not in server.calls


def test_a_refused_commit_resumes_with_the_old_weights() -> None:
    server = staged_server(atomic=False)
    with pytest.raises(ReplicaRefused, match="not staged"):
        Replica(server).commit(LATER)
    assert (server.paused, server.window, server.positions) == (False, None, [[BASE]])


def test_waiting_for_a_poisoned_server_raises() -> None:
    server = staged_server()
    server.state = "poisoned"
    for wait in (Replica(server).wait_staged, Replica(server).wait_verified):
        with pytest.raises(ReplicaPoisoned):
            wait(NEXT)


def test_verifying_another_position_than_the_served_one_is_refused() -> None:
    with pytest.raises(WrongParent, match="serves version 0"):
        Replica(staged_server()).wait_verified(NEXT)


def test_verification_does_not_wait_for_a_restarted_server() -> None:
    server = staged_server()
    server.state = "detached"
    with pytest.raises(WrongParent, match="was restarted"):
        Replica(server).wait_verified(NEXT, timeout=0)


@pytest.mark.parametrize(
    "strange",
    [
        {"version": "newest"},
        {"staged": "yes"},
        {"window": {"token": "a"}},
        {"engine": {}},
        {"parallel": {"dp": None}},
        {"adapter": {"name": "a"}},
    ],
    ids=str,
)
def test_workers_of_another_hubsync_are_unsuitable(strange: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server = staged_server()
    ranks = [rank | strange for rank in server.rpc("hubsync_status")]
    monkeypatch.setattr(server, "rpc", lambda *_: ranks)
    with pytest.raises(ReplicaUnsuitable, match="install the same hubsync on both"):
        Replica(server).status()


def test_a_wait_that_times_out_reports_the_last_state() -> None:
    server = staged_server()
    server.state = "attaching"
    with pytest.raises(ReplicaUnsuitable, match="attaching"):
        Replica(server).attach(timeout=0)


def test_a_server_with_workers_out_of_reach_is_unsuitable(monkeypatch: pytest.MonkeyPatch) -> None:
    server = staged_server()
    monkeypatch.setattr(server, "world_size", lambda: 2)
    with pytest.raises(ReplicaUnsuitable, match="only 1 are within its reach"):
        Replica(server).check()


def test_a_server_whose_engine_is_not_hooked_is_unsuitable(monkeypatch: pytest.MonkeyPatch) -> None:
    server = staged_server()
    monkeypatch.setattr(server, "_answer", lambda method: server.hubsync_status(0))
    with pytest.raises(ReplicaUnsuitable, match="VLLM_PLUGINS"):
        Replica(server).check()


def test_workers_of_another_protocol_are_unsuitable(monkeypatch: pytest.MonkeyPatch) -> None:
    server = staged_server()
    monkeypatch.setattr(server, "hubsync_status", lambda engine: [{"protocol": PROTOCOL + 1}])
    with pytest.raises(ReplicaUnsuitable, match="same hubsync on both"):
        Replica(server).check()


def test_an_unknown_cache_policy_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="recompute, keep"):
        Replica(ModelServer(), kv_cache="maybe")


def test_a_worker_error_is_raised_as_the_hubsync_class_it_names() -> None:
    named = error_from_json({"type": "NoPath", "message": "why"}, "rank 0: ")
    assert type(named) is NoPath
    assert "why" in str(named)
    for kind in ("SystemExit", "annotations", "Exception", None):
        assert type(error_from_json({"type": kind, "message": ""}, "rank 0: ")) is ReplicaRefused


def test_a_closed_port_is_unreachable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound but not listening
        server = VLLMServer(f"http://127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(ReplicaUnreachable, match="is the vLLM server up"):
            server.health()


# --- verify


def test_status_says_when_the_weights_were_verified() -> None:
    status = Replica(ModelServer(2)).status()
    assert status.verification is not None
    assert (status.verification.verified, status.verification.age_s, status.verification.share) == (True, 3.0, 0.02)


def test_every_worker_is_asked_to_verify_and_has_answered() -> None:
    server = ModelServer(2)
    status = Replica(server).verify()
    assert server.calls == ["hubsync_status", "hubsync_verify", "hubsync_status"]
    assert (status.position, status.verification and status.verification.age_s) == (BASE, 0.0)


@pytest.mark.parametrize("heals_itself", [False, True])
def test_wrong_weights_are_an_error_also_if_the_server_has_rebuilt_them(heals_itself: bool) -> None:
    server = ModelServer()
    server.wrong, server.heals_itself = "the live weights are not those of version 0: down differs", heals_itself
    with pytest.raises(ReplicaPoisoned, match="down differs.*has rebuilt" if heals_itself else "down differs"):
        Replica(server).verify()


def test_a_server_without_a_version_cannot_be_verified() -> None:
    server = ModelServer()
    server.state, server.positions = "mapped", [[None]]  # type: ignore[list-item]
    server.hubsync_status = lambda engine: [{"state": "mapped", "verification": None}]  # type: ignore[method-assign]
    with pytest.raises(ReplicaRefused, match="hubsync follow --once"):
        Replica(server).verify()


def test_a_server_that_is_restarted_during_the_verification_is_an_error() -> None:
    server = ModelServer()
    server.hubsync_verify = lambda engine: [{"verification": {"asked": 1, "answered": 0}}]  # type: ignore[method-assign]
    with pytest.raises(ReplicaRefused, match="was restarted meanwhile"):
        Replica(server).verify()
