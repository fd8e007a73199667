"""Followers. The server is a stand-in; the runs and the processes are real."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hubsync.bucket import open_bucket
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader, Layout
from hubsync.errors import BucketUnavailable, ConfigError, HubsyncError, ReplicaBehind, ReplicaUnreachable, RunMismatch
from hubsync.format.manifest import Head
from hubsync.localhub import LocalHub
from hubsync.replicas.deployment import Deployment
from hubsync.replicas.follower import Followed, Follower, _Reminder
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.replicas.test_deployment import PATIENCE_S, hold, until
from tests.support.faults import FaultyBucket
from tests.support.fixtures_hub import TOKEN
from tests.support.publisher import Publisher, small_steps
from tests.support.standin import StandIn


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    """A run at version 2."""
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.randn(32, 8).bfloat16()}, base / "model.safetensors")
    made = Publisher(tmp_path, base)
    publish(made)
    publish(made)
    return made


def publish(publisher: Publisher) -> None:
    publisher.publish(publisher.writer.next_version, small_steps)


@pytest.fixture
def server(publisher: Publisher) -> Iterator[StandIn]:
    """A stand-in server at version 0."""
    with StandIn(publisher.positions[0]) as server:
        yield server


@pytest.fixture
def bucket(publisher: Publisher) -> FaultyBucket:
    return FaultyBucket(open_bucket(publisher.address))


@pytest.fixture
def follower(bucket: FaultyBucket, server: StandIn, tmp_path: Path) -> Follower:
    return Follower(lambda: ChainReader(bucket, tmp_path / "cache"), Replica(VLLMServer(server.url)), interval=0.01)


@contextmanager
def running(follower: Follower) -> Iterator[None]:
    thread = threading.Thread(target=follower.run)
    thread.start()
    try:
        yield
    finally:
        follower.stop()
        thread.join()


def serve(publisher: Publisher, version: int) -> None:
    """Set the version to serve in the run's head."""
    newest = publisher.writer.newest
    assert newest is not None
    open_bucket(publisher.address).commit(Layout.HEAD, Head(newest, serve=version).dumps())


# --- one poll


def test_a_server_that_was_just_started_is_attached_and_brought_to_the_newest_version(
    follower: Follower, server: StandIn, publisher: Publisher
) -> None:
    followed = follower.step()
    assert followed is not None
    assert (followed.commit.version, followed.lag, followed.nbytes) == (2, 2, 1000)
    server.assert_whole()
    assert server.position == publisher.positions[2]


def test_a_poll_without_news_leaves_the_server_alone(follower: Follower, server: StandIn) -> None:
    follower.step()
    server.calls.clear()
    assert follower.step() is None
    assert server.calls == ["hubsync_status"]


def test_the_follower_follows_the_version_to_serve_not_the_newest(
    follower: Follower, server: StandIn, publisher: Publisher
) -> None:
    serve(publisher, 1)
    follower.step()
    assert server.position == publisher.positions[1]
    serve(publisher, 2)
    follower.step()
    assert server.position == publisher.positions[2]


def test_the_server_follows_the_run_to_an_older_version(
    follower: Follower, server: StandIn, publisher: Publisher
) -> None:
    follower.step()
    for version in (1, 0):
        serve(publisher, version)
        followed = follower.step()
        assert followed is not None
        assert followed.lag == -1
        assert server.position == publisher.positions[version]


def test_a_damaged_head_does_not_stop_the_follower(follower: Follower, server: StandIn, publisher: Publisher) -> None:
    open_bucket(publisher.address).commit(Layout.HEAD, b"{}")
    follower.step()
    assert server.position == publisher.positions[2]


def test_a_restarted_server_is_attached_again(follower: Follower, server: StandIn, publisher: Publisher) -> None:
    follower.step()
    server.stop()
    with pytest.raises(ReplicaUnreachable):
        follower.step()
    server.start()
    follower.step()
    assert (server.attached, server.position) == (2, publisher.positions[2])


def test_a_poisoned_server_is_healed(follower: Follower, server: StandIn) -> None:
    follower.step()
    server.state = "poisoned"
    follower.step()
    assert server.state == "ready"
    assert server.calls.count("hubsync_heal") == 1


def test_a_window_left_open_by_a_dead_client_is_ended(follower: Follower, server: StandIn) -> None:
    follower.step()
    server.pause()
    server.window = {"version": 2, "digest": server.position.digest, "token": "of a dead client"}
    assert follower.step() is None
    server.assert_whole()


def test_a_server_moved_by_another_client_is_left_to_it(
    follower: Follower, server: StandIn, publisher: Publisher
) -> None:
    """A pushing publisher commits its newest version on the server before the head names it."""

    def push(call: str, before: bool) -> None:
        if call == "hubsync_stage" and not before:
            server.positions, server.staged = [[publisher.positions[2]]], publisher.positions[1]

    serve(publisher, 1)
    server.fault = push
    assert follower.step() is None
    assert "hubsync_commit" not in server.calls


# --- polling in a loop


def test_the_follower_follows_every_version_until_stopped(
    follower: Follower, server: StandIn, publisher: Publisher
) -> None:
    seen: list[Followed] = []
    follower.on_commit = seen.append
    with running(follower):
        until(lambda: server.position == publisher.positions[-1])
        publish(publisher)
        until(lambda: server.position == publisher.positions[-1])
    assert [followed.commit.version for followed in seen] == [2, 3]


def test_errors_are_logged_and_retried_with_backoff(
    follower: Follower, bucket: FaultyBucket, server: StandIn, publisher: Publisher
) -> None:
    told: list[tuple[HubsyncError, float]] = []
    follower.on_error = lambda error, retry_s: told.append((error, retry_s))
    for nth in range(1, 6):
        bucket.fail("read", nth)
    with running(follower):
        until(lambda: server.position == publisher.positions[2])
    assert [type(error) for error, _ in told] == [BucketUnavailable] * 5
    for tries, (_, retry_s) in enumerate(told, start=1):
        assert 0.5 <= retry_s / (0.01 * 2**tries) <= 1


def test_the_follower_waits_for_a_run_that_does_not_exist_yet(
    server: StandIn, publisher: Publisher, tmp_path: Path
) -> None:
    address = tmp_path / "later"
    follower = Follower(
        lambda: ChainReader(open_bucket(str(address)), tmp_path / "cache"),
        Replica(VLLMServer(server.url)),
        interval=0.01,
    )
    told: list[HubsyncError] = []
    follower.on_error = lambda error, retry_s: told.append(error)
    with running(follower):
        until(lambda: bool(told))
        Path(publisher.address).rename(address)
        until(lambda: server.position == publisher.positions[2])


def test_a_run_recreated_in_the_same_place_is_noticed(
    follower: Follower, server: StandIn, publisher: Publisher, tmp_path: Path
) -> None:
    """Servers are pinned to the run that they were started with, so the follower cannot continue and must report it."""
    follower.step()
    shutil.rmtree(publisher.address)
    with pytest.raises(HubsyncError):
        follower.step()
    again = Publisher(tmp_path, publisher.base, run_id="0" * 32)
    for _ in range(3):
        publish(again)
        with pytest.raises(ConfigError, match="another run"):
            follower.step()
    assert server.position == publisher.positions[2]


def test_a_server_of_another_run_is_left_alone(follower: Follower, server: StandIn, publisher: Publisher) -> None:
    server.run_id = "0" * 32
    with pytest.raises(ConfigError, match=f"follows the run {'0' * 32}, and .* holds {publisher.run_id}"):
        follower.run()
    assert server.calls[-1] == "hubsync_status"


def test_a_server_of_another_model_is_retried_because_it_may_be_restarted(
    follower: Follower, server: StandIn, publisher: Publisher
) -> None:
    told: list[HubsyncError] = []
    follower.on_error = lambda error, retry_s: told.append(error)
    server.mismatch = "this server was not started from a version of the run"
    with running(follower):
        until(lambda: len(told) > 2)
        server.mismatch = None
        until(lambda: server.position == publisher.positions[2])
    assert {type(error) for error in told} == {RunMismatch}


def test_the_follower_catches_up_after_a_hub_outage(
    hub_address: str, server: StandIn, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
    monkeypatch.setattr("hubsync.bucket.hub_api.PATIENCE_SECONDS", 0.5)
    hub, told = LocalHub(tmp_path / "hub").start(), []
    port = int(hub.url.rsplit(":", 1)[1])
    copy_run(publisher.address, hub.url, hub_address)
    follower = Follower(
        lambda: ChainReader(HubBucket(hub_address, endpoint=hub.url), tmp_path / "cache"),
        Replica(VLLMServer(server.url)),
        interval=0.01,
    )
    follower.on_error = lambda error, retry_s: told.append(error)
    with running(follower):
        until(lambda: server.position == publisher.positions[2])
        hub.stop()
        until(lambda: len(told) > 1)
        publish(publisher)
        hub = LocalHub(tmp_path / "hub", port).start()
        copy_run(publisher.address, hub.url, hub_address)
        until(lambda: server.position == publisher.positions[3])
    hub.stop()
    assert {type(error) for error in told} == {BucketUnavailable}
    assert all("later" in str(error) for error in told)


def test_a_new_version_on_a_hub_is_followed_long_before_the_next_poll(
    hub_address: str, local_hub: LocalHub, server: StandIn, publisher: Publisher, tmp_path: Path
) -> None:
    """The interval is an hour: events do it. The first is of the stream itself, for what came before it."""
    copy_run(publisher.address, local_hub.url, hub_address)
    follower = Follower(
        lambda: ChainReader(HubBucket(hub_address, token=TOKEN, endpoint=local_hub.url), tmp_path / "cache"),
        Replica(VLLMServer(server.url)),
        interval=3600.0,
    )
    with running(follower):
        until(lambda: server.position == publisher.positions[2])
        publish(publisher)
        copy_run(publisher.address, local_hub.url, hub_address)
        until(lambda: server.position == publisher.positions[3])
    assert local_hub.requests()["GET /api/buckets/{namespace}/{name}/events"] == 1


def copy_run(address: str, endpoint: str, to: str) -> None:
    source, target = open_bucket(address), HubBucket(to, create=True, token=TOKEN, endpoint=endpoint)
    paths = [stat.path for stat in source.list()]
    for path, data in source.read(paths).items():
        target.commit(path, data)


def test_a_setting_that_cannot_work_is_not_retried(server: StandIn, tmp_path: Path) -> None:
    follower = Follower(lambda: ChainReader(open_bucket("s3://x"), tmp_path), Replica(VLLMServer(server.url)))
    with pytest.raises(ConfigError):
        follower.run()
    with pytest.raises(ConfigError, match="interval"):
        Follower(lambda: ChainReader(open_bucket("x"), tmp_path), Replica(server), interval=0)


def test_followers_and_a_pusher_share_a_server(publisher: Publisher, tmp_path: Path) -> None:
    """The server must be paused for commits, so clients have the most chances to interfere."""
    with StandIn(publisher.positions[0], atomic=False) as server, Pushing(server, publisher):
        followers = [
            Follower(
                lambda: ChainReader(open_bucket(publisher.address), tmp_path / "cache"),
                Replica(VLLMServer(server.url)),
                interval=0.01,
            )
            for _ in range(2)
        ]
        server.window_age_s = 0.0  # every window belongs to a live client
        with running(followers[0]), running(followers[1]):
            for _ in range(10):
                publish(publisher)
            until(lambda: server.position == publisher.positions[-1])
        until(lambda: server.window is None)
        server.assert_whole()


class Pushing:
    """The pushing half of a publisher: hot-loads the newest version in a loop."""

    def __init__(self, server: StandIn, publisher: Publisher):
        self._deployment = Deployment([server.url])
        self._publisher = publisher
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._push)

    def _push(self) -> None:
        while not self._ended.is_set():
            self._deployment.hotload(self._publisher.positions[-1])

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._deployment.close()


def test_an_idle_poll_costs_few_hub_requests(
    hub_bucket: HubBucket, local_hub: LocalHub, publisher: Publisher, tmp_path: Path
) -> None:
    """The free tier allows 1000 calls in five minutes, in which a follower polls 60 times."""
    run, head = (open_bucket(publisher.address).read([path])[path] for path in (Layout.RUN, Layout.HEAD))
    hub_bucket.commit(Layout.RUN, run)
    hub_bucket.commit(Layout.HEAD, head)
    with StandIn(publisher.positions[2]) as server:
        follower = Follower(lambda: ChainReader(hub_bucket, tmp_path / "cache"), Replica(VLLMServer(server.url)))
        assert follower.step() is None
        local_hub.reset()
        assert follower.step() is None
    assert 0 < local_hub.api_calls() <= 4


def test_a_login_after_the_token_has_expired_needs_no_restart(
    hub_bucket: HubBucket,
    local_hub: LocalHub,
    publisher: Publisher,
    server: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`hf auth login` on the host is enough; the follower reads the new token."""
    login = tmp_path / "token"
    login.write_text("hf_expired")
    copy_run(publisher.address, local_hub.url, hub_bucket.address)
    environment = {"HF_ENDPOINT": local_hub.url, "HF_TOKEN_PATH": str(login), "HF_TOKEN": ""}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with command(publisher, server, "--bucket", hub_bucket.address, "--json") as process:
        for _ in range(2):
            error = line(process)
            assert (error["error"], error["event"]) == ("BucketDenied", "error")
            assert "hf auth login" in error["message"]
        login.write_text(TOKEN)
        while (event := line(process))["event"] == "error":
            pass
    assert event["version"] == 2


# --- the command


@contextmanager
def command(
    publisher: Publisher, server: StandIn, *options: str, out: Any = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    arguments = ["follow", "--bucket", publisher.address, "--server", server.url, "--interval", "0.05", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "hubsync", *arguments],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_one_line_per_commit_and_ends_cleanly_on_a_signal(
    publisher: Publisher, server: StandIn, number: signal.Signals
) -> None:
    started = time.time()
    with command(publisher, server, "--json") as process:
        commit = line(process)
        publish(publisher)
        assert line(process)["version"] == 3
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert started - 1 < commit.pop("time") < time.time() + 1  # rounded
    assert commit == {
        "event": "commit",
        "server": server.url,
        "version": 2,
        "digest": publisher.positions[2].digest,
        "lag": 2,
        "changed": 10,
        "bytes": 1000,
        "stage_s": 0.0,
        "commit_s": 0.0,
        "pause_s": 0.003,
    }


def test_the_command_says_once_that_a_version_is_verified(publisher: Publisher, server: StandIn) -> None:
    """As JSON, with the seconds that it took; a server that does not state them is left out, as above."""
    status = server.hubsync_status

    def with_seconds(engine: int) -> list[dict[str, Any]]:
        return [{**rank, "metrics": {**rank["metrics"], "verify_s": 0.25}} for rank in status(engine)]

    server.hubsync_status = with_seconds  # type: ignore[method-assign]
    with command(publisher, server, "--json") as process:
        events = [line(process), line(process)]
        publish(publisher)
        events += [line(process), line(process)]
    assert sorted((event["version"], event["event"]) for event in events) == [
        (2, "commit"),
        (2, "verified"),
        (3, "commit"),
        (3, "verified"),
    ]
    assert {event["server"] for event in events} == {server.url}
    assert {event["verify_s"] for event in events if event["event"] == "verified"} == {0.25}


def test_the_command_says_at_its_start_what_it_follows(publisher: Publisher, server: StandIn) -> None:
    with command(publisher, server) as process:
        assert process.stdout is not None
        first, second, third = (process.stdout.readline() for _ in range(3))
    assert first.endswith(
        f"following {publisher.address} on {server.url}: a look every 0.05 s, a line for each commit\n"
    )
    assert second.endswith(f"the run exists and serves {publisher.positions[2]}; the server is at version 0\n")
    assert "version 2 (" in third


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file on a disk that is full")
def test_the_command_goes_on_if_its_output_cannot_be_written(publisher: Publisher, server: StandIn) -> None:
    """As with a log file on a disk that is full."""
    with Path("/dev/full").open("w") as full, command(publisher, server, "--json", out=full) as process:
        until(lambda: server.position == publisher.positions[2])
        publish(publisher)
        until(lambda: server.position == publisher.positions[3])
        assert process.poll() is None


def test_the_command_with_once_polls_once(publisher: Publisher, server: StandIn) -> None:
    with command(publisher, server, "--once") as process:
        out, _ = process.communicate(timeout=PATIENCE_S)
    digest = publisher.positions[2].digest[:12]
    assert f"version 2 ({digest}), lag 2: 10 elements, 1,000 bytes, stage 0.000 s" in out
    assert process.returncode == 0
    with command(publisher, server, "--once") as process:
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert "nothing to do" in out
    server.stop()
    with command(publisher, server, "--once") as process:
        _, err = process.communicate(timeout=PATIENCE_S)
    assert "ReplicaUnreachable" in err
    assert process.returncode == 1


def test_a_follower_that_waits_says_once_a_while_for_what(
    follower: Follower, server: StandIn, publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    follower.step()
    follower.step()
    assert caplog.messages == [], "a short wait is not reported"
    follower._idle = _Reminder(0.0)
    follower.step()
    (message,) = caplog.messages
    said = f"{server.url} is at {publisher.positions[2]}: waiting for the next version of the run (a look every 0.01 s)"
    assert message == said


def test_a_server_that_does_not_get_there_is_reported_once_a_while(
    follower: Follower, server: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def behind(*_: object) -> None:
        raise ReplicaBehind("another version is wanted")

    monkeypatch.setattr(follower._replica, "wait_staged", behind)
    follower.step()
    assert not [message for message in caplog.messages if "has not reached" in message]
    follower._behind = _Reminder(0.0)
    follower.step()
    assert [message for message in caplog.messages if "has not reached version 2" in message]


def test_an_error_of_the_local_disk_is_retried(follower: Follower, server: StandIn, publisher: Publisher) -> None:
    told: list[HubsyncError] = []
    follower.on_error = lambda error, retry_s: told.append(error)
    open_reader, failures = follower._open_reader, [OSError(28, "No space left on device"), OSError(30, "Read-only")]

    def opened() -> ChainReader:
        if failures:
            raise failures.pop(0)
        return open_reader()

    follower._open_reader = opened
    with running(follower):
        until(lambda: server.position == publisher.positions[2])
    assert ["No space" in str(error) or "Read-only" in str(error) for error in told] == [True, True]
    assert all("Free some space" in str(error) and "HUBSYNC_CACHE" in str(error) for error in told)


def test_a_cache_that_cannot_be_written_does_not_end_the_command(
    publisher: Publisher, server: StandIn, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with command(publisher, server, "--cache", str(tmp_path / "file" / "cache")):
        until(lambda: server.position == publisher.positions[2])
        publish(publisher)
        until(lambda: server.position == publisher.positions[3])


def test_a_follower_continues_after_a_killed_one(publisher: Publisher, server: StandIn) -> None:
    go = hold(server, "hubsync_commit")
    with command(publisher, server):
        until(lambda: server.staged == publisher.positions[2])
    go.set()
    with command(publisher, server):
        until(lambda: server.position == publisher.positions[2])
    server.assert_whole()
