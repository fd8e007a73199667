"""`hubsync serve`: a rollback from the command line, with and without a running trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubsync.bucket import Bucket, LocalBucket, SignedBucket, open_bucket
from hubsync.chain import ChainReader, ChainWriter, Layout
from hubsync.chain.serving import serve
from hubsync.cli.main import main
from hubsync.errors import ChainError, Fenced
from hubsync.format.keys import SigningKey
from hubsync.localhub import LocalHub
from tests.support.faults import FaultyBucket
from tests.support.fixtures_hub import TOKEN
from tests.support.history import History


@pytest.fixture
def history(history: History) -> History:
    for _ in range(4):
        history.publish()
    return history


def served(history: History, cache: Path) -> int:
    return history.reader(cache).served().version


def test_a_follower_goes_back_and_forward_with_the_command(
    local_hub: LocalHub, hub_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", local_hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    history = History(open_bucket(hub_address, create=True))
    for _ in range(4):
        history.publish()
    follower = history.reader(tmp_path / "follower")
    at = follower.served()
    for word, version in (("2", 2), ("newest", 4), ("0", 0), ("3", 3)):
        assert main(["serve", hub_address, word]) == 0
        assert follower.served().version == version
        assert follower.newest().version == 4
        at = history.go(follower, at, follower.served().version, base=False).target
    assert at.version == 3


def test_the_trainer_goes_on_and_is_served_again(history: History, tmp_path: Path) -> None:
    assert main(["serve", history.bucket.address, "2"]) == 0
    fifth = history.publish()
    assert served(history, tmp_path / "cache") == fifth.version == 5


def test_versions_that_are_only_saved_keep_the_chosen_version(history: History, tmp_path: Path) -> None:
    assert main(["serve", history.bucket.address, "2"]) == 0
    history.publish(serve=False)
    assert served(history, tmp_path / "cache") == 2
    history.bucket.delete([Layout.HEAD])
    assert served(history, tmp_path / "fresh") == 2


def test_a_restarted_trainer_keeps_the_chosen_version(history: History, tmp_path: Path) -> None:
    assert main(["serve", history.bucket.address, "2"]) == 0
    assert ChainWriter.resume(history.bucket, history.table).serving == 2
    assert served(history, tmp_path / "cache") == 2


def test_a_fenced_trainer_publishes_nothing_more(history: History, tmp_path: Path) -> None:
    assert main(["serve", history.bucket.address, "2", "--fence"]) == 0
    with pytest.raises(Fenced):
        history.publish()
    assert served(history, tmp_path / "cache") == 2


def test_an_unknown_version_changes_and_fences_nothing(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", history.bucket.address, "9", "--fence"]) == 1
    assert "NoPath: version 9 is not in" in capsys.readouterr().err
    assert history.publish().version == 5
    for wrong in ("-1", "old", ""):
        with pytest.raises(SystemExit):
            main(["serve", history.bucket.address, wrong])


def test_a_run_without_versions_is_refused(tmp_path: Path) -> None:
    history = History(LocalBucket(tmp_path / "empty", create=True))
    with pytest.raises(ChainError, match="no version to serve yet"):
        serve(history.bucket, history.reader(tmp_path / "cache"), None)


@pytest.mark.parametrize("versions", [1, 100], ids=["one", "one after the other"])
def test_a_version_committed_meanwhile_is_handled(history: History, tmp_path: Path, versions: int) -> None:
    bucket = FaultyBucket(history.bucket)
    left = iter(range(versions))

    def publish(path: str) -> None:
        if next(left, None) is not None:
            history.publish()

    bucket.before_commit = publish
    reader = ChainReader(bucket, tmp_path / "cache")
    if versions == 1:
        assert serve(bucket, reader, 2).version == served(history, tmp_path / "other") == 2
        assert history.reader(tmp_path / "other").newest().version == 5
    else:
        with pytest.raises(ChainError, match="committed a version during each"):
            serve(bucket, reader, 2)


def test_the_served_version_of_a_signed_run_needs_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = SigningKey.generate()
    key.save(tmp_path / "key")
    plain: Bucket = LocalBucket(tmp_path / "bucket", create=True)
    history = History(SignedBucket(plain, key), public_key=key.public.hex)
    for _ in range(3):
        history.publish()
    assert main(["serve", plain.address, "1"]) == 1
    assert "this run is signed" in capsys.readouterr().err
    assert served(history, tmp_path / "cache") == 3
    assert main(["serve", plain.address, "1", "--signing-key", str(tmp_path / "key")]) == 0
    assert served(history, tmp_path / "cache") == 1
