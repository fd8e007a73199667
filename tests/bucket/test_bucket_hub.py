"""A Hugging Face bucket: few API calls, verified bytes, and errors with a remedy."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import re
import time
import traceback
from pathlib import Path

import pytest
from huggingface_hub.utils import close_session

from hubsync.bucket import Bucket, Download, Upload, open_bucket
from hubsync.bucket.hub import HubBucket
from hubsync.errors import (
    BucketDenied,
    BucketError,
    BucketMissing,
    BucketUnavailable,
    ConfigError,
    ObjectCorrupt,
    ObjectMissing,
)
from hubsync.localhub import LocalHub
from tests.support.fixtures_hub import READ_ONLY_TOKEN, TOKEN

FOREVER = 1000


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens pauses between attempts, and the time that failed requests are repeated."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr("hubsync.bucket.hub.OPEN_SECONDS", 0.3)
    monkeypatch.setattr("hubsync.bucket.hub_api.PATIENCE_SECONDS", 0.3)


def download(path: str, data: bytes, destination: Path) -> Download:
    return Download(path, len(data), hashlib.sha256(data).hexdigest(), destination)


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


# --- API calls ----------------------------------------------------------------------------------------


def calls(hub: LocalHub, action: object) -> int:
    hub.reset()
    action()  # type: ignore[operator]
    return hub.api_calls()


def test_each_method_makes_the_stated_number_of_api_calls(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path
) -> None:
    parts = {f"deltas/{n}": os.urandom(100) for n in range(20)}
    puts = [Upload(path, data) for path, data in parts.items()]
    gets = [download(path, data, tmp_path / path) for path, data in parts.items()]
    hub_bucket.commit("before", b"{}")  # with tokens of the storage, which last
    hub_bucket.read(["before"])
    measured = {
        "open": calls(local_hub, lambda: HubBucket(hub_bucket.address, token=TOKEN, endpoint=local_hub.url)),
        "put": calls(local_hub, lambda: hub_bucket.put(puts)),
        "commit": calls(local_hub, lambda: hub_bucket.commit("head.json", os.urandom(10))),
        "read": calls(local_hub, lambda: hub_bucket.read(["head.json", *parts])),
        "stat": calls(local_hub, lambda: hub_bucket.stat(["head.json"])),
        "list": calls(local_hub, lambda: hub_bucket.list("deltas", recursive=False)),
        "fetch": calls(local_hub, lambda: hub_bucket.fetch(gets)),
        "delete": calls(local_hub, lambda: hub_bucket.delete(list(parts))),
        "now": calls(local_hub, hub_bucket.now),
    }
    assert measured == HubBucket.API_CALLS
    assert HubBucket.API_CALLS["stat"] == 1  # the idle poll


def test_the_time_is_the_hubs(hub_bucket: HubBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not this machine's clock."""
    date = "Thu, 26 Nov 2026 00:00:00 GMT"
    monkeypatch.setattr("http.server.BaseHTTPRequestHandler.date_time_string", lambda *_: date)
    assert hub_bucket.now() == 1795651200.0


def test_a_publish_makes_six_api_calls_and_two_transfers(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    """`ChainWriter.commit_draft`, in the 30 s after the last one. A token for an hour or so is one call more."""
    documents = {"epochs/1/versions/1.json": os.urandom(100), "head.json": os.urandom(100)}

    def publish() -> None:
        hub_bucket.put([Upload(f"epochs/1/deltas/{n}", os.urandom(1000)) for n in range(4)])
        hub_bucket.expect(documents)
        hub_bucket.stat(["before"])
        hub_bucket.list("epochs", recursive=False)
        for path, data in documents.items():
            hub_bucket.commit(path, data)

    hub_bucket.commit("before", b"{}")
    assert calls(local_hub, publish) == 6
    assert local_hub.requests()["POST /v1/shards"] == 2
    assert hub_bucket.read(list(documents)) == documents


def test_an_unchanged_document_is_looked_up_and_not_downloaded(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.commit("head.json", b"first")
    assert hub_bucket.read(["head.json"]) == {"head.json": b"first"}
    assert calls(local_hub, lambda: hub_bucket.read(["head.json"])) == 1
    assert sum(local_hub.requests().values()) == 1
    hub_bucket.commit("head.json", b"second")
    assert hub_bucket.read(["head.json"]) == {"head.json": b"second"}


def test_a_token_of_the_storage_that_it_rejects_is_asked_for_again(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.commit("one", b"1")
    local_hub.fail("/v1/", status=403, times=100)
    with pytest.raises(BucketError):
        hub_bucket.commit("two", b"2")
    local_hub.reset()
    assert calls(local_hub, lambda: hub_bucket.commit("two", b"2")) == 2


def test_fetching_existing_files_makes_no_request(hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"bytes")
    assert calls(local_hub, lambda: hub_bucket.fetch([download("part", b"bytes", tmp_path / "part")])) == 0


# --- addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "hf://buckets/me",
        "hf://buckets/me/name",
        "hf://buckets/me/name/",
        "hf://me/name/run",
        "hf://buckets/me/../name/run",
        "hf://buckets/me/name/run//x",
        "hf://buckets/me/name/.run",
    ],
)
def test_an_address_of_another_form_is_explained(address: str) -> None:
    with pytest.raises(ConfigError, match=r"hf://buckets/<namespace>/<name>/<run> .* directory"):
        open_bucket(address)


def test_runs_of_one_bucket_are_apart(local_hub: LocalHub, hub_address: str) -> None:
    one, two = (HubBucket(hub_address + name, create=True, token=TOKEN, endpoint=local_hub.url) for name in ("", "-2"))
    one.commit("head.json", b"one")
    two.commit("head.json", b"two")
    assert [s.path for s in one.list()] == ["head.json"]
    assert one.read(["head.json"]) == {"head.json": b"one"}


def test_the_endpoint_of_the_environment_is_used(
    local_hub: LocalHub, hub_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", local_hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    open_bucket(hub_address, create=True).commit("head.json", b"1")
    assert open_bucket(hub_address).read(["head.json"]) == {"head.json": b"1"}


# --- access -------------------------------------------------------------------------------------------


def test_a_missing_bucket_says_how_to_create_it(local_hub: LocalHub, hub_address: str) -> None:
    with pytest.raises(BucketMissing, match=r"hf buckets create me/\w+ --private"):
        open_bucket(hub_address, token=TOKEN, endpoint=local_hub.url)


@pytest.mark.parametrize("create", [False, True])
def test_a_bad_token_says_how_to_log_in(local_hub: LocalHub, hub_address: str, create: bool) -> None:
    with pytest.raises(BucketDenied, match="hf auth login"):
        open_bucket(hub_address, create=create, token="hf_unknown", endpoint=local_hub.url)


def test_a_bucket_is_created_private(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(BucketDenied, match="or none is set"):
        open_bucket(hub_bucket.address, endpoint=local_hub.url)


def test_a_bucket_of_somebody_else_is_missing_and_their_namespace_denied(tmp_path: Path) -> None:
    with LocalHub(tmp_path, tokens={"hf_ann": "ann", "hf_bob": "bob"}) as hub:
        open_bucket("hf://buckets/ann/mine/run", create=True, token="hf_ann", endpoint=hub.url)
        with pytest.raises(BucketMissing, match="or the token cannot see it"):
            open_bucket("hf://buckets/ann/mine/run", token="hf_bob", endpoint=hub.url)
        for name in ("mine", "new"):
            with pytest.raises(BucketDenied, match="write access to ann"):
                open_bucket(f"hf://buckets/ann/{name}/run", create=True, token="hf_bob", endpoint=hub.url)


def test_a_read_only_token_reads_and_is_denied_writing(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.commit("head.json", b"1")
    reader = open_bucket(hub_bucket.address, token=READ_ONLY_TOKEN, endpoint=local_hub.url)
    assert reader.read(["head.json"]) == {"head.json": b"1"}
    for attempt in (
        lambda: reader.commit("head.json", b"2"),
        lambda: reader.put([Upload("part", b"2")]),
        lambda: reader.delete(["head.json"]),
    ):
        with pytest.raises(BucketDenied, match="write access to me"):
            attempt()
    assert hub_bucket.read(["head.json"]) == {"head.json": b"1"}


def test_a_bucket_that_vanishes_is_missing_for_every_method(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path
) -> None:
    local_hub.fail("/api/buckets/", status=404, headers={"X-Error-Code": "RepoNotFound"}, times=FOREVER)
    for attempt in (
        lambda: hub_bucket.put([Upload("part", b"1")]),
        lambda: hub_bucket.commit("head.json", b"1"),
        lambda: hub_bucket.read(["head.json"]),
        lambda: hub_bucket.stat(["head.json"]),
        lambda: hub_bucket.list(),
        lambda: hub_bucket.fetch([download("part", b"1", tmp_path / "part")]),
        lambda: hub_bucket.delete(["head.json"]),
    ):
        with pytest.raises(BucketMissing):
            attempt()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "hf://buckets/me/rl/lr=1e-6,seed=0",
            "The part 'lr=1e-6,seed=0' of the run must have letters, digits and ._=+@-",
        ),
        ("hf://buckets/me/r l/run", "The bucket name 'r l' must have letters, digits and ._-"),
    ],
)
def test_an_address_with_other_characters_says_which_are_allowed(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        open_bucket(address)


# --- an unreliable Hub --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 503}, {"drop": True}], ids=["429", "503", "drop"])
@pytest.mark.parametrize(
    "where",
    [
        "POST /api/buckets/.*/paths-info",
        "POST /api/buckets/.*/batch",
        "xet-.*-token",
        "/v1/xorbs",
        "/v1/shards",
        "GET /xorbs",
    ],
)
@pytest.mark.usefixtures("no_waiting")
def test_one_failure_is_retried_unnoticed(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path, where: str, fault: dict
) -> None:
    data = os.urandom(2000)
    local_hub.fail(where, times=1, **fault)
    hub_bucket.put([Upload("part", data)])
    hub_bucket.fetch([download("part", data, tmp_path / "part")])
    assert (tmp_path / "part").read_bytes() == data
    assert local_hub.faults_left() == 0


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}], ids=["503", "drop"])
@pytest.mark.usefixtures("no_waiting")
def test_opening_is_retried_too(hub_bucket: HubBucket, local_hub: LocalHub, create: bool, fault: dict) -> None:
    local_hub.fail("/api/buckets/", times=2, **fault)
    open_bucket(hub_bucket.address, create=create, token=TOKEN, endpoint=local_hub.url).stat(["head.json"])
    assert local_hub.faults_left() == 0


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 500}, {"drop": True}], ids=["429", "500", "drop"])
@pytest.mark.usefixtures("no_waiting")
def test_a_failure_without_end_is_unavailable(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path, fault: dict
) -> None:
    hub_bucket.put([Upload("part", b"bytes")])
    local_hub.fail(".", times=FOREVER, **fault)
    for attempt in (
        lambda: open_bucket(hub_bucket.address, token=TOKEN, endpoint=local_hub.url),
        lambda: open_bucket(hub_bucket.address, token=TOKEN, endpoint=local_hub.url, create=True),
        lambda: hub_bucket.put([Upload("another", os.urandom(100))]),
        lambda: hub_bucket.commit("head.json", b"1"),
        lambda: hub_bucket.read(["part"]),
        lambda: hub_bucket.stat(["part"]),
        lambda: hub_bucket.list(),
        lambda: hub_bucket.fetch([download("part", b"bytes", tmp_path / "part")]),
        lambda: hub_bucket.delete(["part"]),
    ):
        with pytest.raises(BucketUnavailable, match="later"):
            attempt()
    assert files_below(tmp_path / "cache") == []
    local_hub.reset()
    assert [s.path for s in hub_bucket.list()] == ["part"]


@pytest.mark.usefixtures("no_waiting")
def test_an_unreachable_hub_is_named(hub_bucket: HubBucket) -> None:
    with pytest.raises(BucketUnavailable, match=r"no connection to the Hub at http://127.0.0.1:9 "):
        open_bucket(hub_bucket.address, token=TOKEN, endpoint="http://127.0.0.1:9")  # nothing listens there


def test_a_proxy_that_applies_to_this_machine_is_named(
    hub_bucket: HubBucket, monkeypatch: pytest.MonkeyPatch, no_waiting: None
) -> None:
    monkeypatch.setenv("http_proxy", "http://user:SECRET@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    close_session()  # it reads the environment when it is made
    try:
        with pytest.raises(
            BucketUnavailable, match=r"requests go through http://\*\*\*@127.0.0.1:9.*Set NO_PROXY"
        ) as raised:
            open_bucket(hub_bucket.address, token=TOKEN, endpoint="http://localhost:8418")
    finally:
        monkeypatch.undo()
        close_session()
    assert "SECRET" not in "".join(traceback.format_exception(raised.value))


def test_a_request_limit_says_when_it_ends(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    local_hub.limit(0, seconds=300)
    with pytest.raises(BucketUnavailable, match=r"limits requests .* allows the next one in 30[01] s"):
        hub_bucket.stat(["head.json"])


def test_a_request_limit_that_ends_soon_is_waited_for(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    local_hub.limit(1, seconds=0.5)
    for _ in range(2):
        assert hub_bucket.stat(["head.json"]) == {}


def test_no_error_shows_a_token_or_a_password(
    hub_address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, no_waiting: None
) -> None:
    """Every method against every kind of failure, with a password in the Hub's URL."""
    with LocalHub(tmp_path / "hub") as hub:
        endpoint = hub.url.replace("http://", "http://user:SECRET-PASSWORD@")
        bucket = HubBucket(hub_address, create=True, token=TOKEN, endpoint=endpoint)
        bucket.put([Upload("part", b"bytes")])
        attempts = (
            lambda: open_bucket(hub_address, token=TOKEN, endpoint=endpoint),
            lambda: bucket.commit("head.json", os.urandom(99)),
            lambda: bucket.read(["part"]),
            lambda: bucket.list(),
            lambda: bucket.fetch([download("part", b"bytes", tmp_path / "part")]),
            lambda: bucket.now(),
        )
        said = [repr(bucket)]
        for fault in (
            {"status": 401},
            {"status": 403},
            {"status": 404},
            {"status": 418},
            {"status": 503},
            {"drop": True},
        ):
            for where, attempt in itertools.product(("/api/", "/v1/|/v2/|/xorbs"), attempts):
                hub.reset()
                hub.fail(where, times=FOREVER, **fault)
                try:
                    attempt()
                except BucketError as error:
                    said += ["".join(traceback.format_exception(error))]
    assert len(said) > 40
    for secret in ("SECRET-PASSWORD", TOKEN, "xet_read", "xet_write"):
        assert [text for text in [*said, caplog.text] if secret in text] == []


@pytest.mark.parametrize("where", ["GET /xorbs", "/v2/reconstructions"])
@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}], ids=["503", "drop"])
def test_storage_that_is_down_leaves_no_file(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path, where: str, fault: dict
) -> None:
    data = os.urandom(2000)
    hub_bucket.put([Upload("part", data)])
    local_hub.fail(where, times=FOREVER, **fault)
    with pytest.raises(BucketUnavailable):
        hub_bucket.fetch([download("part", data, tmp_path / "cache" / "part")])
    assert files_below(tmp_path / "cache") == []


@pytest.mark.usefixtures("no_waiting")
def test_a_commit_whose_answers_are_lost_is_read_back(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.commit("head.json", b"old")
    local_hub.fail("/batch", lose_answer=True, times=FOREVER)
    hub_bucket.commit("head.json", b"new")
    assert hub_bucket.read(["head.json"]) == {"head.json": b"new"}


@pytest.mark.usefixtures("no_waiting")
def test_a_commit_that_never_arrived_is_unavailable(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.commit("head.json", b"old and longer")
    local_hub.fail("/batch", drop=True, times=FOREVER)
    with pytest.raises(BucketUnavailable):
        hub_bucket.commit("head.json", b"new")
    assert hub_bucket.read(["head.json"]) == {"head.json": b"old and longer"}


@pytest.mark.usefixtures("no_waiting")
def test_a_delete_whose_first_answer_is_lost_has_worked(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.put([Upload("a", b"1"), Upload("b", b"2")])
    local_hub.fail("/batch", lose_answer=True)
    hub_bucket.delete(["a", "b"])
    assert hub_bucket.list() == []


def test_a_refused_delete_is_an_error(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.put([Upload("a", b"1"), Upload("kept", b"2")])
    local_hub.refuse("kept")
    with pytest.raises(BucketError, match="refused run/kept"):
        hub_bucket.delete(["a", "kept"])
    assert [s.path for s in hub_bucket.list()] == ["kept"]


def test_a_partly_refused_batch_names_what_was_refused(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    local_hub.refuse("broken")
    with pytest.raises(BucketError, match=r"refused run/broken-1 \(.*\), run/broken-2 \(.*\)"):
        hub_bucket.put([Upload(path, b"1") for path in ("broken-1", "fine", "broken-2")])
    assert [s.path for s in hub_bucket.list()] == ["fine"]


def test_a_batch_that_loses_a_file_silently_is_noticed(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    local_hub.refuse("lost", silently=True)
    with pytest.raises(BucketUnavailable, match="reported success twice, but lost is not visible"):
        hub_bucket.put([Upload(path, b"1") for path in ("fine", "lost")])


# --- damaged bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [os.urandom(5000), b"compressible" * 5000], ids=["stored", "compressed"])
def test_damaged_bytes_are_refused_and_leave_no_file(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path, data: bytes
) -> None:
    hub_bucket.put([Upload("good", b"untouched"), Upload("part", data)])
    local_hub.fail("GET /xorbs", corrupt=True, times=FOREVER)
    with pytest.raises(ObjectCorrupt, match=r"part.*hubsync verify"):
        hub_bucket.fetch([download("part", data, tmp_path / "cache" / "part")])
    assert files_below(tmp_path / "cache") == []


def test_bytes_damaged_once_in_transit_are_fetched_again(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path
) -> None:
    data = os.urandom(5000)
    hub_bucket.put([Upload("part", data)])
    local_hub.fail("GET /xorbs", corrupt=True, times=1)
    hub_bucket.fetch([download("part", data, tmp_path / "part")])
    assert (tmp_path / "part").read_bytes() == data


def test_one_damaged_file_does_not_spoil_the_others(hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path) -> None:
    parts = {name: os.urandom(3000) for name in ("a", "b")}
    for name, data in parts.items():  # each in a xorb of its own
        hub_bucket.put([Upload(name, data)])
    wrong = download("b", os.urandom(3000), tmp_path / "b")
    with pytest.raises(ObjectCorrupt, match=r"^b in"):
        hub_bucket.fetch([download("a", parts["a"], tmp_path / "a"), wrong])
    assert files_below(tmp_path) == [tmp_path / "a"]


def test_content_that_the_hub_lost_is_missing(hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path) -> None:
    data = os.urandom(3000)
    hub_bucket.put([Upload("part", data)])
    local_hub.fail("/reconstructions/", status=404, times=FOREVER)
    with pytest.raises(ObjectMissing, match="lost the content"):
        hub_bucket.fetch([download("part", data, tmp_path / "cache" / "part")])
    assert files_below(tmp_path / "cache") == []


# --- processes ----------------------------------------------------------------------------------------


def publish_elsewhere(address: str, endpoint: str, writer: int) -> None:
    bucket: Bucket = open_bucket(address, token=TOKEN, endpoint=endpoint)
    for turn in range(3):
        bucket.put([Upload(f"{writer}/{turn}", hashlib.shake_128(f"{writer} {turn}".encode()).digest(300_000))])
        bucket.commit("head.json", hashlib.shake_128(f"head {writer} {turn}".encode()).digest(1000))


def test_a_third_process_reads_the_bytes_of_two_writers(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path
) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [
        spawn.Process(target=publish_elsewhere, args=(hub_bucket.address, local_hub.url, writer)) for writer in (1, 2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]

    expected = {f"{w}/{t}": hashlib.shake_128(f"{w} {t}".encode()).digest(300_000) for w in (1, 2) for t in range(3)}
    hub_bucket.fetch([download(path, data, tmp_path / path) for path, data in expected.items()])
    assert {path: (tmp_path / path).read_bytes() for path in expected} == expected
    last = {hashlib.shake_128(f"head {w} 2".encode()).digest(1000) for w in (1, 2)}
    assert hub_bucket.read(["head.json"])["head.json"] in last
