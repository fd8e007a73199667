"""Retention: replicas that follow, join or return late end at the right bits after any deletion."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hubsync.bucket import LocalBucket, SignedBucket
from hubsync.bucket.base import Stat
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader, Compactor, Layout
from hubsync.chain.retention import Collector, Garbage, Policy
from hubsync.errors import BucketError, BucketUnavailable, NoPath
from hubsync.format.documents import FORMAT, seal
from hubsync.format.keys import SigningKey
from hubsync.format.manifest import Position
from tests.support.commands import hubsync
from tests.support.faults import FaultyBucket
from tests.support.history import History

AT_ONCE = Policy(keep_last=2, grace=0)


class LaterBucket(FaultyBucket):
    """A bucket whose clock can be moved forward, so that tests need not wait for an hour."""

    ahead = 0.0

    def stat(self, paths: Iterable[str]) -> dict[str, Stat]:
        return {path: self._later(stat) for path, stat in super().stat(list(paths)).items()}

    def list(self, prefix: str = "", *, recursive: bool = True) -> list[Stat]:
        return [self._later(stat) for stat in super().list(prefix, recursive=recursive)]

    def _later(self, stat: Stat) -> Stat:
        return dataclasses.replace(stat, modified=None if stat.modified is None else stat.modified + self.ahead)


@pytest.fixture
def bucket(tmp_path: Path) -> LaterBucket:
    return LaterBucket(LocalBucket(tmp_path / "bucket", create=True))


def collect(history: History, tmp_path: Path, policy: Policy = AT_ONCE) -> list[Garbage]:
    return Collector(history.bucket, history.reader(tmp_path / "gc"), policy).collect()


def versions(reader: ChainReader) -> list[int]:
    return [manifest.version for manifest in reader.manifests() if manifest.kind == "delta"]


def merge(history: History, tmp_path: Path) -> None:
    list(Compactor(history.bucket, history.reader(tmp_path / "merge"), history.base).run())


# --- what is kept -----------------------------------------------------------------------------------


def test_without_an_anchor_all_deltas_from_the_base_are_kept(history: History, tmp_path: Path) -> None:
    for _ in range(4):
        history.publish()
    assert collect(history, tmp_path) == []


def test_behind_an_anchor_only_the_last_versions_are_kept(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    for number in range(6):
        history.publish()
        if number == 3:
            history.anchor(tmp_path / "anchor")
    deleted = collect(history, tmp_path, Policy(keep_last=2, grace=0))
    assert {found.what for found in deleted} >= {"version 1", "version 2", "version 3"}
    assert versions(reader) == [5, 6]
    for have in [None, *history.views]:
        history.go(reader, have)
    history.go(reader, None, 5)


def test_the_base_and_merged_deltas_stand_in_for_single_ones(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    for _ in range(8):
        history.publish()
    merge(history, tmp_path)
    collect(history, tmp_path)
    assert versions(reader)[-2:] == [7, 8]
    assert len(versions(reader)) < 5
    for have in [None, *history.views]:
        history.go(reader, have)
    for _ in range(8):
        history.publish()
    merge(history, tmp_path)  # of merged deltas, where single ones are gone
    collect(history, tmp_path)
    assert len(history.go(reader, None).steps) == 1
    assert versions(reader)[-2:] == [15, 16]


def test_a_run_shorter_than_keep_last_keeps_all_versions(history: History, reader: ChainReader, tmp_path: Path) -> None:
    for _ in range(4):
        history.publish()
    history.anchor(tmp_path / "anchor")
    assert collect(history, tmp_path, Policy(keep_last=6, grace=0)) == []
    assert versions(reader) == [1, 2, 3, 4]


def test_round_numbers_the_served_version_and_the_newest_are_kept(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    for number in range(9):
        history.publish()
        if number % 3 == 2:
            history.anchor(tmp_path / str(number))
    history.writer.serve(5)
    collect(history, tmp_path, Policy(keep_last=0, keep_every=4, grace=0))
    assert {4, 5, 8, 9} <= set(versions(reader))
    assert 2 not in versions(reader)
    for kept in (4, 5, 8, 9):
        history.go(reader, None, kept)
    assert reader.served().version == 5


@pytest.mark.parametrize("keep_last", [3, 4, 5, 7, 100])
def test_more_versions_than_there_are_may_be_kept(
    history: History, reader: ChainReader, tmp_path: Path, keep_last: int
) -> None:
    for _ in range(3):
        history.publish()
    history.anchor(tmp_path / "anchor")
    assert collect(history, tmp_path, Policy(keep_last=keep_last, grace=0)) == []
    assert versions(reader) == [1, 2, 3]


def test_expired_versions_are_not_kept_for_their_number(history: History, reader: ChainReader, tmp_path: Path) -> None:
    history.publish()
    history.publish(expires=1.0)
    history.publish(expires=9e9)
    history.anchor(tmp_path / "anchor")
    history.publish()
    garbage = collect(history, tmp_path, Policy(keep_last=4, grace=0))
    assert [(found.what, found.why) for found in garbage] == [("version 2", "it has expired")]
    history.go(reader, None, 4)


def test_a_time_to_live_starts_when_the_storage_wrote_the_manifest(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    first, _ = history.publish(), history.publish()
    history.anchor(tmp_path / "anchor")
    old = Path(history.bucket.address) / Layout.manifest(first)
    os.utime(old, (1e9, 1e9))
    collect(history, tmp_path, Policy(keep_last=9, ttl=3600, grace=0))
    assert versions(reader) == [2]


def test_dead_branches_and_parts_of_no_version_are_deleted(
    bucket: LaterBucket, history: History, reader: ChainReader, tmp_path: Path
) -> None:
    history.publish()
    bucket.fail("commit", error=BucketError("refused"))
    with pytest.raises(BucketError):
        history.publish()
    lost = history.writer.epoch
    assert collect(history, tmp_path) == []  # its writer may be about to write the manifest
    history.resume()
    assert collect(history, tmp_path) == []  # nobody has gone on from there yet
    history.publish()
    (garbage,) = collect(history, tmp_path)
    assert (garbage.what, garbage.manifest) == (f"1 parts of epoch {lost}", None)
    assert len(list(bucket.list(f"epochs/{lost}/deltas"))) == 1
    history.go(reader, None)


def test_nothing_is_deleted_if_no_path_leads_to_the_newest_version(
    bucket: LaterBucket, history: History, tmp_path: Path
) -> None:
    first, _ = history.publish(), history.publish()
    bucket.delete([Layout.manifest(first)])
    before = {stat.path for stat in bucket.list("epochs")}
    with pytest.raises(NoPath, match="let the trainer upload an anchor"):
        collect(history, tmp_path)
    assert {stat.path for stat in bucket.list("epochs")} == before


def test_an_anchor_with_missing_files_is_no_start_of_a_path(
    bucket: LaterBucket, history: History, reader: ChainReader, tmp_path: Path
) -> None:
    history.publish(), history.publish()
    anchored = history.anchor(tmp_path / "anchor")
    history.publish()
    bucket.delete([Layout.part(anchored, anchored.parts[0])])
    collect(history, tmp_path, Policy(keep_last=1, grace=0))
    history.go(reader, None)
    assert versions(reader) == [1, 2, 3]


# --- when and in which order ------------------------------------------------------------------------


def test_nothing_is_deleted_before_its_grace_period_ends(bucket: LaterBucket, history: History, tmp_path: Path) -> None:
    for _ in range(3):
        history.publish()
    history.anchor(tmp_path / "anchor")
    policy = Policy(keep_last=1, grace=3600)
    before = {stat.path for stat in bucket.list("epochs")}
    assert [found.wait for found in collect(history, tmp_path, policy)] == [3600, 3600]
    bucket.ahead = 3000
    assert all(0 < found.wait <= 601 for found in collect(history, tmp_path, policy))
    assert {stat.path for stat in bucket.list("epochs")} == before
    history.writer.serve(1)  # needed again: its grace begins anew if it is not once more
    bucket.ahead = 4000
    assert [(found.what, found.wait) for found in collect(history, tmp_path, policy)] == [("version 2", 0)]
    history.writer.serve(3)
    assert [(found.what, found.wait) for found in collect(history, tmp_path, policy)] == [("version 1", 3600)]


def test_manifests_are_deleted_before_their_parts(bucket: LaterBucket, history: History, tmp_path: Path) -> None:
    for _ in range(3):
        history.publish()
    history.anchor(tmp_path / "anchor")
    bucket.fail("delete", 2)
    with pytest.raises(BucketUnavailable):
        collect(history, tmp_path, Policy(keep_last=1, grace=0))
    left = {stat.path for stat in bucket.list("epochs")}
    epoch = history.writer.epoch
    assert Layout.delta(epoch, 1) not in left
    assert any("/deltas/00000001-" in path for path in left)
    (rest,) = collect(history, tmp_path)  # what a collector that died has left is known, although the epoch is live
    assert (rest.manifest, len(rest.parts)) == (None, 2)
    assert not any("/deltas/00000001-" in stat.path for stat in bucket.list("epochs"))


@pytest.mark.parametrize("deleted", range(8))
def test_a_killed_collector_leaves_no_version_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    """Found by benchmarks.chaos, seed 40056."""
    history = History(LocalBucket(tmp_path / "bucket", create=True))
    for _ in range(3):
        history.publish()
    history.anchor(tmp_path / "first")
    for _ in range(4):
        history.publish()
    history.anchor(tmp_path / "second")
    delete = history.bucket.delete

    def killed(paths: Sequence[str]) -> None:
        delete(paths[:deleted])
        raise KeyboardInterrupt

    monkeypatch.setattr(history.bucket, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(history, tmp_path, Policy(keep_last=1, grace=0))
    reader = history.reader(tmp_path / "cache")
    for version in versions(reader):
        history.go(reader, None, version)


def test_a_rollback_during_the_collection_is_noticed(bucket: LaterBucket, history: History, tmp_path: Path) -> None:
    for _ in range(4):
        history.publish()
    history.anchor(tmp_path / "anchor")

    def rollback(path: str) -> None:
        if path == Layout.GARBAGE:
            bucket.before_commit = lambda path: None
            history.writer.serve(1)

    bucket.before_commit = rollback
    collect(history, tmp_path)
    assert history.reader(tmp_path / "fresh").served().version == 1
    history.go(history.reader(tmp_path / "fresh"), None, 1)


def test_a_damaged_gc_json_restarts_grace_periods(bucket: LaterBucket, history: History, tmp_path: Path) -> None:
    for _ in range(3):
        history.publish()
    history.anchor(tmp_path / "anchor")
    policy = Policy(keep_last=1, grace=3600)
    collect(history, tmp_path, policy)
    bucket.commit(Layout.GARBAGE, b"{}")
    bucket.ahead = 4000
    assert {found.wait for found in collect(history, tmp_path, policy)} == {3600}


@pytest.mark.parametrize("mark", [True, "soon", -1e9, 1e300, float("nan"), float("inf"), [0]], ids=str)
def test_invalid_times_in_gc_json_are_ignored(
    bucket: LaterBucket, history: History, tmp_path: Path, mark: object
) -> None:
    history.publish(), history.publish()
    history.anchor(tmp_path / "anchor")
    policy = Policy(keep_last=1, grace=3600)
    paths = [path for found in collect(history, tmp_path, policy) for path in found.paths]
    bucket.commit(Layout.GARBAGE, seal({"format": FORMAT, "since": dict.fromkeys(paths, mark)}))
    assert {found.wait for found in collect(history, tmp_path, policy)} == {3600}
    bucket.ahead = 4000
    assert {found.wait for found in collect(history, tmp_path, policy)} == {0}


def test_an_unsigned_gc_json_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = LocalBucket(tmp_path / "bucket", create=True)
    history = History(SignedBucket(plain, SigningKey.generate()))
    history.publish(), history.publish()
    history.anchor(tmp_path / "anchor")
    policy = Policy(keep_last=1, grace=3600)
    found = collect(history, tmp_path, policy)
    ripe = dict.fromkeys((path for garbage in found for path in garbage.paths), 0)
    plain.commit(Layout.GARBAGE, seal({"format": FORMAT, "since": ripe}))
    assert {garbage.wait for garbage in collect(history, tmp_path, policy)} == {3600}
    assert "ignoring gc.json" in caplog.text


def test_overlapping_merged_deltas_are_deleted_once_far_behind(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    def fours() -> list[int]:
        merged = reader.spans(reader.manifests())
        return [m.parent.version for m in merged if m.version - m.parent.version == 4]

    for _ in range(12):
        history.publish()
    merge(history, tmp_path)
    assert fours() == [0, 4, 5, 6, 7, 8]
    for _ in range(6):
        history.publish()
    merge(history, tmp_path)
    collect(history, tmp_path, Policy(keep_last=20, grace=0))
    assert set(fours()) - {0} == {4, 8, 10, 11, 12, 13, 14}


def test_nothing_is_deleted_on_a_storage_without_times(bucket: LaterBucket, history: History, tmp_path: Path) -> None:
    class Timeless(FaultyBucket):
        def stat(self, paths: Iterable[str]) -> dict[str, Stat]:
            return {path: Stat(path, s.size, s.etag) for path, s in super().stat(list(paths)).items()}

    history.publish()
    collector = Collector(Timeless(bucket), history.reader(tmp_path / "gc"), AT_ONCE)
    with pytest.raises(BucketError, match="does not state when"):
        collector.collect()


def test_a_reader_with_an_older_plan_finds_another_path(history: History, reader: ChainReader, tmp_path: Path) -> None:
    origin = Position(0, reader.run().digest)
    for _ in range(4):
        history.publish()
    planned = reader.plan(origin)
    merge(history, tmp_path)
    collect(history, tmp_path)
    plans = iter([planned])
    taken = []

    def fetch(plan: object) -> None:
        taken.append(plan)
        for delta in plan.deltas:
            reader.fetch(delta)

    reader.carry_out(lambda: next(plans, None) or reader.plan(origin), fetch)
    assert taken[0] is planned
    assert len(taken[-1].steps) == 1


@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_after_any_deletion_every_reader_ends_at_the_right_bits(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("history")
    history = History(LocalBucket(tmp_path / "bucket", create=True))
    follower, at = history.reader(tmp_path / "follower"), history.writer.position
    actions = ["publish", "publish", "compact delta", "save", "resume", "merge", "anchor", "serve", "delete", "follow"]
    for number, action in enumerate(data.draw(st.lists(st.sampled_from(actions), min_size=6, max_size=20))):
        match action:
            case "publish" | "compact delta" | "save":
                history.publish(compact=action == "compact delta", serve=action != "save")
            case "resume":
                history.resume()
            case "merge":
                merge(history, tmp_path)
            case "anchor":
                history.anchor(tmp_path / str(number))
            case "serve":
                there = sorted({m.version for m in follower.manifests()} | {0})
                history.writer.serve(data.draw(st.sampled_from(there)))
            case "delete":
                last, every = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
                collect(history, tmp_path, Policy(keep_last=last, keep_every=every, grace=0))
            case "follow":
                at = follower.served()
                history.go(follower, at)
    served, newest = follower.served(), follower.newest()
    assert newest == history.writer.position
    assert served.version == history.writer.serving
    for target in (served, newest):
        history.go(follower, at, target.version)
        history.go(history.reader(tmp_path / "fresh"), None, target.version)
        for have in history.views:
            history.go(follower, have, target.version)


def test_retention_in_a_hub_bucket(hub_bucket: HubBucket, tmp_path: Path) -> None:
    history = History(hub_bucket)
    for _ in range(3):
        history.publish()
    history.anchor(tmp_path / "anchor")
    assert [found.wait for found in collect(history, tmp_path, Policy(keep_last=1))] == [3600, 3600]
    collect(history, tmp_path, Policy(keep_last=1, grace=0))
    reader = history.reader(tmp_path / "cache")
    assert versions(reader) == [3]
    history.go(reader, None, base=False)


# --- the command ------------------------------------------------------------------------------------


def test_the_command_states_what_it_deletes_and_why(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        history.publish()
    history.anchor(tmp_path / "anchor")
    address = history.bucket.address
    before = {stat.path for stat in history.bucket.list()}
    assert hubsync("gc", address, "--keep-last", 1, "--dry-run", "--grace", 0) == 0
    assert "would delete version 1" in capsys.readouterr().out
    assert {stat.path for stat in history.bucket.list()} == before
    assert hubsync("gc", address, "--keep-last", 1, "--grace", "30m") == 0
    out = capsys.readouterr().out
    assert "unneeded version 1" in out
    assert "it is not one of the last 1; may be deleted in 30 min" in out
    assert "deleted 0 bytes; 2 more wait" in out
    assert hubsync("gc", address, "--keep-last", 1, "--grace", 0) == 0
    assert "deleted version 1" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--keep-last", "-1"], ["--keep-last", "1", "--ttl", "soon"], []], ids=str)
def test_invalid_options_are_refused(history: History, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        hubsync("gc", history.bucket.address, *words)
