"""Promises of every bucket backend: each test runs against a directory and against a Hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hubsync.bucket import Bucket, Download, Upload
from hubsync.errors import BucketError, FormatError, ObjectCorrupt, ObjectMissing


def download(path: str, data: bytes, destination: Path) -> Download:
    return Download(path, len(data), hashlib.sha256(data).hexdigest(), destination)


def files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_objects_can_be_read_listed_and_fetched(bucket: Bucket, tmp_path: Path) -> None:
    source = tmp_path / "part"
    source.write_bytes(b"from a file")
    bucket.put([Upload("deltas/a.bin", source), Upload("deltas/b.bin", b"from memory"), Upload("empty", b"")])

    assert bucket.read(["deltas/a.bin", "deltas/b.bin", "empty"]) == {
        "deltas/a.bin": b"from a file",
        "deltas/b.bin": b"from memory",
        "empty": b"",
    }
    assert [(s.path, s.size) for s in bucket.list()] == [("deltas/a.bin", 11), ("deltas/b.bin", 11), ("empty", 0)]
    fetched = tmp_path / "cache" / "a.bin"
    bucket.fetch([download("deltas/a.bin", b"from a file", fetched)])
    assert fetched.read_bytes() == b"from a file"


def test_the_beginnings_of_objects_can_be_read(bucket: Bucket) -> None:
    long = bytes(range(256)) * 1000
    bucket.put([Upload("long", long), Upload("short", b"short"), Upload("empty", b"")])
    found = bucket.beginnings({"long": 100_001, "short": 100, "empty": 9, "missing": 5})
    assert found == {"long": long[:100_001], "short": b"short", "empty": b""}
    assert bucket.beginnings({}) == {}
    # A backend without its own way reads whole objects.
    assert Bucket.beginnings(bucket, {"long": 7, "short": 100}) == {"long": long[:7], "short": b"short"}


def test_put_again_is_a_retry(bucket: Bucket) -> None:
    bucket.put([Upload("part", b"one")])
    bucket.put([Upload("part", b"one"), Upload("another", b"two")])
    assert bucket.read(["part", "another"]) == {"part": b"one", "another": b"two"}


def test_a_name_may_be_made_while_the_content_is_written(bucket: Bucket) -> None:
    for _ in range(2):  # the second is a retry
        bucket.put([Upload(lambda: "named", memoryview(b"by its hash"))])
    assert bucket.read(["named"]) == {"named": b"by its hash"}
    with pytest.raises(BucketError, match="not an object name"):
        bucket.put([Upload(lambda: "../outside", b"bytes")])


def test_put_without_objects_does_nothing(bucket: Bucket) -> None:
    bucket.put([])
    assert list(bucket.list()) == []


def test_commit_replaces_and_changes_the_etag(bucket: Bucket) -> None:
    bucket.commit("head.json", b"first")
    before = bucket.stat(["head.json"])["head.json"]
    assert bucket.stat(["head.json"])["head.json"] == before
    bucket.commit("head.json", b"other")
    after = bucket.stat(["head.json"])["head.json"]
    assert bucket.read(["head.json"]) == {"head.json": b"other"}
    assert after.etag != before.etag


def test_stat_states_when_the_storage_wrote_an_object(bucket: Bucket) -> None:
    bucket.commit("head.json", b"first")
    first = bucket.stat(["head.json"])["head.json"].modified
    bucket.commit("head.json", b"other")
    (listed,) = bucket.list()
    assert first is not None
    assert listed.modified is not None
    assert listed.modified >= first
    assert bucket.stat(["head.json"])["head.json"] == listed


def test_missing_objects_are_absent_not_errors(bucket: Bucket) -> None:
    bucket.commit("here", b"1")
    assert bucket.read(["here", "gone", "here/below"]) == {"here": b"1"}
    assert set(bucket.stat(["here", "gone", "here/below"])) == {"here"}
    assert bucket.read([]) == {}
    assert bucket.stat([]) == {}


def test_a_directory_is_not_an_object(bucket: Bucket) -> None:
    bucket.commit("epochs/one/run.json", b"1")
    assert bucket.stat(["epochs", "epochs/one"]) == {}
    assert bucket.read(["epochs", "epochs/one"]) == {}


def test_read_refuses_objects_over_the_limit(bucket: Bucket) -> None:
    bucket.commit("run.json", b"x" * 11)
    assert bucket.read(["run.json"], max_bytes=11) == {"run.json": b"x" * 11}
    with pytest.raises(FormatError, match=r"run\.json.* larger than 10 bytes"):
        bucket.read(["run.json"], max_bytes=10)


def test_list_means_directories_not_lexical_prefixes(bucket: Bucket) -> None:
    for path in ["log", "log.json", "logs/a", "logs/deep/b", "logs/deep/c", "logs_backup/d"]:
        bucket.commit(path, b"1")
    assert [s.path for s in bucket.list("logs")] == ["logs/a", "logs/deep/b", "logs/deep/c"]
    assert [s.path for s in bucket.list("logs/")] == ["logs/a", "logs/deep/b", "logs/deep/c"]
    assert [s.path for s in bucket.list("logs", recursive=False)] == ["logs/a", "logs/deep/"]
    assert [s.path for s in bucket.list(recursive=False)] == ["log", "log.json", "logs/", "logs_backup/"]
    assert list(bucket.list("nothing")) == []
    assert list(bucket.list("logs/a")) == []


def test_delete_is_idempotent_and_leaves_no_directory_in_the_list(bucket: Bucket) -> None:
    bucket.put([Upload("epochs/one/part", b"1"), Upload("kept", b"2")])
    bucket.delete(["epochs/one/part", "never/was"])
    bucket.delete(["epochs/one/part"])
    bucket.delete([])
    assert [s.path for s in bucket.list(recursive=False)] == ["kept"]


def test_fetch_of_a_missing_object_leaves_nothing(bucket: Bucket, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ObjectMissing, match="gone"):
        bucket.fetch([download("gone", b"1", cache / "gone")])
    assert files_below(cache) == []


@pytest.mark.parametrize("expected", [b"other bytes", b"other", b""], ids=["same-size", "shorter", "empty"])
def test_fetch_of_other_bytes_leaves_nothing(bucket: Bucket, tmp_path: Path, expected: bytes) -> None:
    bucket.put([Upload("part", b"these bytes")])
    with pytest.raises(ObjectCorrupt, match="part"):
        bucket.fetch([download("part", expected, tmp_path / "cache" / "part")])
    assert files_below(tmp_path / "cache") == []


def test_fetch_replaces_wrong_bytes_and_keeps_right_ones(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put([Upload("a", b"right a"), Upload("b", b"right b")])
    (tmp_path / "a").write_bytes(b"right a")
    (tmp_path / "b").write_bytes(b"wrong b")
    kept = (tmp_path / "a").stat().st_ino
    bucket.fetch([download("a", b"right a", tmp_path / "a"), download("b", b"right b", tmp_path / "b")])
    assert (tmp_path / "b").read_bytes() == b"right b"
    assert (tmp_path / "a").stat().st_ino == kept


@pytest.mark.parametrize(
    "path", ["../up", "a/../../up", "/etc/passwd", "a//b", "a/", "", ".", ".hidden", "a/.b", "a\\b", "a\nb", "a b", "ä"]
)
def test_what_is_not_an_object_name_is_refused_everywhere(bucket: Bucket, tmp_path: Path, path: str) -> None:
    attempts = [
        lambda: bucket.put([Upload("good", b"1"), Upload(path, b"1")]),
        lambda: bucket.commit(path, b"1"),
        lambda: bucket.read([path]),
        lambda: bucket.stat([path]),
        lambda: bucket.fetch([download(path, b"1", tmp_path / "out")]),
        lambda: bucket.delete([path]),
    ]
    for attempt in attempts:
        with pytest.raises(BucketError, match="not an object name"):
            attempt()
    assert list(bucket.list()) == []
    assert not (tmp_path / "out").exists()
