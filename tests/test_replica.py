"""The commit window as a state machine: whoever dies, and wherever, the next client brings the server back whole."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from hubsync.errors import (
    ConfigError,
    NoPath,
    ReplicaPoisoned,
    ReplicaRefused,
    ReplicaUnreachable,
    ReplicaUnsuitable,
    WrongParent,
)
from hubsync.manifest import Position
from hubsync.replica.server import PROTOCOL, VLLMServer, worker_error
from hubsync.replica.sync import Replica

BASE, NEXT, LATER = (Position(version, f"{version:032x}") for version in (0, 1, 2))


class Killed(BaseException):
    """The client process is gone."""


class ModelServer(VLLMServer):
    """The worker protocol of docs/ARCHITECTURE.md as an executable model: one server with `ranks` workers.

    `fault(call, before)` runs before and after every call that reaches the server; it may raise.
    """

    def __init__(self, ranks: int = 1):
        super().__init__("http://model")
        self.positions = [BASE] * ranks
        self.staged: Position | None = None
        self.window: dict[str, Any] | None = None
        self.window_age_s = 3600.0
        self.state = "ready"
        self.parallel = {"tp": ranks, "pp": 1, "dp": 1, "ep": False}
        self.core = True  # is the plugin active around the workers?
        self.refusing: set[int] = set()  # ranks whose engine refuses to commit
        self.paused = False
        self.label = "default"
        self.cached_by: Position | None = BASE  # whose keys and values the prefix cache holds
        self.resets_refused = 0
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
        return len(self.positions)

    def pause(self, clear_cache: bool = True) -> None:
        def change() -> None:
            self.paused = True
            if clear_cache:
                self.cached_by = None

        self.reached("pause", change)

    def resume(self) -> None:
        def change() -> None:
            assert len(set(self.positions)) == 1, "a forward pass would mix versions"
            self.paused, self.cached_by = False, self.positions[0]

        self.reached("resume", change)

    def reset_prefix_cache(self) -> bool:
        def change() -> bool:
            if self.resets_refused:
                self.resets_refused -= 1
                return False
            self.cached_by = None
            return True

        return self.reached("reset", change)

    def set_weight_version(self, version: str) -> None:
        self.reached("label", lambda: setattr(self, "label", version))

    def rpc(self, method: str, *args: Any) -> list[dict[str, Any]]:
        return self.reached(method, lambda: self._answer(method, *args))

    def answers(self, method: str, *args: Any) -> list[dict[str, Any]]:
        return self.reached(method, lambda: self._ask(method, *args))

    def _ask(self, method: str, *args: Any) -> list[dict[str, Any]]:
        return [getattr(self, method)(rank, *args) for rank in range(len(self.positions))]

    def _answer(self, method: str, *args: Any) -> list[dict[str, Any]]:
        results = self._ask(method, *args)
        for rank, result in enumerate(results):
            if "error" in result and method != "hubsync_status":
                raise worker_error(result["error"], f"rank {rank}")
        return results

    def hubsync_status(self, rank: int) -> dict[str, Any]:
        position, staged = self.positions[rank], self.staged
        return {
            "protocol": PROTOCOL,
            "core": self.core,
            "parallel": self.parallel,
            "rank": rank,
            "state": self.state,
            "version": position.version,
            "digest": position.digest,
            "staged": staged and {"version": staged.version, "digest": staged.digest},
            "window": self.window and {**self.window, "age_s": self.window_age_s},
        }

    def hubsync_attach(self, rank: int) -> dict[str, Any]:
        return {}

    def hubsync_stage(self, rank: int, version: int, digest: str) -> dict[str, Any]:
        self.staged = Position(version, digest)
        return {}

    def hubsync_open(self, rank: int, version: int, digest: str, token: str) -> dict[str, Any]:
        if self.window is not None and self.window["token"] != token:
            return {"error": {"type": "ReplicaRefused", "message": f"window {self.window} is open"}}
        self.window = {"version": version, "digest": digest, "token": token}
        return {}

    def hubsync_join(self, rank: int) -> dict[str, Any]:
        assert self.paused or self.parallel["dp"] == 1, "engines would wait for each other"
        self.state = "ready"
        return {}

    def hubsync_commit(self, rank: int, version: int, digest: str, kv_cache: str = "recompute") -> dict[str, Any]:
        target = Position(version, digest)
        assert self.paused or self.parallel["pp"] == self.parallel["dp"] == 1, "a forward pass would mix versions"
        if target not in (self.staged, self.positions[rank]) or rank in self.refusing:
            return {"error": {"type": "ReplicaRefused", "message": f"{target} is not staged"}}
        self.positions[rank] = target
        if kv_cache == "keep":
            self.label, self.cached_by = str(version), None
        return {"changed": 10}

    def hubsync_undo(self, rank: int) -> dict[str, Any]:
        if self.positions[rank] == BASE:
            return {"error": {"type": "ReplicaRefused", "message": "there is no commit to undo"}}
        self.positions[rank] = BASE
        return {}

    def hubsync_close(self, rank: int, token: str) -> dict[str, Any]:
        if self.window is not None and self.window["token"] == token:
            self.window = None
        return {}

    def assert_whole(self) -> None:
        """Running, one version, labelled with it, nothing cached by another, no window."""
        assert not self.paused
        assert self.window is None
        assert len(set(self.positions)) == 1
        assert self.label == str(self.positions[0].version)
        assert self.cached_by in (None, self.positions[0])


def staged_server(ranks: int = 1) -> ModelServer:
    server = ModelServer(ranks)
    Replica(server).attach()
    Replica(server).wait_staged(NEXT)
    server.calls.clear()
    return server


# What a commit does, after a look at the status.
WINDOW = ["hubsync_open", "pause", "hubsync_commit", "label", "reset", "resume", "hubsync_close"]


def test_a_commit_goes_through_the_documented_steps_in_order() -> None:
    server = staged_server(ranks=2)
    report = Replica(server).commit(NEXT)
    assert server.calls == ["hubsync_status", *WINDOW]
    assert (report.version, report.changed) == (1, 20)
    server.assert_whole()


def test_keep_commits_without_a_pause() -> None:
    server = staged_server()
    report = Replica(server, kv_cache="keep").commit(NEXT)
    assert server.calls == ["hubsync_status", "hubsync_commit"], "label and cache are the engine core's"
    assert report.pause_s == 0
    server.assert_whole()


@pytest.mark.parametrize("spread", ["pp", "dp"])
def test_keep_pauses_where_a_forward_pass_is_not_everywhere_at_the_same_place(spread: str) -> None:
    server = staged_server(ranks=2)
    server.parallel[spread] = 2
    Replica(server, kv_cache="keep").commit(NEXT)
    assert server.calls == ["hubsync_status", *(step for step in WINDOW if step != "reset")]
    server.assert_whole()


def test_keep_needs_the_plugin_around_the_workers() -> None:
    server = staged_server()
    server.core = False
    with pytest.raises(ReplicaUnsuitable, match="use kv_cache"):
        Replica(server, kv_cache="keep").commit(NEXT)
    assert server.calls == ["hubsync_status"]


def test_engines_that_committed_take_it_back_if_another_refuses() -> None:
    server = staged_server(ranks=2)
    server.refusing = {1}
    with pytest.raises(ReplicaRefused, match="not staged"):
        Replica(server).commit(NEXT)
    assert server.positions == [BASE, BASE]
    server.label = "0"
    server.assert_whole()


@pytest.mark.parametrize("dp", [1, 2])
def test_ranks_join_once_all_have_mapped_what_they_hold(dp: int) -> None:
    server = ModelServer(ranks=2)
    server.parallel["dp"], server.state = dp, "mapped"
    Replica(server).attach()
    assert server.calls.count("hubsync_join") == 1
    assert ("pause" in server.calls) == (dp > 1)
    assert not server.paused


def test_committing_the_position_that_is_served_disturbs_nobody() -> None:
    server = staged_server()
    assert Replica(server).commit(BASE).pause_s == 0
    assert server.calls == ["hubsync_status", "label"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", WINDOW)
def test_a_client_killed_at_any_step_leaves_a_server_that_the_next_one_completes(step: str, before: bool) -> None:
    server = staged_server()
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

    Replica(server).attach()
    server.assert_whole()
    Replica(server).wait_staged(LATER)
    Replica(server).commit(LATER)
    server.assert_whole()
    assert server.positions == [LATER]


@pytest.mark.parametrize("before", [True, False], ids=["request lost", "answer lost"])
@pytest.mark.parametrize("step", WINDOW)
def test_a_connection_lost_at_any_step_never_leaves_the_server_paused(step: str, before: bool) -> None:
    server, lost = staged_server(), []

    def lose_once(call: str, is_before: bool) -> None:
        if call == step and is_before == before and not lost:
            lost.append(call)
            raise ReplicaUnreachable("connection reset")

    server.fault = lose_once
    client = Replica(server)
    with pytest.raises(ReplicaUnreachable):
        client.commit(NEXT)
    assert not server.paused
    client.recover()  # only an answer lost before `pause` leaves anything to do
    client.commit(NEXT)
    server.assert_whole()
    assert server.positions == [NEXT]


def test_a_server_that_was_unreachable_for_the_rest_of_a_window_is_completed_by_the_next_commit() -> None:
    server = staged_server()

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


def test_ranks_that_differ_are_never_resumed_until_the_commit_reached_all_of_them() -> None:
    server = staged_server(ranks=2)
    server.window = {"version": 1, "digest": NEXT.digest, "token": "of a dead client"}
    server.paused, server.positions[0] = True, NEXT
    assert Replica(server).recover()
    assert server.positions == [NEXT, NEXT]
    server.assert_whole()


def test_a_window_of_another_client_is_waited_for() -> None:
    server = staged_server()
    server.window, server.window_age_s = {"version": 1, "digest": NEXT.digest, "token": "of a living client"}, 0.1
    looks = []

    def close_after_some_looks(call: str, before: bool) -> None:
        looks.append(call)
        if len(looks) == 5:
            server.window = None

    server.fault = close_after_some_looks
    Replica(server).commit(NEXT)
    assert "resume" not in server.calls[: server.calls.index("hubsync_open")]
    server.assert_whole()


def test_two_clients_never_share_a_window() -> None:
    server = staged_server()
    late = Replica(server)
    late._without_window = lambda: Replica(server).status()  # type: ignore[method-assign]  # looked just before
    server.window, server.window_age_s = {"version": 1, "digest": NEXT.digest, "token": "of a living client"}, 0.1
    with pytest.raises(ReplicaRefused, match="living client"):
        late.commit(NEXT)
    assert "pause" not in server.calls


def test_a_refused_commit_resumes_with_the_old_weights() -> None:
    server = staged_server()
    with pytest.raises(ReplicaRefused, match="not staged"):
        Replica(server).commit(LATER)
    server.assert_whole()
    assert server.positions == [BASE]


def test_a_prefix_cache_that_is_busy_at_first_is_reset_in_the_end() -> None:
    server = staged_server()
    server.resets_refused = 3
    Replica(server).commit(NEXT)
    server.assert_whole()


def test_a_prefix_cache_that_cannot_be_reset_is_an_error_and_the_window_stays_to_be_completed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hubsync.replica.sync._PAUSE_S", 0)
    server = staged_server()
    server.resets_refused = 10_000
    with pytest.raises(ReplicaRefused, match="prefix cache"):
        Replica(server).commit(NEXT)
    assert not server.paused
    assert server.window
    server.resets_refused = 0
    assert Replica(server).recover()
    server.assert_whole()


def test_waiting_for_a_poisoned_server_raises() -> None:
    server = staged_server()
    server.state = "poisoned"
    for wait in (Replica(server).wait_staged, Replica(server).wait_verified):
        with pytest.raises(ReplicaPoisoned):
            wait(NEXT)


def test_verifying_another_position_than_the_served_one_is_refused() -> None:
    with pytest.raises(WrongParent, match="serves version 0"):
        Replica(staged_server()).wait_verified(NEXT)


def test_waiting_ends_with_the_state_that_it_waited_in() -> None:
    server = staged_server()
    server.state = "attaching"
    with pytest.raises(ReplicaUnsuitable, match="attaching"):
        Replica(server).attach(timeout=0)


def test_a_server_with_workers_out_of_reach_is_unsuitable(monkeypatch: pytest.MonkeyPatch) -> None:
    server = staged_server()
    monkeypatch.setattr(server, "world_size", lambda: 2)
    with pytest.raises(ReplicaUnsuitable, match="data parallel"):
        Replica(server).check()


def test_workers_of_another_protocol_are_unsuitable(monkeypatch: pytest.MonkeyPatch) -> None:
    server = staged_server()
    monkeypatch.setattr(server, "hubsync_status", lambda rank: {"protocol": PROTOCOL + 1})
    with pytest.raises(ReplicaUnsuitable, match="same hubsync on both"):
        Replica(server).check()


def test_an_unknown_cache_policy_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="recompute, keep"):
        Replica(ModelServer(), kv_cache="maybe")


def test_a_worker_error_becomes_the_class_it_names_and_nothing_else_can_be_named() -> None:
    named = worker_error({"type": "NoPath", "message": "why"}, "rank 0")
    assert type(named) is NoPath
    assert "why" in str(named)
    for kind in ("SystemExit", "annotations", "Exception", None):
        assert type(worker_error({"type": kind, "message": ""}, "rank 0")) is ReplicaRefused


def test_nobody_listening_is_unreachable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound but not listening
        server = VLLMServer(f"http://127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(ReplicaUnreachable, match="is the vLLM server up"):
            server.health()
