"""A Hub that accepts a connection and says nothing: every wait ends, with an error that says so."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubsync.bucket import Download, Upload, abandonable, open_bucket
from hubsync.bucket.hub import HubBucket
from hubsync.errors import BucketUnavailable
from hubsync.localhub import LocalHub
from tests.support.fixtures_hub import TOKEN

FOREVER = 10_000


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubsync.bucket.hub_api.SILENCE_SECONDS", 0.3)
    monkeypatch.setattr("hubsync.bucket.hub_api.ANSWER_SECONDS", 1.0)
    monkeypatch.setattr("hubsync.bucket.hub_api.PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("hubsync.bucket.hub.OPEN_SECONDS", 0.2)
    monkeypatch.setattr("hubsync.bucket.xet.STALL_SECONDS", 1.5)


@pytest.fixture(autouse=True)
def no_thread_stays(local_hub: LocalHub) -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "hubsync-transfer"] == []


def download(path: str, data: bytes, destination: Path) -> Download:
    return Download(path, len(data), hashlib.sha256(data).hexdigest(), destination)


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_a_silent_hub_is_unavailable_for_every_method(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path
) -> None:
    local_hub.fail(".", silent=True, times=FOREVER)
    for attempt in (
        lambda: open_bucket(hub_bucket.address, token=TOKEN, endpoint=local_hub.url),
        lambda: open_bucket(hub_bucket.address, token=TOKEN, endpoint=local_hub.url, create=True),
        lambda: hub_bucket.put([Upload("part", b"1")]),
        lambda: hub_bucket.commit("head.json", b"1"),
        lambda: hub_bucket.read(["head.json"]),
        lambda: hub_bucket.stat(["head.json"]),
        lambda: hub_bucket.list(),
        lambda: hub_bucket.fetch([download("part", b"1", tmp_path / "part")]),
        lambda: hub_bucket.delete(["head.json"]),
        lambda: hub_bucket.now(),
    ):
        with pytest.raises(BucketUnavailable, match=r"the Hub at http://127.* says nothing.*Try again later"):
            attempt()
    assert hub_bucket.copy_in("me/model", "main", {"model.safetensors": "copy"}) is None
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("where", ["/batch", "/paths-info", "/tree", "xet-.*-token"])
def test_one_silence_is_retried_unnoticed(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("hubsync.bucket.hub_api.PATIENCE_SECONDS", 20.0)
    local_hub.fail(where, silent=True)
    hub_bucket.put([Upload("part", b"bytes")])
    assert hub_bucket.read(["part"]) == {"part": b"bytes"}
    assert [s.path for s in hub_bucket.list()] == ["part"]
    assert local_hub.faults_left() == 0


@pytest.mark.parametrize("where", ["POST /v1/xorbs", "POST /v1/shards"])
def test_an_upload_to_a_silent_storage_is_given_up_and_changes_nothing(
    hub_bucket: HubBucket, local_hub: LocalHub, where: str
) -> None:
    local_hub.fail(where, silent=True, times=FOREVER)
    data = os.urandom(3000)
    for attempt in (lambda: hub_bucket.put([Upload("part", data)]), lambda: hub_bucket.commit("head.json", data)):
        with pytest.raises(BucketUnavailable, match=r"cannot write .* has moved no byte for 2 s .* Try again later"):
            attempt()
    local_hub.reset()
    assert hub_bucket.list() == []
    hub_bucket.put([Upload("part", data)])  # the same process, once the storage answers again
    assert hub_bucket.read(["part"]) == {"part": data}


@pytest.mark.parametrize("where", ["/v2/reconstructions", "GET /xorbs"])
def test_a_download_from_a_silent_storage_is_given_up_and_leaves_no_file(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path, where: str
) -> None:
    data = os.urandom(3000)
    hub_bucket.put([Upload("part", data)])
    local_hub.fail(where, silent=True, times=FOREVER)
    for attempt in (
        lambda: hub_bucket.fetch([download("part", data, tmp_path / "part")]),
        lambda: hub_bucket.read(["part"]),
    ):
        with pytest.raises(BucketUnavailable, match=r"cannot read .* has moved no byte for 2 s"):
            attempt()
    assert files_below(tmp_path) == []
    local_hub.reset()
    hub_bucket.fetch([download("part", data, tmp_path / "part")])
    assert (tmp_path / "part").read_bytes() == data


@pytest.mark.parametrize("where", ["POST /v1/xorbs", "GET /xorbs"])
def test_a_slow_transfer_that_moves_is_not_given_up(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path, where: str
) -> None:
    """Six seconds, four times as long as a silence may last."""
    data = os.urandom(6_000_000)
    local_hub.fail(where, pace=1e6, times=FOREVER)
    hub_bucket.put([Upload("part", data)])
    hub_bucket.fetch([download("part", data, tmp_path / "part")])
    assert (tmp_path / "part").read_bytes() == data


@pytest.mark.parametrize("where", ["POST /v1/xorbs", "GET /xorbs"])
def test_a_transfer_that_trickles_for_ever_is_given_up(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It never pauses for long. Limits are as if 16 kB/s were 10 MB/s."""
    monkeypatch.setattr("hubsync.bucket.xet._LEAST_SPEED", 10_000_000)
    monkeypatch.setattr("hubsync.bucket.xet._BUFFER", 0)
    monkeypatch.setattr("hubsync.bucket.xet._EACH_SECONDS", 0.0)
    data = os.urandom(6_000_000)
    fetched, written = [download("part", data, tmp_path / "part")], [Upload("other", os.urandom(6_000_000))]
    hub_bucket.put([Upload("part", data)])
    local_hub.fail(where, pace=1e6, times=FOREVER)
    with pytest.raises(BucketUnavailable, match=r"moves less than 10000 kB/s \(.* of 6.0 MB done\)"):
        hub_bucket.fetch(fetched) if where.startswith("GET") else hub_bucket.put(written)
    assert files_below(tmp_path) == []
    assert [stat.path for stat in hub_bucket.list()] == ["part"]


def test_an_answer_that_trickles_for_ever_is_given_up(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.put([Upload(f"parts/{n}", b"") for n in range(20)])
    local_hub.fail("/tree", pace=20, times=FOREVER)
    with pytest.raises(BucketUnavailable, match="not complete after 1 s"):
        hub_bucket.list()


def test_pages_that_do_not_end_are_an_error(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = f'<{local_hub.url}/api/buckets/me/x/tree/run?recursive=true>; rel="next"'
    monkeypatch.setattr("hubsync.bucket.hub_api._MAX_PAGES", 3)
    local_hub.fail("/tree", status=200, headers={"Link": again}, times=FOREVER)
    with pytest.raises(Exception, match=r"do not end|does not answer as a Hub"):
        hub_bucket.list()


def test_threads_that_cannot_be_ended_are_limited(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the token may use the network: huggingface_hub refreshes some."""
    monkeypatch.setattr("hubsync.bucket.hub_api.SILENCE_SECONDS", 0.05)
    end = threading.Event()
    monkeypatch.setattr("hubsync.bucket.hub_api.get_token", lambda: end.wait() and None)
    bucket = open_bucket(hub_bucket.address, token=TOKEN, endpoint=local_hub.url)
    bucket._api._token = None  # type: ignore[attr-defined]
    for _ in range(abandonable.MOST):
        with pytest.raises(BucketUnavailable, match="cannot read the Hub's token: no answer for 0 s"):
            bucket.stat(["head.json"])
    for attempt in (lambda: bucket.stat(["head.json"]), lambda: hub_bucket.commit("head.json", b"1")):
        with pytest.raises(BucketUnavailable, match="8 earlier transfers hang"):
            attempt()
    end.set()
    for thread in threading.enumerate():
        if thread.name == "hubsync-call":
            thread.join()
    hub_bucket.commit("head.json", b"1")


def test_errors_of_a_call_with_a_deadline_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        abandonable.within(10, lambda: 1 / 0, "divide")
    assert abandonable.within(10, lambda: 5, "count") == 5


EXIT = """
import os, sys, threading, time
from hubsync.bucket import Upload, open_bucket

bucket = open_bucket(sys.argv[1], token="hf_writer", endpoint=sys.argv[2])
def publish():
    bucket.put([Upload("part", os.urandom(3000))])
threading.Thread(target=publish, daemon=True).start()
while not any(thread.name == "hubsync-transfer" for thread in threading.enumerate()):
    time.sleep(0.01)
time.sleep(0.5)
print("ends", flush=True)
"""


def test_a_process_ends_while_a_transfer_is_silent(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    local_hub.fail("POST /v1/xorbs", silent=True, times=FOREVER)
    command = [sys.executable, "-c", EXIT, hub_bucket.address, local_hub.url]
    ended = subprocess.run(command, timeout=50, capture_output=True, text=True, check=True)
    assert ended.stdout == "ends\n"
