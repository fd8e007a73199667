"""`hubsync repair` deletes unreadable manifests, and the run continues."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubsync.bucket import LocalBucket, SignedBucket
from hubsync.chain import ChainReader, Compactor, Layout
from hubsync.cli.main import main
from hubsync.errors import FormatError
from hubsync.format.keys import SigningKey
from hubsync.format.manifest import Head, Manifest
from tests.support.history import History


@pytest.fixture
def history(tmp_path: Path) -> History:
    history = History(LocalBucket(tmp_path / "bucket", create=True))
    for _ in range(4):
        history.publish()
    return history


def damage(history: History, manifest: Manifest) -> None:
    history.bucket.commit(Layout.manifest(manifest), b'{"format": "hubsync/1"')


def newest(history: History, tmp_path: Path) -> Manifest:
    return history.reader(tmp_path / "reader").manifest(history.writer.position.version)


def test_a_readable_run_is_not_changed(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    list(Compactor(history.bucket, history.reader(Path(history.bucket.address) / "cache")).run())
    assert main(["repair", history.bucket.address, "--delete"]) == 0
    assert capsys.readouterr().out == "all manifests are readable\n"


def test_the_newest_manifest_is_restored_from_the_head(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fourth = newest(history, tmp_path)
    damage(history, fourth)
    assert main(["repair", history.bucket.address]) == 1
    assert "00000004.json: manifest: not valid JSON" in capsys.readouterr().out
    with pytest.raises(FormatError):
        history.resume()
    assert main(["repair", history.bucket.address, "--delete"]) == 0
    history.bucket.delete([Layout.HEAD])
    assert newest(history, tmp_path) == fourth
    history.resume()
    history.publish()
    history.go(history.reader(tmp_path / "cache"), None)


def test_without_a_copy_in_the_head_the_run_continues_from_the_version_before(history: History, tmp_path: Path) -> None:
    third = history.reader(tmp_path / "reader").manifest(3).position
    damage(history, newest(history, tmp_path))
    history.bucket.delete([Layout.HEAD])
    assert main(["repair", history.bucket.address, "--delete"]) == 0
    history.resume()
    assert history.writer.position == third
    assert history.publish().version > 4
    history.go(history.reader(tmp_path / "cache"), third)


def test_an_anchor_bridges_a_deleted_manifest(history: History, tmp_path: Path) -> None:
    damage(history, history.reader(tmp_path / "reader").manifest(2))
    assert main(["repair", history.bucket.address, "--delete"]) == 0
    history.anchor(tmp_path / "anchor")
    history.go(history.reader(tmp_path / "cache"), None)


def test_a_manifest_of_a_newer_format_is_not_deleted(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Layout.manifest(newest(history, tmp_path))
    history.bucket.commit(path, b'{"format": "hubsync/99"}')
    assert main(["repair", history.bucket.address, "--delete"]) == 1
    assert "UnknownFormat" in capsys.readouterr().err
    assert path in history.bucket.stat([path])


def test_a_manifest_that_is_not_signed_with_the_key_is_deleted(tmp_path: Path) -> None:
    key = SigningKey.generate()
    key.save(tmp_path / "key")
    plain = LocalBucket(tmp_path / "bucket", create=True)
    history = History(SignedBucket(plain, key), public_key=key.public.hex)
    for _ in range(2):
        history.publish()
    forged = Layout.delta(history.writer.epoch, 99)
    plain.commit(forged, newest(history, tmp_path).dumps())
    with pytest.raises(FormatError):
        ChainReader(history.bucket, tmp_path / "cache").newest()
    assert main(["repair", plain.address, "--delete"]) == 1  # the run is signed, and no key was given
    assert main(["repair", plain.address, "--delete", "--signing-key", str(tmp_path / "key")]) == 0
    assert ChainReader(history.bucket, tmp_path / "cache").newest() == history.writer.position
    assert Head.loads(plain.read([Layout.HEAD])[Layout.HEAD]).manifest.version == 2
