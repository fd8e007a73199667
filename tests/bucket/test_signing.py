"""Signed runs: clients with the public key reject every document that the trainer's key has not signed."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, Layout
from hubsync.chain.replay import replay
from hubsync.cli.main import main
from hubsync.errors import ConfigError, Untrusted
from hubsync.format.keys import PublicKey, SigningKey

KEY, FOREIGN = SigningKey.generate(), SigningKey.generate()


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    KEY.save(tmp_path / "key")
    return str(tmp_path / "key")


@pytest.fixture
def run(tmp_path: Path, key_file: str) -> str:
    """A signed run with an anchor and two deltas."""
    address = str(tmp_path / "run")
    model = torch.nn.Linear(64, 64)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, signing_key=key_file)) as engine:
        for _ in range(2):
            with torch.no_grad():
                model.weight += 0.01
            engine.publish().result()
    return address


def reader(run: str, cache: Path, key: PublicKey | None) -> ChainReader:
    return ChainReader(open_bucket(run, key=key), cache)


def documents(run: str) -> list[Path]:
    return sorted(Path(run).rglob("*.json"))


def named(run: str, name: str) -> Path:
    """run.json, the head, or the manifest of version 2."""
    paths = {"run": Path(run, Layout.RUN), "head": Path(run, Layout.HEAD)}
    return paths.get(name) or next(path for path in documents(run) if path.name == "00000002.json")


def signed(path: Path, run: str, key: SigningKey) -> str:
    """The document, signed again with another key."""
    bucket = open_bucket(run, key=key)
    name = path.relative_to(run).as_posix()
    document = json.loads(path.read_text())
    document.pop("signature")
    path.unlink()
    bucket.commit(name, json.dumps(document).encode())
    return path.read_text()


def test_a_signed_run_is_read_with_its_public_key_and_without_one(run: str, tmp_path: Path) -> None:
    for number, key in enumerate((KEY.public, None)):
        ours = reader(run, tmp_path / f"cache{number}", key)
        assert ours.run().public_key == KEY.public.hex
        assert ours.newest().version == 2
        replay(ours, ours.plan(None)).verify()


@pytest.mark.parametrize("how", ["unsigned", "changed", "foreign", "another name"])
def test_documents_that_the_key_has_not_signed_are_refused(run: str, tmp_path: Path, how: str) -> None:
    path = named(run, "manifest")
    document = json.loads(path.read_text())
    if how == "unsigned":
        document.pop("signature")
    elif how == "changed":
        document["name"] = "another"
    elif how == "another name":
        document = json.loads((path.parent / "00000001.json").read_text())
    path.write_text(signed(path, run, FOREIGN) if how == "foreign" else json.dumps(document))
    Path(run, Layout.HEAD).unlink()
    with pytest.raises(Untrusted, match=r"00000002.json is not signed"):
        reader(run, tmp_path / "cache", KEY.public).plan(None)


def test_another_run_json_is_refused(run: str, tmp_path: Path) -> None:
    signed(named(run, "run"), run, FOREIGN)
    with pytest.raises(Untrusted, match=r"run.json is not signed by the key"):
        reader(run, tmp_path / "cache", KEY.public).run()


@pytest.mark.parametrize("content", [None, b"garbage", b"[]"])
def test_a_forged_head_is_ignored(
    run: str, tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    head = named(run, "head")
    if content is None:
        signed(head, run, FOREIGN)
    else:
        head.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert reader(run, tmp_path / "cache", KEY.public).newest().version == 2
    assert "ignoring the head" in caplog.text


def test_a_reader_goes_on_while_each_new_head_is_replaced_by_a_forged_one(
    run: str, tmp_path: Path, key_file: str
) -> None:
    follower, head = reader(run, tmp_path / "cache", KEY.public), named(run, "head")
    model = torch.nn.Linear(64, 64)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=run, signing_key=key_file)) as engine:
        for _ in range(3):
            with torch.no_grad():
                model.weight.add_(1)
            engine.publish().result()
            signed(head, run, FOREIGN)
            assert follower.newest() == follower.served() == engine.position


def test_a_run_is_continued_with_its_own_key_only(run: str, tmp_path: Path, key_file: str) -> None:
    model = torch.nn.Linear(64, 64)
    with pytest.raises(ConfigError, match="is signed: continue it with the same signing_key"):
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket=run))
    FOREIGN.save(tmp_path / "foreign")
    with pytest.raises(Untrusted):
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket=run, signing_key=str(tmp_path / "foreign")))
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=run, signing_key=key_file)) as engine:
        assert engine.position.version > 2
    assert reader(run, tmp_path / "cache", KEY.public).newest() == engine.position


def test_the_key_may_come_by_environment(tmp_path: Path, key_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBSYNC_SIGNING_KEY", Path(key_file).read_text())
    address = str(tmp_path / "other")
    DeltaWeightTransferEngine(torch.nn.Linear(2, 2), None, SyncConfig(bucket=address)).close()
    assert reader(address, tmp_path / "cache", KEY.public).run().public_key == KEY.public.hex


def test_readers_cannot_write(run: str) -> None:
    with pytest.raises(Untrusted, match="only the run's public key"):
        open_bucket(run, key=KEY.public).commit(Layout.HEAD, b"{}")


def test_the_secret_key_is_never_shown_or_uploaded(run: str, tmp_path: Path, key_file: str) -> None:
    secret = Path(key_file).read_text().strip()
    assert stat.S_IMODE(Path(key_file).stat().st_mode) == 0o600
    assert secret not in repr(KEY)
    assert all(secret not in path.read_text() for path in documents(run))
    with pytest.raises(ConfigError) as raised:
        SigningKey.load(secret[:-1])
    assert secret[:-1] not in str(raised.value)


def test_a_key_is_never_overwritten(key_file: str) -> None:
    with pytest.raises(ConfigError, match="never overwritten"):
        FOREIGN.save(Path(key_file))


@pytest.mark.parametrize("text", ["", "0" * 63, "no/such/file", "G" * 64])
def test_invalid_keys_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="public key"):
        PublicKey.load(text)
    (tmp_path / "file").write_text(text)
    with pytest.raises(ConfigError, match="public key"):
        PublicKey.load(str(tmp_path / "file"))


def test_the_command_makes_keys_and_checks_runs(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", str(tmp_path / "new")]) == 0
    public = SigningKey.load(str(tmp_path / "new")).public.hex
    assert f"HUBSYNC_PUBLIC_KEY={public}" in capsys.readouterr().out
    assert main(["verify", run, "--public-key", KEY.public.hex]) == 0
    assert main(["verify", run, "--public-key", public]) == 1
    assert "Untrusted: run.json is not signed by the key of this run" in capsys.readouterr().err


def test_every_document_of_a_signed_run_has_its_signature(run: str) -> None:
    assert {path.name for path in documents(run)} >= {Layout.RUN, Layout.HEAD, "epoch.json", "00000002.json"}
    assert all("signature" in json.loads(path.read_text()) for path in documents(run))


@pytest.mark.parametrize("command", [["compact"], ["gc", "--keep-last", "1", "--grace", "0"]])
def test_nothing_is_written_to_a_signed_run_without_its_key(
    run: str, key_file: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = documents(run)
    name, *options = command
    assert main([name, run, *options]) == 1
    assert "this run is signed" in capsys.readouterr().err
    assert documents(run) == before
    assert main([name, run, *options, "--signing-key", key_file]) == 0


def test_an_empty_key_is_an_error_and_not_none(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["ls", run, "--public-key", ""]) == 1
    monkeypatch.setenv("HUBSYNC_SIGNING_KEY", "")
    with pytest.raises(ConfigError, match="signing key"):
        DeltaWeightTransferEngine(torch.nn.Linear(64, 64), None, SyncConfig(bucket=run))


def test_an_unsigned_merged_delta_is_ignored(
    run: str, key_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["compact", run, "--signing-key", key_file]) == 0
    (merged,) = Path(run).rglob("merged/*/manifest.json")
    signed(merged, run, FOREIGN)
    ours = reader(run, tmp_path / "cache", KEY.public)
    replay(ours, ours.plan(None)).verify()
    assert "ignoring an unusable manifest" in caplog.text
