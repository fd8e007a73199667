"""Runs of many versions: what planning and catching up cost does not grow with the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from hubsync.bucket import LocalBucket
from hubsync.bucket.base import Stat
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader, Compactor, Layout
from hubsync.chain.replay import replay
from hubsync.cli.main import main
from hubsync.localhub import LocalHub
from tests.support.faults import FaultyBucket
from tests.support.history import History
from tests.support.long_run import DELTA_BYTES, anchor, merged, position, write_run

LENGTH = 2000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_run(root, LENGTH, merged(LENGTH - 8, LENGTH - 4), merged(1000, 1016), anchor(1500, 20 * DELTA_BYTES))
    return root


@pytest.fixture
def bucket(root: Path) -> FaultyBucket:
    return FaultyBucket(LocalBucket(root))


@pytest.fixture
def reader(bucket: FaultyBucket, tmp_path: Path) -> ChainReader:
    """A reader that has polled before, as that of a replica."""
    reader = ChainReader(bucket, tmp_path / "cache")
    reader.newest()
    bucket.calls.clear()
    return reader


@pytest.mark.parametrize("behind", [2, 3, 20, 200])
def test_planning_from_some_versions_behind_lists_no_run(
    bucket: FaultyBucket, reader: ChainReader, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    listed, real = [], bucket.inner.list

    def watched(prefix: str = "", *, recursive: bool = True) -> Iterable[Stat]:
        listed.append(recursive)
        return real(prefix, recursive=recursive)

    monkeypatch.setattr(bucket.inner, "list", watched)
    plan = reader.plan(position(LENGTH - behind))
    assert plan.start == position(LENGTH - behind)
    assert plan.target == position(LENGTH)
    assert listed == [False], "one listing, of the epochs alone"
    assert bucket.calls["read"] <= 3


def test_the_plan_uses_merged_deltas_that_it_did_not_list(reader: ChainReader) -> None:
    plan = reader.plan(position(LENGTH - 9))
    assert [step.end.version for step in plan.steps] == [LENGTH - 8, LENGTH - 4, *range(LENGTH - 3, LENGTH + 1)]


def test_the_plan_uses_an_anchor_that_it_did_not_list(reader: ChainReader) -> None:
    plan = reader.plan(position(1400), to=1502)
    assert plan.anchor is not None
    assert [step.end.version for step in plan.steps] == [1501, 1502]


def test_a_plan_equals_the_one_from_a_listing(reader: ChainReader, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [998, 1000, 1007, 1400, 1499, 1500, 1501]
    near = [reader.plan(position(start), to=1510) for start in starts]
    monkeypatch.setattr("hubsync.chain.reader.index_between", lambda *_: None)
    assert near == [reader.plan(position(start), to=1510) for start in starts]


@pytest.mark.parametrize(("base_available", "most"), [(False, 7), (True, 1000)])
def test_a_start_from_nothing_reads_what_follows_the_nearest_anchor(
    bucket: FaultyBucket, reader: ChainReader, monkeypatch: pytest.MonkeyPatch, base_available: bool, most: int
) -> None:
    """With the base model at hand all deltas from version 0 may be fewer bytes than the anchor."""
    names: list[str] = []
    real = bucket.inner.read

    def watched(paths: Sequence[str], *, max_bytes: int) -> dict[str, bytes]:
        names.extend(paths)
        return real(paths, max_bytes=max_bytes)

    monkeypatch.setattr(bucket.inner, "read", watched)
    plan = reader.plan(None, to=1503, base_available=base_available)
    assert plan.anchor is not None
    assert len({name for name in names if name.endswith("/manifest.json") or "/versions/" in name}) <= most
    assert bucket.calls["read"] <= 8


def test_from_far_behind_one_listing_of_the_run_answers(bucket: FaultyBucket, reader: ChainReader) -> None:
    plan = reader.plan(position(0))
    assert plan.target == position(LENGTH)
    assert bucket.calls["list"] == 2, "of the epochs, and of everything"


def test_ls_of_a_long_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + LENGTH + 3
    assert lines[1].split()[:3] == ["version", "kind", "parent"]
    assert len({line.index("delta") for line in lines[2:] if "delta" in line}) == 1, "columns are aligned"


# --- catching up


def test_catching_up_downloads_many_versions_in_one_call(
    local_hub: LocalHub, hub_bucket: HubBucket, tmp_path: Path
) -> None:
    history = History(hub_bucket)
    for _ in range(12):
        history.publish()
    reader = history.reader(tmp_path / "cache")
    plan = reader.plan(None, base_available=True)
    assert len(plan.steps) == 12
    before = local_hub.api_calls()
    view = replay(reader, plan, history.base)
    assert view.position == history.writer.position
    assert local_hub.api_calls() - before <= HubBucket.API_CALLS["fetch"]


def test_a_part_that_is_gone_is_found_by_the_plan_that_needs_it(tmp_path: Path) -> None:
    bucket = FaultyBucket(LocalBucket(tmp_path / "bucket", create=True))
    history = History(bucket)
    start = history.writer.position
    manifests = [history.publish() for _ in range(6)]
    assert list(Compactor(bucket, history.reader(tmp_path / "compactor")).run())
    reader = history.reader(tmp_path / "cache")
    reader.newest()
    gone = next(manifest for manifest in reader.plan(start).deltas if manifest.kind == "merged")
    (tmp_path / "bucket" / Layout.part(gone, gone.parts[0])).unlink()
    view = reader.carry_out(lambda: reader.plan(start), lambda plan: replay(reader, plan, history.base))
    assert view.position == manifests[-1].position
