"""`hubsync ls`, `show`, `verify` and `pull`, on runs that a real engine wrote."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.bucket.base import Download
from hubsync.chain import ChainReader, Layout
from hubsync.chain.retention import Collector, Policy
from hubsync.errors import BucketMissing, ConfigError, NoPath, ObjectCorrupt, WrongParent
from hubsync.kernels.bits import bits_of
from tests.support.commands import hubsync
from tests.support.history import History


@pytest.fixture
def model() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(32, 16)


@pytest.fixture
def base(model: torch.nn.Linear, tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    save_file(
        {name: tensor.detach().clone() for name, tensor in model.named_parameters()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text('{"made": "here"}')
    return directory


@pytest.fixture
def address(model: torch.nn.Linear, base: Path, tmp_path: Path) -> str:
    """A run with versions 1..3, whose base model is not on this machine."""
    address = str(tmp_path / "bucket")
    config = SyncConfig(bucket=address, base_model="me/base", base_revision="0123abcd", name="tests")
    with DeltaWeightTransferEngine(model, None, config) as engine:
        for step in range(3):
            with torch.no_grad():
                model.weight[step] += 1
            engine.publish(10 + step)
    return address


def is_the_view_of(directory: Path, model: torch.nn.Linear) -> bool:
    tensors = load_file(directory / "model.safetensors")
    expected = {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}
    return all(bits_of(tensors[name]).tolist() == bits_of(expected[name]).tolist() for name in expected)


def test_ls_prints_one_line_per_version(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hubsync("ls", address) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 tensors" in lines[0]
    assert "me/base@0123abcd" in lines[0]
    assert [line.split()[:4] for line in lines[2:]] == [[str(v), "delta", str(v - 1), "32"] for v in (1, 2, 3)]
    assert "; 3 deltas " in lines[0]
    assert lines[0].endswith("; served: version 3")
    assert [line.split()[-2:] == ["served", "tests"] for line in lines[2:]] == [False, False, True]
    assert hubsync("ls", address, "--limit", 1) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[0] == "3"


def test_ls_states_times_with_their_zone_and_all_as_json(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert hubsync("serve", address, 2) == 0
        assert hubsync("ls", address) == 0
        assert "+05:30" in capsys.readouterr().out
        assert hubsync("ls", address, "--limit", 2, "--json") == 0
    finally:
        monkeypatch.undo()
        time.tzset()
    document = json.loads(capsys.readouterr().out)
    assert document["served"]["version"] == 2
    assert [(row["version"], row["kind"], row["served"]) for row in document["manifests"]] == [
        (2, "delta", True),
        (3, "delta", False),
    ]
    assert document["totals"]["delta"]["count"] == 3, "of the whole run"
    assert all(datetime.fromisoformat(row["created"]).tzinfo for row in document["manifests"])


def test_every_command_that_reports_also_prints_json(
    address: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hubsync("show", address, 2, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["position"]["version"] == 2
    assert hubsync("verify", address, "--base", base, "--json") == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["replayed"] == 3
    assert {manifest["result"] for manifest in verified["manifests"]} == {"replayed"}
    assert hubsync("verify", address, "--json") == 1
    assert {row["result"] for row in json.loads(capsys.readouterr().out)["manifests"]} == {"needs base"}
    assert hubsync("compact", address, "--json") == 0
    *merged, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert done == {"event": "done", "merged": len(merged), "skipped": 0}
    assert {(event["from"], event["to"]) for event in merged} == {(0, 2)}
    assert hubsync("gc", address, "--keep-last", 1, "--json") == 0
    collected = json.loads(capsys.readouterr().out)
    assert collected["waiting"] == len(collected["unneeded"])
    assert collected["bytes"] == 0


def test_the_address_of_a_follower_is_given_once(address: str) -> None:
    for words in ((), (address, "--bucket", address)):
        with pytest.raises(ConfigError, match="hubsync follow ADDRESS --server URL"):
            hubsync("follow", *words, "--server", "http://127.0.0.1:9")


def test_show_prints_the_manifest(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hubsync("show", address, 2) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["position"]["version"], document["step"], document["name"]) == (2, 11, "tests")
    assert hubsync("show", address, 0) == 0
    assert json.loads(capsys.readouterr().out)["base"]["model"] == "me/base"


def test_verify_replays_all_versions(address: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hubsync("verify", address, "--base", base) == 0
    assert "3 of 3 replayed bit for bit" in capsys.readouterr().out


def test_verify_without_the_base_lists_the_versions_it_could_not_replay(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hubsync("verify", address) == 1
    output = capsys.readouterr().out
    assert "replaying it needs --base" in output
    assert "give a local copy of me/base with --base DIR" in output


def test_verify_can_start_at_an_anchor(
    address: str, model: torch.nn.Linear, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        engine.anchor()
        with torch.no_grad():
            model.weight[5] += 1
        engine.publish(20)
    assert hubsync("verify", address) == 1
    output = capsys.readouterr().out
    assert "ok       delta  version 3" in output  # undone from the anchor, then applied again
    assert "3 of 5 replayed" in output
    assert hubsync("verify", address, "--base", base) == 0


@pytest.mark.parametrize("compact", [False, True], ids=["fast", "compact"])
def test_verify_starts_at_the_oldest_anchor_that_retention_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compact: bool
) -> None:
    history = History(LocalBucket(tmp_path / "bucket", create=True))
    for number in range(6):
        history.publish(compact=compact)
        if number == 3:
            history.anchor(tmp_path / "anchor")
    Collector(history.bucket, history.reader(tmp_path / "gc"), Policy(keep_last=3, grace=0)).collect()
    assert hubsync("verify", history.bucket.address) == 0
    output = capsys.readouterr().out
    assert ("3 of 4 replayed" if compact else "4 of 4 replayed") in output
    assert ("the version it applies to has been deleted" in output) == compact


def test_verify_finds_damage_and_a_wrong_base(address: str, base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["weight"][0, 0] += 1
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(WrongParent, match="Use the model and the revision"):
        hubsync("verify", address, "--base", other)
    manifest = ChainReader(LocalBucket(address), tmp_path / "cache").manifest(2)
    part = Path(address) / Layout.part(manifest, manifest.parts[0])
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(ObjectCorrupt):
        hubsync("verify", address, "--base", base)


def test_pull_writes_a_version_as_a_checkpoint(
    address: str, model: torch.nn.Linear, base: Path, tmp_path: Path
) -> None:
    assert hubsync("pull", address, tmp_path / "newest", "--base", base) == 0
    assert is_the_view_of(tmp_path / "newest", model)
    assert (tmp_path / "newest" / "config.json").read_text() == '{"made": "here"}'
    assert hubsync("pull", address, tmp_path / "second", "--base", base, "--version", 2) == 0
    with torch.no_grad():
        model.weight[2] = load_file(base / "model.safetensors")["weight"][2]
    assert is_the_view_of(tmp_path / "second", model)


def test_ls_limit_counts_versions_and_not_merged_deltas(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    hubsync("compact", address)
    capsys.readouterr()
    assert hubsync("ls", address, "--limit", 2) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["2", "delta", "1"], ["2", "merged", "0"], ["3", "delta", "2"]]


@pytest.mark.parametrize("limit", ["-5", "0", "many"])
def test_ls_rejects_an_invalid_limit(address: str, limit: str) -> None:
    with pytest.raises(SystemExit):
        hubsync("ls", address, "--limit", limit)


def test_pull_accepts_a_path_through_a_directory_that_does_not_exist(
    address: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"new/\.\. is not empty"):
        hubsync("pull", address, "new/..", "--base", base)
    assert hubsync("pull", address, "new/../out", "--base", base) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "new").exists()


def test_pull_from_an_anchor_needs_no_base(address: str, model: torch.nn.Linear, tmp_path: Path) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        engine.anchor()
    assert hubsync("pull", address, tmp_path / "out") == 0
    assert is_the_view_of(tmp_path / "out", model)


def test_pull_reads_no_more_of_the_run_than_it_needs(
    address: str, base: Path, model: torch.nn.Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest anchor and the deltas after it; of a newer anchor only config and tokenizer."""
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        for turn in range(4):
            with torch.no_grad():
                model.weight[turn] += 1
            engine.publish(turn).result()
            if turn in (0, 3):
                engine.anchor()
        newest = engine.position.version
    read: list[str] = []
    real_read, real_fetch = LocalBucket.read, LocalBucket.fetch

    def watched_read(self: LocalBucket, paths: Sequence[str], **limits: int) -> dict[str, bytes]:
        read.extend(paths)
        return real_read(self, paths, **limits)

    def watched_fetch(self: LocalBucket, downloads: Sequence[Download]) -> None:
        read.extend(download.path for download in downloads)
        real_fetch(self, downloads)

    monkeypatch.setattr(LocalBucket, "read", watched_read)
    monkeypatch.setattr(LocalBucket, "fetch", watched_fetch)
    assert hubsync("pull", address, tmp_path / "out", "--version", newest - 2) == 0
    versions = {int(name.rpartition("/")[2][:8]) for name in read if "/versions/" in name or "/deltas/" in name}
    assert versions == {newest - 2}
    assert not any(f"/anchors/{newest:08d}/model" in name for name in read)


def test_pull_that_fails_writes_nothing(address: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(NoPath, match=r"base model is not on this machine.* --base DIR"):
        hubsync("pull", address, tmp_path / "out")
    with pytest.raises(NoPath, match="version 9"):
        hubsync("pull", address, tmp_path / "out", "--base", base, "--version", 9)
    with pytest.raises(ConfigError, match="not a directory"):
        hubsync("pull", address, tmp_path / "out", "--base", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not the base checkpoint"):
        hubsync("pull", address, tmp_path / "out", "--base", tmp_path / "empty")
    with pytest.raises(ConfigError, match="not empty"):
        hubsync("pull", address, base, "--base", base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "bucket", "empty"]


def test_a_missing_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BucketMissing):
        hubsync("ls", tmp_path / "nowhere")
