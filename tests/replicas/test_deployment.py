"""Deployments: several servers switched to a version together. Stand-in servers speak the protocol over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from hubsync.errors import ConfigError, NoPath, ReplicaBehind, ReplicaRefused, ReplicaUnreachable, ReplicaUnsuitable
from hubsync.format.manifest import Position
from hubsync.replicas.deployment import Deployment
from tests.replicas.test_replica import BASE, LATER, NEXT
from tests.support.standin import StandIn

PATIENCE_S = 60.0  # upper bound for a few requests on a loaded machine


@pytest.fixture
def servers() -> Iterator[list[StandIn]]:
    with ExitStack() as stack:
        yield [stack.enter_context(StandIn()) for _ in range(3)]


@pytest.fixture
def deployment(servers: list[StandIn]) -> Iterator[Deployment]:
    made = Deployment([server.url for server in servers])
    yield made
    made.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.01)


def hold(server: StandIn, call: str) -> threading.Event:
    """Block this call of the server until the returned event is set."""
    go = threading.Event()
    server.fault = lambda name, before: None if name != call or not before else _wait(go)
    return go


def _wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)


def unreachable(call: str, before: bool) -> None:
    raise ReplicaUnreachable("injected")


# --- hot-loading


def test_a_hotload_brings_all_servers_to_a_version(servers: list[StandIn], deployment: Deployment) -> None:
    report = deployment.hotload(NEXT)
    report.raise_for_quorum()
    assert [commit.position for commit in report.commits] == [NEXT] * 3
    assert [(replica.version, replica.lag, replica.error) for replica in report.replicas] == [(1, 0, None)] * 3
    for server in servers:
        server.assert_whole()


def test_a_hotload_can_return_to_an_older_version(servers: list[StandIn], deployment: Deployment) -> None:
    for target in (LATER, NEXT):
        deployment.hotload(target).raise_for_quorum()
    assert [server.position for server in servers] == [NEXT] * 3


def test_no_server_commits_before_all_have_staged(servers: list[StandIn], deployment: Deployment) -> None:
    go, committed = hold(servers[2], "hubsync_stage"), threading.Event()
    for server in servers[:2]:
        server.fault = lambda call, before: committed.set() if call == "hubsync_commit" else None
    hotload = threading.Thread(target=deployment.hotload, args=(NEXT,))
    hotload.start()
    until(lambda: all(server.staged == NEXT for server in servers[:2]))
    assert not committed.wait(0.5), "no commit before the last server has staged"
    go.set()
    hotload.join()
    assert [server.position for server in servers] == [NEXT] * 3


def test_a_signal_returns_at_once_and_all_servers_stage(servers: list[StandIn], deployment: Deployment) -> None:
    go = hold(servers[0], "hubsync_stage")
    deployment.signal(NEXT)
    until(lambda: all(server.staged == NEXT for server in servers[1:]))
    assert [server.position for server in servers] == [BASE] * 3
    go.set()
    deployment.hotload(NEXT).raise_for_quorum()


def test_a_dead_server_does_not_block_the_others(servers: list[StandIn], deployment: Deployment) -> None:
    servers[1].stop()
    report = deployment.hotload(NEXT)
    assert [server.position for server in (servers[0], servers[2])] == [NEXT] * 2
    assert [replica.version for replica in report.replicas] == [1, None, 1]
    assert report.replicas[1].state == "unreachable"
    with pytest.raises(ReplicaUnreachable, match="is the vLLM server up"):
        report.raise_for_quorum()


def test_a_returning_server_joins_the_next_hotload(servers: list[StandIn], deployment: Deployment) -> None:
    servers[1].stop()
    deployment.hotload(NEXT)
    servers[1].start()
    deployment.hotload(LATER).raise_for_quorum()
    assert [server.position for server in servers] == [LATER] * 3


def test_a_server_left_behind_is_logged_once_and_again_when_it_catches_up(
    servers: list[StandIn], deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="hubsync.replicas.deployment")
    servers[1].stop()
    for _ in range(3):
        deployment.hotload(NEXT)
    servers[1].start()
    deployment.hotload(LATER).raise_for_quorum()
    url = servers[1].url
    assert [record.getMessage()[: len(url) + 15] for record in caplog.records if record.name.startswith("hubsync")] == [
        f"{url} is left behind",
        f"{url} follows again",
    ]


def test_a_hanging_server_delays_the_others_at_most_by_the_timeout(
    servers: list[StandIn], deployment: Deployment
) -> None:
    deployment.hotload(NEXT)
    servers[1].stuck.clear()
    report = deployment.hotload(LATER, timeout=1)
    assert [replica.version for replica in report.replicas] == [2, None, 2]
    assert isinstance(report.replicas[1].error, ReplicaBehind)
    with pytest.raises(ReplicaBehind, match=r"has not committed version 2 .* \(1 s allowed\)"):
        report.raise_for_quorum()
    servers[1].stuck.set()
    until(lambda: servers[1].position == LATER)


def test_a_quorum_commits_and_the_slow_server_catches_up_by_itself(
    servers: list[StandIn], deployment: Deployment
) -> None:
    go = hold(servers[0], "hubsync_stage")
    report = deployment.hotload(NEXT, quorum=2)
    report.raise_for_quorum()
    assert [replica.version for replica in report.replicas[1:]] == [1, 1]
    assert (report.replicas[0].commit, report.replicas[0].lag) == (None, None)
    assert servers[0].position == BASE
    go.set()
    until(lambda: servers[0].position == NEXT)


@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupted_hotload_leaves_no_server_waiting(
    servers: list[StandIn], deployment: Deployment, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    thread = deployment._members[number].thread
    submit = thread.submit

    def interrupted(*job: Any) -> None:
        submit(*job)
        raise KeyboardInterrupt

    monkeypatch.setattr(thread, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deployment.hotload(NEXT)
    monkeypatch.setattr(thread, "submit", submit)
    deployment.hotload(LATER, timeout=5.0).raise_for_quorum()
    assert [server.position for server in servers] == [LATER] * 3


def test_a_slow_server_skips_a_superseded_version(servers: list[StandIn], deployment: Deployment) -> None:
    staged: list[Position] = []

    def take_long(call: str, before: bool) -> None:
        if call == "hubsync_stage" and not before:
            staged.append(servers[0].staged)
            if staged == [NEXT]:
                servers[0].state, servers[0].staged = "staging", None

    servers[0].fault = take_long
    deployment.hotload(NEXT, quorum=2).raise_for_quorum()
    deployment.hotload(LATER, quorum=2).raise_for_quorum()
    until(lambda: LATER in staged)
    servers[0].state = "ready"
    until(lambda: servers[0].position == LATER)
    assert staged == [NEXT, LATER]
    assert servers[0].calls.count("hubsync_commit") == 1


def test_a_refusal_affects_only_its_server_and_names_it(servers: list[StandIn], deployment: Deployment) -> None:
    def no_path(call: str, before: bool) -> None:
        if call == "hubsync_stage":
            raise NoPath("no path to version 1")

    servers[2].fault = no_path
    report = deployment.hotload(NEXT)
    assert isinstance(report.replicas[2].error, NoPath)
    assert [server.position for server in servers] == [NEXT, NEXT, BASE]
    with pytest.raises(NoPath, match=servers[2].url):
        report.raise_for_quorum()


def test_a_commit_that_fails_on_one_server_is_reported(servers: list[StandIn], deployment: Deployment) -> None:
    deployment.wait_ready(PATIENCE_S)
    servers[0].refusing = [0]
    report = deployment.hotload(NEXT)
    assert isinstance(report.replicas[0].error, ReplicaRefused)
    assert [server.position for server in servers] == [BASE, NEXT, NEXT]


def test_a_restarted_server_is_attached_again(servers: list[StandIn], deployment: Deployment) -> None:
    deployment.hotload(NEXT)
    servers[0].stop()
    servers[0].start()
    assert servers[0].position == BASE
    deployment.hotload(NEXT).raise_for_quorum()
    assert (servers[0].attached, servers[0].position) == (2, NEXT)


def test_a_hotload_heals_a_poisoned_server(servers: list[StandIn], deployment: Deployment) -> None:
    deployment.hotload(NEXT)
    servers[0].state = "poisoned"
    deployment.hotload(LATER).raise_for_quorum()
    assert servers[0].calls.count("hubsync_heal") == 1
    assert servers[0].position == LATER


def test_a_hotload_completes_although_another_client_stages_another_version(
    servers: list[StandIn], deployment: Deployment
) -> None:
    others = [LATER]

    def interfere(call: str, before: bool) -> None:
        if call == "hubsync_stage" and not before and others:
            servers[0].staged = others.pop()

    servers[0].fault = interfere
    deployment.hotload(NEXT).raise_for_quorum()
    assert servers[0].position == NEXT


# --- attaching, status, closing


def test_a_restarted_trainer_finds_the_positions_of_the_servers(servers: list[StandIn], deployment: Deployment) -> None:
    deployment.hotload(NEXT)
    deployment.close()
    again = Deployment([server.url for server in servers])
    assert [replica.version for replica in again.status()] == [1, 1, 1]
    again.hotload(LATER).raise_for_quorum()
    assert [server.attached for server in servers] == [1, 1, 1]
    again.close()


def test_status_reports_each_servers_version_and_lag(servers: list[StandIn], deployment: Deployment) -> None:
    deployment.hotload(LATER)
    servers[0].stop()
    servers[0].start()
    servers[1].stop()
    Deployment([servers[0].url]).wait_ready(PATIENCE_S)
    assert [(replica.version, replica.lag, replica.state) for replica in deployment.status()] == [
        (0, 2, "ready"),
        (None, None, "unreachable"),
        (2, 0, "ready"),
    ]


def test_waiting_until_ready_waits_for_servers_that_are_not_up_yet(
    servers: list[StandIn], deployment: Deployment
) -> None:
    servers[0].stop()
    waiting = threading.Thread(target=deployment.wait_ready, args=(PATIENCE_S,))
    waiting.start()
    until(lambda: servers[1].attached == servers[2].attached == 1)
    assert waiting.is_alive()
    servers[0].start()
    waiting.join()
    assert [replica.state for replica in deployment.status()] == ["ready"] * 3


def test_waiting_ends_once_a_quorum_is_ready(servers: list[StandIn]) -> None:
    servers[1].stop()
    deployment = Deployment([server.url for server in servers], quorum=2)
    assert [report.state for report in deployment.wait_ready(1e6)] == ["ready", "unreachable", "ready"]
    deployment.close()


def test_waiting_for_a_server_that_never_comes_ends_with_its_error(servers: list[StandIn]) -> None:
    servers[0].stop()
    urls = [server.url for server in servers]
    with pytest.raises(ReplicaUnreachable):
        Deployment(urls).wait_ready(timeout=0)
    Deployment(urls, quorum=2).wait_ready(timeout=0)


def test_warming_up_generates_on_every_server_and_tries_again(servers: list[StandIn], deployment: Deployment) -> None:
    servers[0].cold = 1
    deployment.warm_up(retries=1)
    assert [server.generated for server in servers] == [1, 1, 1]
    servers[0].cold = 1
    with pytest.raises(ReplicaRefused, match="not yet"):
        deployment.warm_up(retries=0)


@pytest.mark.parametrize("leave_serving", [True, False])
def test_closing_leaves_the_servers_serving_by_default(
    servers: list[StandIn], deployment: Deployment, leave_serving: bool
) -> None:
    deployment.hotload(NEXT)
    deployment.close(leave_serving=leave_serving)
    assert [server.paused for server in servers] == [not leave_serving] * 3
    assert [server.position for server in servers] == [NEXT] * 3


@pytest.mark.parametrize(
    ("servers", "options", "says"),
    [
        ([], {}, "at least one server"),
        ("http://one", {}, "at least one server"),
        (["one:8000"], {}, "not the URL"),
        (["http://one", "http://one/"], {}, "named twice"),
        (["http://one"], {"quorum": 2}, "at most the 1 servers"),
        (["http://one"], {"quorum": -1}, "quorum"),
        (["http://one"], {"quorum": 0.5}, "quorum"),
        (["http://one"], {"request_timeout": 0}, "request_timeout"),
        (["http://one"], {"request_timeout": float("nan")}, "request_timeout"),
        (["http://one"], {"kv_cache": "drop"}, "kv_cache"),
    ],
)
def test_a_deployment_needs_distinct_servers_and_valid_settings(
    servers: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Deployment(servers, **options)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "1m", None])
def test_an_invalid_timeout_is_refused(servers: list[StandIn], deployment: Deployment, timeout: Any) -> None:
    with pytest.raises(ConfigError, match="number of seconds"):
        deployment.hotload(NEXT, timeout=timeout)
    with pytest.raises(ConfigError, match="number of seconds"):
        deployment.wait_ready(timeout)
    assert [server.calls for server in servers] == [[]] * 3


def test_a_zero_timeout_does_not_wait(deployment: Deployment) -> None:
    report = deployment.hotload(NEXT, timeout=0)
    assert all(replica.commit is not None or replica.error is not None for replica in report.replicas)


def test_a_url_may_end_with_a_slash(servers: list[StandIn]) -> None:
    made = Deployment([servers[0].url + "/"])
    made.hotload(NEXT).raise_for_quorum()
    assert [replica.url for replica in made.status()] == [servers[0].url]
    made.close()


def test_a_closed_deployment_raises(deployment: Deployment) -> None:
    deployment.close()
    deployment.close()
    for call in (lambda: deployment.hotload(NEXT), lambda: deployment.signal(NEXT), deployment.status):
        with pytest.raises(ConfigError, match="make a new one"):
            call()


def test_a_server_without_a_model_raises_a_hubsync_error(
    servers: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = StandIn.answer
    empty = lambda self, path, body: (200, {"data": []}) if path == "/v1/models" else answer(self, path, body)  # noqa: E731
    monkeypatch.setattr(StandIn, "answer", empty)
    with pytest.raises(ReplicaUnsuitable, match="does not answer like a vLLM server"):
        Deployment([servers[0].url]).warm_up(retries=0)
