"""Status objects: followers leave them in the bucket if asked to, and nothing but `hubsync watch` reads them."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hubsync.bucket import LocalBucket
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader, Layout
from hubsync.chain.retention import STALE_S, Collector, Policy
from hubsync.chain.writer import ChainWriter
from hubsync.cli import watching
from hubsync.cli.main import main
from hubsync.errors import BucketUnavailable, ReplicaRefused
from hubsync.replicas import status_objects
from hubsync.replicas.engines import connect
from hubsync.replicas.replica import Replica
from hubsync.replicas.reports import ReplicaStatus
from hubsync.replicas.status_objects import MAX_BYTES, Reported, StatusReporter, read_reported
from tests.replicas.test_deployment import until
from tests.support.faults import FaultyBucket
from tests.support.fixtures_hub import READ_ONLY_TOKEN
from tests.support.history import History
from tests.support.standin import StandIn

URL = "http://me:secret@127.0.0.1:8000"


@pytest.fixture
def history(tmp_path: Path) -> History:
    history = History(LocalBucket(tmp_path / "run", create=True))
    for _ in range(3):
        history.publish()
    return history


@pytest.fixture
def server(history: History) -> Iterator[StandIn]:
    with StandIn(next(iter(history.views))) as server:
        yield server


@pytest.fixture
def status(server: StandIn) -> ReplicaStatus:
    replica = Replica(connect(server.url))
    replica.attach()
    return replica.status()


@pytest.fixture
def reporter(history: History, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatusReporter]:
    monkeypatch.setattr(status_objects, "SHORTEST_S", 0.05)
    reporter = StatusReporter(lambda: history.bucket, URL)
    yield reporter
    reporter.close(10.0)


def put(history: History, data: bytes, name: str = "0" * 16) -> Path:
    history.bucket.commit(Layout.replica(name), data)
    return Path(history.bucket.address, Layout.replica(name))


def shown(*reported: Reported) -> str:
    text = io.StringIO()
    Console(file=text, width=400).print(watching.drawn("address", watching.RunSeen(), [], reported, now=1000.0))
    return text.getvalue()


# --- followers


def test_a_follower_writes_nothing_unless_asked_to(history: History, server: StandIn) -> None:
    assert main(["follow", history.bucket.address, "--server", server.url, "--once"]) == 0
    assert list(history.bucket.list(Layout.REPLICAS)) == []


def test_watch_shows_a_server_that_it_cannot_reach(
    history: History, server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    follow = ["follow", history.bucket.address, "--server", server.url, "--once", "--report-status"]
    assert main(follow) == 0
    server.stop()
    capsys.readouterr()
    assert main(["watch", history.bucket.address, "--once", "--json"]) == 0
    (reported,) = json.loads(capsys.readouterr().out)["reported"]
    assert (reported["server"], reported["state"], reported["version"]) == (server.url, "ready", 3)
    assert reported["nbytes"] == 1000
    assert reported["error"] is None
    assert 0 <= reported["age_s"] < 600
    assert main(["watch", history.bucket.address, "--once"]) == 0
    assert "reported in the bucket" in capsys.readouterr().out


def test_a_status_names_no_user_of_the_url_and_is_renewed_under_one_name(
    history: History, reporter: StatusReporter, status: ReplicaStatus
) -> None:
    reporter.status(status)
    until(lambda: len(read_reported(history.bucket)) == 1)
    reporter.error(ReplicaRefused("no, " * 200))
    until(lambda: read_reported(history.bucket)[0].error is not None)
    (found,) = read_reported(history.bucket)
    assert (found.state, found.version, found.digest) == ("ready", 0, status.position and status.position.digest)
    assert str(found.error).startswith("ReplicaRefused: no, no")
    assert len(str(found.error)) <= 300
    (stat,) = history.bucket.list(Layout.REPLICAS)
    assert stat.size <= MAX_BYTES
    assert b"secret" not in Path(history.bucket.address, stat.path).read_bytes()


def test_many_changes_are_few_writes(history: History, status: ReplicaStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = FaultyBucket(history.bucket)
    reporter = StatusReporter(lambda: bucket, URL)  # at most one write in 30 s
    reporter.status(status)
    until(lambda: bucket.calls["commit"] == 1)
    for number in range(100):
        reporter.error(ReplicaRefused(str(number)))
    assert bucket.calls["commit"] == 1
    reporter.close(10.0)
    assert bucket.calls["commit"] == 2  # the last one
    assert str(read_reported(history.bucket)[0].error) == "ReplicaRefused: 99"


def test_a_steady_server_is_reported_now_and_then(
    history: History, status: ReplicaStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_objects, "SHORTEST_S", 0.0)
    monkeypatch.setattr(status_objects, "LONGEST_S", 0.05)
    bucket = FaultyBucket(history.bucket)
    reporter = StatusReporter(lambda: bucket, URL)
    reporter.status(status)
    until(lambda: bucket.calls["commit"] >= 3)
    reporter.close(10.0)


def test_a_bucket_that_takes_no_status_is_said_once(
    hub_bucket: HubBucket, local_hub: Any, status: ReplicaStatus, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(status_objects, "SHORTEST_S", 0.0)
    monkeypatch.setattr(status_objects, "LONGEST_S", 0.01)
    reading = HubBucket(hub_bucket.address, token=READ_ONLY_TOKEN, endpoint=local_hub.url)
    reporter = StatusReporter(lambda: reading, URL)
    reporter.status(status)
    until(lambda: local_hub.requests().get("GET /api/buckets/{namespace}/{name}/xet-write-token", 0) >= 3)
    reporter.close(10.0)
    said = [record for record in caplog.records if record.name == status_objects.__name__]
    assert len(said) == 1
    assert "the token has no permission" in said[0].getMessage()


def test_a_bucket_that_cannot_be_opened_delays_nobody(status: ReplicaStatus) -> None:
    def fails() -> LocalBucket:
        raise BucketUnavailable("away")

    reporter = StatusReporter(fails, URL)
    reporter.status(status)
    reporter.close(10.0)


# --- readers


GARBAGE = [
    b"",
    b"\xff\x00",
    b"[]",
    b"7",
    b"[" * 4000,
    b"{}",
    b'{"format": 2, "server": 1, "host": 2}',
    json.dumps({"format": 99, "server": "http://x", "host": "y"}).encode(),
    b"{" + b" " * 5000 + b"}",
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_left_out(history: History, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    put(history, data)
    history.bucket.commit("replicas/other.json", b"{}")
    put(history, Reported("http://good", "host").dumps(), "a" * 16)
    assert [found.server for found in read_reported(history.bucket)] == ["http://good"]
    assert main(["watch", history.bucket.address, "--once"]) == 0


def hostile(**fields: Any) -> bytes:
    return json.dumps({**json.loads(Reported("http://x", "host").dumps()), **fields}).encode()


def test_hostile_values_are_shown_as_text_or_not_at_all() -> None:
    found = Reported.loads(
        hostile(
            server="[bold red]http://x[/]\x1b[2J\u202e",
            state="[/]" * 500,
            version=-1,
            digest=["a"],
            staged=True,
            verified_age_s=float("nan"),
            seconds={"stage": 1, "\x1b": 2, "commit": "x", "verify": 1e300},
            nbytes=10**30,
            error={"a": 1},
        ),
        None,
    )
    assert found is not None
    assert (found.version, found.digest, found.staged, found.verified_age_s) == (None, None, None, None)
    assert (found.seconds, found.nbytes, found.error) == ({"stage": 1.0}, None, None)
    text = shown(found)
    assert "[bold red]http://x" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_the_newest_of_many_are_read(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_objects, "MOST", 2)
    for number in range(4):
        path = put(history, Reported(f"http://{number}", "host").dumps(), f"{number:016x}")
        os.utime(path, (1000 + number, 1000 + number))
    found = read_reported(history.bucket)
    assert [(reported.server, reported.written) for reported in found] == [("http://3", 1003), ("http://2", 1002)]
    assert "http://3 on host, -" not in shown(*found)


def test_a_table_of_reported_servers(status: ReplicaStatus) -> None:
    reported = Reported("http://x", "host", written=910.0).of(status)
    text = shown(reported)
    assert "http://x on host, 90 s ago" in text
    assert "ready" in text


def test_watch_reads_statuses_of_a_signed_run_too(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    """They are not signed; the run's documents are checked as ever."""
    put(history, Reported("http://x", "host").dumps())
    assert main(["watch", history.bucket.address, "--once", "--json", "--public-key", "0" * 64]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["type"] == "Untrusted"
    assert [reported["server"] for reported in document["reported"]] == ["http://x"]


# --- the protocol


def test_no_reader_or_writer_of_the_run_looks_at_them(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> list[tuple[int, str]]:
        commands = (["verify"], ["ls"], ["gc", "--keep-last", "9", "--dry-run"], ["repair"])
        return [
            (main([command, history.bucket.address, *options]), capsys.readouterr().out)
            for command, *options in commands
        ]

    before = said()
    for number, data in enumerate(GARBAGE):
        put(history, data, f"{number:016x}")
    assert said() == before
    assert ChainReader(history.bucket, tmp_path / "cache").newest().version == 3
    assert ChainWriter.resume(history.bucket, history.table).position.version == 3


@pytest.mark.parametrize(("age", "kept"), [(0.0, True), (STALE_S + 60, False)])
def test_retention_deletes_what_was_not_renewed_for_a_day(
    history: History, tmp_path: Path, age: float, kept: bool
) -> None:
    path = put(history, b"garbage or not")
    then = time.time() - age
    os.utime(path, (then, then))
    history.publish()
    collector = Collector(
        history.bucket, ChainReader(history.bucket, tmp_path / "cache"), Policy(keep_last=9, grace=0.0)
    )
    found = [garbage.what for garbage in collector.collect()]
    assert path.exists() == kept
    assert found == ([] if kept else ["status of 1 replicas"])
