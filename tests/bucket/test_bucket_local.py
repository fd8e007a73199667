"""A directory as a bucket: atomic for every process that shares it, durable, and confined to its root."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hubsync.bucket import LocalBucket, Upload, open_bucket
from hubsync.errors import BucketDenied, BucketError, BucketMissing, ConfigError

SPAWN = multiprocessing.get_context("spawn")
HEAD_BYTES = 200_000  # far above what one write call is atomic for


def test_a_missing_directory_is_created_only_on_request(tmp_path: Path) -> None:
    with pytest.raises(BucketMissing, match="start the publisher first"):
        open_bucket(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert open_bucket(str(tmp_path / "run"), create=True).address == str(tmp_path / "run")
    open_bucket(str(tmp_path / "run"))


def test_a_directory_that_disappears_is_reported_not_recreated(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path / "run", create=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    for attempt in (
        lambda: bucket.commit("head.json", b"1"),
        lambda: bucket.put([Upload("part", b"1")]),
        lambda: bucket.stat(["head.json"]),
        lambda: bucket.read(["head.json"]),
        lambda: bucket.list(),
        lambda: bucket.delete(["head.json"]),
    ):
        with pytest.raises(BucketMissing):
            attempt()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "address", ["", "  ", "s3://bucket/run", "hf:buckets/a/b", "https://huggingface.co/buckets/a/b"]
)
def test_a_malformed_address_is_explained(address: str) -> None:
    with pytest.raises(ConfigError, match=r"hf://buckets/<namespace>/<name>/<run> .* directory"):
        open_bucket(address)


@pytest.fixture
def read_only() -> Iterator[LocalBucket]:
    """A bucket that this process cannot write to. Root can write everywhere, so the process changes its user."""
    with TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        bucket = LocalBucket(Path(directory) / "run", create=True)
        (Path(directory) / "run").chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield bucket
        os.seteuid(user)
        (Path(directory) / "run").chmod(0o755)


def test_no_permission_is_denied(read_only: LocalBucket) -> None:
    with pytest.raises(BucketDenied, match="permissions"):
        read_only.commit("head.json", b"1")


def test_a_missing_source_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path / "run", create=True)
    with pytest.raises(BucketError, match="nowhere"):
        bucket.put([Upload("part", tmp_path / "nowhere")])
    assert bucket.list() == []


def test_an_object_is_immutable(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path, create=True)
    bucket.put([Upload("part", b"one")])
    with pytest.raises(BucketError, match=r"part .*immutable"):
        bucket.put([Upload("part", b"three")])
    assert bucket.read(["part"]) == {"part": b"one"}


def test_own_temporary_files_are_neither_listed_nor_kept_for_ever(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path, create=True)
    bucket.commit("head.json", b"1")
    fresh, dead = tmp_path / ".staging" / "fresh", tmp_path / ".staging" / "dead"
    for path in (fresh, dead):
        path.write_bytes(b"half of a part")
    os.utime(dead, (time.time() - 7 * 86400,) * 2)

    assert [s.path for s in bucket.list()] == ["head.json"]
    assert [s.path for s in bucket.list(recursive=False)] == ["head.json"]
    LocalBucket(tmp_path, create=True)
    assert fresh.exists()
    assert not dead.exists()


def test_a_directory_without_objects_is_not_listed(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path, create=True)
    (tmp_path / "epochs" / "one").mkdir(parents=True)
    assert bucket.list(recursive=False) == []
    assert bucket.list("epochs", recursive=False) == []


@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_a_file_is_not_a_bucket(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(BucketMissing, match="is not a directory"):
        LocalBucket(tmp_path / "file" / below, create=True)


def test_only_regular_files_are_objects(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path, create=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    assert bucket.read(["pipe", "circle"]) == bucket.stat(["pipe", "circle"]) == {}
    assert bucket.list() == []


def test_files_with_invalid_names_are_not_listed(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path, create=True)
    for name in ("with space", ".hidden", "good"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "link").symlink_to("/")
    assert [s.path for s in bucket.list()] == ["good"]


def sealed(writer: int, turn: int) -> bytes:
    body = f"{writer} {turn} ".encode() * HEAD_BYTES
    body = body[:HEAD_BYTES]
    return hashlib.sha256(body).digest() + body


def write_heads(root: str, writer: int, turns: int) -> None:
    bucket = LocalBucket(root)
    for turn in range(turns):
        bucket.commit("head.json", sealed(writer, turn))


def test_concurrent_commits_of_the_head_are_never_read_torn(tmp_path: Path) -> None:
    bucket = LocalBucket(tmp_path, create=True)
    bucket.commit("head.json", sealed(0, 0))
    writers = [SPAWN.Process(target=write_heads, args=(str(tmp_path), n, 40)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        head = bucket.read(["head.json"])["head.json"]
        assert hashlib.sha256(head[32:]).digest() == head[:32]
        seen.add(head[:32])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert bucket.read(["head.json"])["head.json"] in (sealed(1, 39), sealed(2, 39))
    assert len(seen) > 1
