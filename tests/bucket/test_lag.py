"""A Hub whose names become visible late: writes are waited for, reads are old but whole."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubsync.bucket import Download, Upload
from hubsync.bucket.hub import HubBucket
from hubsync.errors import BucketUnavailable, ObjectMissing
from hubsync.localhub import LocalHub
from tests.support.fixtures_hub import TOKEN


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubsync.bucket.hub.LAG_SECONDS", 20.0)
    monkeypatch.setattr("hubsync.bucket.hub._RESEND_SECONDS", 10.0)
    monkeypatch.setattr("hubsync.bucket.hub._MISSING_SECONDS", 10.0)


def seen(hub: LocalHub, bucket: HubBucket) -> dict[str, int]:
    """Names and sizes by a client without patience."""
    bucket_id = "/".join(bucket.address.split("/")[3:5])
    api = HfApi(endpoint=hub.url, token=TOKEN)
    listed = {entry.path: entry.size for entry in api.list_bucket_tree(bucket_id, recursive=True)}  # type: ignore[union-attr]
    assert {f.path: f.size for f in api.get_bucket_paths_info(bucket_id, ["run/a", "run/b"])} == listed
    return listed


def test_a_delayed_hub_shows_writes_late_and_in_order(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    hub_bucket.commit("a", b"1")
    local_hub.lag(1000)
    hub_bucket.commit("a", b"22")
    hub_bucket.commit("b", b"333")
    assert seen(local_hub, hub_bucket) == {"run/a": 1}
    hub_bucket.delete(["a"])
    assert hub_bucket.read(["a", "b"]) == {"a": b"1"}
    local_hub.reset()
    assert seen(local_hub, hub_bucket) == {"run/b": 3}


def test_only_matching_names_are_delayed(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    local_hub.lag(1000, "b$")
    hub_bucket.commit("a", b"1")
    hub_bucket.commit("b", b"1")
    assert seen(local_hub, hub_bucket) == {"run/a": 1}


def test_put_waits_until_its_objects_are_visible(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    local_hub.lag(0.5)
    hub_bucket.put([Upload("a", b"1"), Upload("b", b"22")])
    assert seen(local_hub, hub_bucket) == {"run/a": 1, "run/b": 2}


def test_put_of_what_stays_invisible_has_an_unknown_outcome(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubsync.bucket.hub.LAG_SECONDS", 0.6)
    monkeypatch.setattr("hubsync.bucket.hub._RESEND_SECONDS", 0.2)
    local_hub.lag(1000)
    with pytest.raises(BucketUnavailable, match=r"reported success twice, but a is not visible .* outcome is unknown"):
        hub_bucket.put([Upload("a", b"1")])
    local_hub.reset()
    assert hub_bucket.read(["a"]) == {"a": b"1"}


def test_objects_that_a_batch_lost_are_written_again(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large uploads have lost names while the Hub reported success."""
    monkeypatch.setattr("hubsync.bucket.hub._RESEND_SECONDS", 0.2)
    local_hub.refuse("run/b", silently=True, times=1)
    hub_bucket.put([Upload("a", b"1"), Upload("b", b"22")])
    assert seen(local_hub, hub_bucket) == {"run/a": 1, "run/b": 2}


def test_a_commit_whose_answer_is_lost_is_looked_up_until_it_is_visible(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubsync.bucket.hub_api.PATIENCE_SECONDS", 0.0)
    hub_bucket.commit("a", b"old")
    local_hub.lag(0.5)
    local_hub.fail("/batch", lose_answer=True)
    hub_bucket.commit("a", b"newer")
    assert seen(local_hub, hub_bucket) == {"run/a": 5}


def test_fetch_waits_for_objects_that_a_manifest_names(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path
) -> None:
    local_hub.lag(0.5)
    hub_bucket.commit("a", b"1")
    hub_bucket.fetch([Download("a", 1, hashlib.sha256(b"1").hexdigest(), tmp_path / "a")])
    assert (tmp_path / "a").read_bytes() == b"1"


def test_fetch_of_what_stays_invisible_is_missing(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubsync.bucket.hub._MISSING_SECONDS", 0.3)
    with pytest.raises(ObjectMissing):
        hub_bucket.fetch([Download("a", 1, hashlib.sha256(b"1").hexdigest(), tmp_path / "a")])


@pytest.mark.parametrize("private", [True, False])
def test_an_existing_public_bucket_is_not_used_in_silence(
    local_hub: LocalHub, hub_address: str, caplog: pytest.LogCaptureFixture, private: bool
) -> None:
    name = "/".join(hub_address.split("/")[3:5])
    HfApi(endpoint=local_hub.url, token=TOKEN).create_bucket(name, private=private)
    with caplog.at_level(logging.WARNING):
        HubBucket(hub_address, create=True, token=TOKEN, endpoint=local_hub.url)
    assert ("is public: everybody can read" in caplog.text) == (not private)
