"""Reports of changes end pauses early: the Hub's event stream, through the real client, and everything that fails."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import _bucket_live_follow as client

from hubsync.bucket import LocalBucket, SignedBucket, changes, hub_events
from hubsync.bucket.changes import Changes
from hubsync.bucket.hub import HubBucket
from hubsync.format.keys import SigningKey
from hubsync.localhub import LocalHub, events
from hubsync.retry import attempts
from tests.support.fixtures_hub import TOKEN

LONG_S = 60.0  # nothing here waits for so long unless an event is missing


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "SHORTEST_S", 0.0)
    monkeypatch.setattr(changes, "REPEAT_S", 1000.0)
    monkeypatch.setattr(hub_events, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(hub_events, "UNSERVED_PAUSE_S", 0.01)


@pytest.fixture
def heard(hub_bucket: HubBucket) -> Iterator[Changes]:
    """Pauses of a poller of the head, with a stream that is ready."""
    with hub_bucket.changes(["head.json"]) as heard:
        assert heard.wait(LONG_S)  # whatever happened before the stream was there is looked at once
        yield heard


def until(condition: Callable[[], bool]) -> None:
    for _ in attempts(LONG_S, waiting_for="a condition of a test"):
        if condition():
            return
    raise AssertionError("it never came true")


def test_a_write_of_the_head_ends_the_pause(hub_bucket: HubBucket, heard: Changes) -> None:
    assert heard.live
    for data in (b"1", b"2"):
        hub_bucket.commit("head.json", data)
        assert heard.wait(LONG_S)
    assert not heard.wait(0.05)


def test_other_names_and_other_runs_end_no_pause(hub_bucket: HubBucket, local_hub: LocalHub, heard: Changes) -> None:
    other = HubBucket(hub_bucket.address + "-2", token=TOKEN, endpoint=local_hub.url)
    other.commit("head.json", b"1")
    hub_bucket.commit("head.json.bak", b"1")
    assert not heard.wait(0.2)


def test_a_directory_stands_for_all_below_it(hub_bucket: HubBucket) -> None:
    with hub_bucket.changes(["status/"]) as heard:
        assert heard.wait(LONG_S)
        hub_bucket.commit("status", b"1")
        assert not heard.wait(0.1)
        hub_bucket.commit("status/a.json", b"1")
        assert heard.wait(LONG_S)


def test_a_stream_that_ends_is_opened_again_and_the_gap_is_looked_at(
    hub_bucket: HubBucket, local_hub: LocalHub, heard: Changes
) -> None:
    local_hub.fail("/events", status=503, times=3)
    local_hub.end_streams()
    hub_bucket.commit("head.json", b"written while there was no stream")
    until(lambda: local_hub.faults_left() == 0)
    assert heard.wait(LONG_S)
    until(lambda: heard.live)
    hub_bucket.commit("head.json", b"and now")
    assert heard.wait(LONG_S)


@pytest.mark.parametrize(
    "fault",
    [*({"status": status} for status in (401, 403, 404, 429, 500, 501)), {"drop": True}, {"lose_answer": True}],
)
def test_where_no_stream_is_served_pauses_last_their_time_and_nothing_is_said(
    hub_bucket: HubBucket, local_hub: LocalHub, caplog: pytest.LogCaptureFixture, fault: dict[str, Any]
) -> None:
    local_hub.fail("/events", times=2**31, **fault)
    with caplog.at_level(logging.WARNING), hub_bucket.changes(["head.json"]) as heard:
        hub_bucket.commit("head.json", b"1")
        assert not heard.wait(0.1)
        assert not heard.live
    assert caplog.text == ""


def test_a_stream_that_is_refused_for_a_while_is_asked_for_again(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    local_hub.fail("/events", status=404, times=3)
    with hub_bucket.changes(["head.json"]) as heard:
        assert heard.wait(LONG_S)
        assert heard.live


@pytest.mark.parametrize("how", ["missing", "other parameters", "no function"])
def test_another_client_library_means_plain_pauses(
    hub_bucket: HubBucket, monkeypatch: pytest.MonkeyPatch, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "missing":
        monkeypatch.delattr("huggingface_hub._bucket_live_follow")
        monkeypatch.setitem(sys.modules, "huggingface_hub._bucket_live_follow", None)
    elif how == "no function":
        monkeypatch.delattr(client, "_follow_events")
    else:
        monkeypatch.setattr(client, "_follow_events", lambda endpoint, bucket: iter(()))
    with hub_bucket.changes(["head.json"]) as heard:
        assert type(heard) is Changes
        assert not heard.wait(0.01)
    assert caplog.text == ""


def test_the_installed_client_library_is_used(hub_bucket: HubBucket) -> None:
    with hub_bucket.changes(["head.json"]) as heard:
        assert isinstance(heard, hub_events.HubChanges)


@dataclass
class _Ready:
    cursor: None = None


@dataclass
class _Changes:
    changes: Any = field(default_factory=list)


@dataclass
class Change:
    path: object


@pytest.mark.parametrize(
    "said",
    [[object()], [_Ready(), _Changes([Change(None)])], [_Changes([Change(7)]), None], [_Changes([])], [_Changes(7)]],
)
def test_nothing_that_a_stream_says_breaks_the_poll(said: list[Any]) -> None:
    """The stream is a stand-in: it says what the real client would never yield."""
    opened = threading.Semaphore(0)

    def stream(ended: Callable[[], bool]) -> Iterator[Any]:
        opened.release()
        yield from said

    with hub_events.HubChanges(stream, ["run/head.json"]) as heard:
        for _ in range(3):
            assert opened.acquire(timeout=LONG_S)
            heard.wait(0.0)


def test_a_flood_of_reports_is_no_flood_of_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "SHORTEST_S", LONG_S)
    heard = Changes()
    heard.report()
    assert heard.wait(LONG_S)  # the first at once
    heard.report()
    waiting = threading.Thread(target=heard.wait, args=(LONG_S,))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    heard.close()
    waiting.join()


def test_what_is_visible_late_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "REPEAT_S", 0.05)
    heard = Changes()
    heard.report()
    assert heard.wait(LONG_S)
    assert heard.wait(LONG_S)  # without another report
    assert not heard.wait(0.1)


def test_closing_ends_a_pause_and_the_stream(local_hub: LocalHub, heard: Changes) -> None:
    threads = [thread for thread in threading.enumerate() if thread.name == "hubsync-events"]
    assert threads
    heard.close()
    assert heard.wait(LONG_S)
    assert heard.wait(LONG_S)
    local_hub.end_streams()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()


def test_directories_only_pause_and_signed_buckets_hear_what_theirs_hear(hub_bucket: HubBucket, tmp_path: Path) -> None:
    assert not LocalBucket(tmp_path).changes(["head.json"]).wait(0.01)
    with SignedBucket(hub_bucket, SigningKey.generate()).changes(["head.json"]) as heard:
        assert heard.wait(LONG_S)
        hub_bucket.commit("head.json", b"1")
        assert heard.wait(LONG_S)


# --- what the local Hub serves --------------------------------------------------------------------------


def test_the_client_librarys_own_follower_hears_every_change(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    heard: list[tuple[str, str]] = []
    follower = client.BucketFollower(
        endpoint=local_hub.url,
        bucket_id=hub_bucket.address.removeprefix("hf://buckets/").removesuffix("/run"),
        token=TOKEN,
        on_changes=lambda changes: heard.extend((change.path, change.op) for change in changes),
        on_reconcile=lambda: None,
        is_alive=lambda: True,
    )
    follower.start()
    until(lambda: follower.subscribed)
    hub_bucket.commit("head.json", b"1")
    hub_bucket.commit("head.json", b"2")
    hub_bucket.delete(["head.json"])
    until(lambda: len(heard) >= 3)
    follower.stop()
    local_hub.end_streams()
    follower.join(LONG_S)
    assert heard == [("run/head.json", op) for op in ("add", "update", "delete")]


def test_a_stream_replays_what_followed_its_cursor_or_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_KEPT", 2)
    log = events.Events()

    def first(**query: str) -> bytes:
        return next(log.stream("me/b", query))

    assert first().startswith(b"event: ready")
    for n in range(3):
        log.publish("me/b", f"2026-01-0{n + 1}", [{"path": str(n), "op": "add"}])
    log.publish("me/other", "2026-01-04", [])
    assert b'"path": "2"' in first(cursor="2")
    assert b'"path": "2"' in first(since="2026-01-03")
    assert first(cursor="4").startswith(b"event: ready")
    assert first(since="2026-02").startswith(b"event: ready")
    for cursor in ("0", "1", "99", "x"):
        assert first(cursor=cursor).startswith(b"event: reset")


def test_a_stream_without_events_shows_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PING_S", 0.01)
    stream = events.Events().stream("me/b", {})
    assert next(stream).startswith(b"event: ready")
    assert next(stream) == b": ping\n\n"


def test_events_are_served_only_to_those_who_may_read_the_bucket(hub_bucket: HubBucket) -> None:
    hub_bucket._api._token = "hf_wrong"
    stream = hub_events.stream_of(hub_bucket._api)
    assert stream is not None
    with pytest.raises(client.BucketEventsUnavailable, match="status 401"):
        next(stream(lambda: False))
