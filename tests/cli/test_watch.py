"""`hubsync status` and `hubsync watch`: a real run, and servers that are stand-ins behind real HTTP."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from hubsync.bucket import LocalBucket
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader
from hubsync.cli import watching
from hubsync.cli.main import main
from hubsync.errors import BucketUnavailable
from hubsync.format.manifest import Position
from hubsync.replicas.engines import connect
from hubsync.replicas.replica import Replica
from tests.replicas.test_deployment import until
from tests.support.history import History
from tests.support.standin import StandIn


@pytest.fixture
def history(tmp_path: Path) -> History:
    history = History(LocalBucket(tmp_path / "run", create=True))
    for _ in range(3):
        history.publish()
    return history


@pytest.fixture
def server(history: History) -> Iterator[StandIn]:
    with StandIn(list(history.views)[1]) as server:
        Replica(connect(server.url)).attach()
        yield server


def test_status_prints_what_a_server_serves(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--server", server.url, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["state"], document["version"], document["error"]) == ("ready", 1, None)
    assert main(["status", "--server", server.url]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["state"], lines["version"], lines["digest"]) == ("ready", "1", server.position.digest)


def test_the_status_of_a_server_that_is_away_is_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--server", "http://127.0.0.1:9"]) == 1
    assert "is the vLLM server up" in capsys.readouterr().err
    assert main(["status", "--server", "http://127.0.0.1:9", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["state"], document["error"]["type"]) == ("unreachable", "ReplicaUnreachable")


def test_watch_shows_the_run_and_each_server(
    history: History, server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = ["--server", server.url, "--server", "http://127.0.0.1:9"]
    assert main(["watch", history.bucket.address, *servers, "--once", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["newest"]["version"], document["served"]["version"], document["error"]) == (3, 3, None)
    up, away = document["servers"]
    assert (up["version"], up["lag"], away["state"], away["lag"]) == (1, 2, "unreachable", None)
    assert main(["watch", history.bucket.address, "--server", server.url, "--once"]) == 0
    assert "newest version 3" in capsys.readouterr().out


def test_a_run_that_cannot_be_read_now_is_still_shown(
    history: History, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ChainReader(history.bucket, tmp_path / "cache")
    before = watching.look_at_run(reader, watching.RunSeen())

    def fails() -> Position:
        raise BucketUnavailable("the Hub is away")

    monkeypatch.setattr(reader, "newest", fails)
    seen = watching.look_at_run(reader, before)
    assert (seen.newest, seen.served) == (before.newest, before.served)
    text = io.StringIO()
    servers = [watching.look_at(Replica(connect(server.url)))]
    Console(file=text, width=160).print(watching.drawn("address", seen, servers, now=(before.created or 0) + 90))
    assert "newest version 3" in text.getvalue()
    assert "90 s ago" in text.getvalue()
    assert "not read now: the Hub is away" in text.getvalue()


def test_a_live_picture_is_drawn_until_it_is_interrupted(
    history: History, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes from the drawing, once it shows what was looked at in the background."""
    from rich.live import Live

    update = Live.update

    def interrupted(live: Live, picture: object, *, refresh: bool) -> None:
        update(live, picture, refresh=refresh)  # type: ignore[arg-type]
        text = io.StringIO()
        Console(file=text, width=160).print(picture)
        if "newest version 3" in text.getvalue() and "ready" in text.getvalue():
            raise KeyboardInterrupt

    monkeypatch.setattr(Live, "update", interrupted)
    assert main(["watch", history.bucket.address, "--server", server.url]) == 0


def test_a_new_version_on_a_hub_is_seen_long_before_the_next_look(hub_bucket: HubBucket, tmp_path: Path) -> None:
    """The interval is an hour: the Hub's events do it."""
    history = History(hub_bucket)
    history.publish()
    watch = watching.Watch(lambda: ChainReader(hub_bucket, tmp_path), [], interval=3600.0)

    def sees(version: int) -> bool:
        return watch.run.newest is not None and watch.run.newest.version == version

    with watch.looking():
        until(lambda: sees(1))
        history.publish()
        until(lambda: sees(2))


def test_json_of_a_live_picture_is_refused(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", history.bucket.address, "--json"]) == 1
    assert "give --once too" in capsys.readouterr().err
