"""Merged deltas lead to the same bits as the deltas they merge; compactors never act as publishers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hubsync.bucket import LocalBucket
from hubsync.bucket.changes import Changes
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader, ChainWriter, Compactor, Layout, Step
from hubsync.chain.retention import Collector, Policy
from hubsync.cli.main import main
from hubsync.errors import FormatError
from hubsync.format.manifest import Head, Manifest, Position
from hubsync.format.parts import Transition, write_delta
from tests.support.commands import hubsync
from tests.support.faults import FaultyBucket
from tests.support.history import RUN_ID, History


def compacted(history: History, tmp_path: Path, **options: object) -> list[tuple[int, int]]:
    """Run a new compactor once. Returns its merged deltas as (from, to)."""
    compactor = Compactor(history.bucket, history.reader(tmp_path / "compactor"), **options)
    return [(merged.parent.version, merged.version) for merged in compactor.run()]


def test_spans_are_powers_of_two_and_overlap_near_the_newest_version(history: History, tmp_path: Path) -> None:
    for _ in range(9):
        history.publish()
    made = compacted(history, tmp_path)
    twos = [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert made == [*twos, (0, 4), (1, 5), (2, 6), (3, 7), (4, 8), (5, 9), (0, 8), (1, 9)]
    assert compacted(history, tmp_path) == []
    history.publish()
    assert compacted(history, tmp_path) == [(8, 10), (6, 10), (2, 10)]


def test_far_behind_the_newest_version_spans_do_not_overlap(history: History, tmp_path: Path) -> None:
    for _ in range(24):
        history.publish()
    fours = [first for first, last in compacted(history, tmp_path) if last - first == 4]
    assert fours == [0, 4, 8, 12, 16, 17, 18, 19, 20]


def test_a_span_may_be_limited(history: History, tmp_path: Path) -> None:
    for _ in range(8):
        history.publish()
    assert max(last - first for first, last in compacted(history, tmp_path, max_span=4)) == 4


def test_every_version_leads_to_every_other_with_the_same_bits(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    for _ in range(11):
        history.publish()
    compacted(history, tmp_path)
    for have in history.views:
        for target in history.views:
            history.go(reader, have, target.version)
    assert [delta.kind for delta in reader.plan(Position(0, reader.run().digest), 8).deltas] == ["merged"]


def test_far_behind_is_few_objects_and_few_bytes(tmp_path: Path) -> None:
    history = History(LocalBucket(tmp_path / "bucket", create=True), rows=1024, fraction=0.01)
    for _ in range(49):
        history.publish()
    compacted(history, tmp_path)
    reader = history.reader(tmp_path / "cache")
    target = history.writer.position
    for have in list(history.views)[:-2]:
        behind = target.version - have.version
        plan = reader.plan(have)
        assert len(plan.deltas) <= 2 * math.log2(behind)
        best = write_delta(history.table, reader.merged(plan.steps), Transition(RUN_ID, have, target))
        assert plan.nbytes <= 1.7 * len(best)


def test_the_path_back_undoes_merged_deltas(history: History, reader: ChainReader, tmp_path: Path) -> None:
    for _ in range(8):
        history.publish()
    compacted(history, tmp_path)
    plan = history.go(reader, history.writer.position, 0, base=False)
    assert [(step.manifest.kind, step.inverse) for step in plan.steps] == [("merged", True)]


def test_compact_deltas_are_merged_into_fast_ones_with_the_base(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    for number in range(8):
        history.publish(compact=number != 2)
    compactor = Compactor(history.bucket, reader)
    assert list(compactor.run()) == []
    assert compactor.skipped > 0
    made = compacted(history, tmp_path, base=history.base)
    assert (0, 8) in made
    assert {merged.encoding for merged in reader.spans(reader.manifests())} == {"fast"}
    for have in history.views:
        history.go(reader, have)
    history.go(reader, history.writer.position, 0, base=False)


def test_spans_that_begin_with_deleted_weights_are_skipped(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    """Found by benchmarks.chaos, seed 40183: versions before an anchor were deleted, and compaction failed."""
    deltas = [history.publish(compact=True) for _ in range(2)]
    history.publish(compact=True)
    history.anchor(tmp_path / "anchor")
    for _ in range(4):
        history.publish(compact=True)
    history.bucket.delete([Layout.manifest(delta) for delta in deltas])
    history.base = {}  # who starts from it would fail
    compactor = Compactor(history.bucket, reader, {})
    made = [(merged.parent.version, merged.version) for merged in compactor.run() if merged.parent is not None]
    assert made
    assert all(start >= 3 for start, _ in made)
    assert compactor.skipped > 0
    history.go(reader, None)


def test_skipped_version_numbers_leave_no_gap_in_spans(history: History, reader: ChainReader, tmp_path: Path) -> None:
    for number in range(8):
        history.publish()
        if number in (2, 5):
            history.resume()
    assert len(history.views) == 9
    assert history.writer.position.version > 8
    assert len(compacted(history, tmp_path)) > 3
    for have in history.views:
        history.go(reader, have)


def test_spans_do_not_cross_a_restart_of_the_chain(history: History, tmp_path: Path) -> None:
    history.publish()
    writer = history.writer
    at = Position(writer.next_version, writer.position.digest)  # the same bits, but no delta leads there
    history.views[at] = history.view
    (tmp_path / "anchor").mkdir()
    save_file(history.view, tmp_path / "anchor" / "model.safetensors")
    writer.commit_anchor(tmp_path / "anchor", at=at)
    history.publish(), history.publish()
    assert compacted(history, tmp_path) == [(2, 4)]


def test_a_compactor_fences_no_writer_and_is_never_the_newest(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    history.publish(), history.publish()
    epochs = history.writer.epoch
    assert compacted(history, tmp_path) == [(0, 2)]
    third = history.publish()  # the trainer goes on in the same epoch
    assert history.writer.epoch == epochs
    assert reader.newest() == third.position
    resumed = ChainWriter.resume(history.bucket, history.table)
    assert (resumed.position, resumed.next_version) == (third.position, 5)
    history.bucket.delete([Layout.HEAD])
    assert history.reader(tmp_path / "fresh").newest() == third.position


def test_a_head_never_names_a_merged_delta(history: History, reader: ChainReader, tmp_path: Path) -> None:
    history.publish(), history.publish()
    compacted(history, tmp_path)
    (merged,) = reader.spans(reader.manifests())
    with pytest.raises(FormatError, match="never the newest"):
        Head.loads(Head(merged, 2).dumps())


def test_a_compactor_that_dies_leaves_nothing_visible(history: History, tmp_path: Path) -> None:
    for _ in range(4):
        history.publish()
    run = Compactor(history.bucket, history.reader(tmp_path / "compactor")).run()
    next(run)
    run.close()
    assert compacted(history, tmp_path) == [(2, 4), (0, 4)]


def test_the_planner_avoids_a_merged_delta_with_a_missing_part(
    history: History, reader: ChainReader, tmp_path: Path
) -> None:
    for _ in range(4):
        history.publish()
    compacted(history, tmp_path)
    (merged,) = [m for m in reader.spans(reader.manifests()) if m.version - m.parent.version == 4]
    history.bucket.delete([Layout.part(merged, merged.parts[0])])
    plan = history.go(reader, Position(0, reader.run().digest))
    assert [delta.version for delta in plan.deltas] == [2, 4]


@pytest.mark.parametrize("change", ["digest of the parent", "epoch of the parent"])
def test_a_merged_delta_from_an_unknown_position_is_ignored(
    history: History, reader: ChainReader, tmp_path: Path, change: str
) -> None:
    for _ in range(5):
        history.publish()
    made = compacted(history, tmp_path)
    for merged in reader.spans(reader.manifests()):
        if merged.parent.version:
            parent = Position(merged.parent.version, "0" * 32)
            wrong = {"parent": parent} if "digest" in change else {"parent_epoch": "00000009-00000000"}
            history.bucket.commit(Layout.manifest(merged), replace(merged, **wrong).dumps())
    fresh = history.reader(tmp_path / "fresh")
    for have in [None, *history.views]:
        for target in history.views:
            history.go(fresh, have, target.version)
    if "digest" in change:
        assert all(merged.parent.version == 0 for merged in fresh.spans(fresh.manifests()))
        assert len(compacted(history, tmp_path)) == sum(1 for first, _ in made if first)  # as if there were none
    Collector(history.bucket, history.reader(tmp_path / "gc"), Policy(keep_last=2, grace=0)).collect()
    history.go(history.reader(tmp_path / "last"), None)


def test_two_compactors_at_once_do_no_harm(history: History, reader: ChainReader, tmp_path: Path) -> None:
    for _ in range(4):
        history.publish()
    bucket = FaultyBucket(history.bucket)
    slow = Compactor(bucket, history.reader(tmp_path / "slow"))

    def overtaken(path: str) -> None:
        bucket.before_commit = lambda path: None
        assert len(compacted(history, tmp_path)) == 3

    bucket.before_commit = overtaken
    assert len(list(slow.run())) == 3
    assert len(reader.spans(reader.manifests())) == 6
    assert len(history.go(reader, Position(0, reader.run().digest)).steps) == 1


@pytest.mark.parametrize(
    "change",
    [{"parent": None}, {"epoch": "00000001-00000000"}, {"parent_epoch": None}, {"kind": "delta"}],
    ids=str,
)
def test_a_merged_manifest_with_an_impossible_field_is_refused(
    history: History, reader: ChainReader, tmp_path: Path, change: dict
) -> None:
    for _ in range(4):
        history.publish()
    compacted(history, tmp_path)
    merged = reader.spans(reader.manifests())[1]
    assert Manifest.loads(merged.dumps()) == merged
    with pytest.raises(FormatError):
        Manifest.from_json({**merged.to_json(), **change})


@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_after_any_history_all_paths_lead_to_the_right_bits(
    tmp_path_factory: pytest.TempPathFactory, data: object
) -> None:
    tmp_path = tmp_path_factory.mktemp("history")
    history = History(LocalBucket(tmp_path / "bucket", create=True))
    actions = st.sampled_from(["publish", "publish", "compact delta", "back", "resume", "merge", "merge all", "anchor"])
    for number, action in enumerate(data.draw(st.lists(actions, min_size=4, max_size=14))):
        match action:
            case "publish" | "compact delta":
                history.publish(compact=action == "compact delta")
            case "back":
                history.publish_view(data.draw(st.sampled_from(list(history.views.values()))))
            case "resume":
                history.resume()
            case "merge":
                compacted(history, tmp_path)
            case "merge all":
                compacted(history, tmp_path, base=history.base)
            case "anchor":
                history.anchor(tmp_path / str(number))
    reader = history.reader(tmp_path / "cache")
    have = data.draw(st.sampled_from(list(history.views)))
    target = data.draw(st.sampled_from(list(history.views)))
    history.go(reader, have, target.version)
    history.go(reader, have)
    history.go(reader, None, target.version)


def test_merged_deltas_in_a_hub_bucket(hub_bucket: HubBucket, tmp_path: Path) -> None:
    history = History(hub_bucket)
    for _ in range(4):
        history.publish()
    assert compacted(history, tmp_path) == [(0, 2), (2, 4), (0, 4)]
    reader = history.reader(tmp_path / "cache")
    assert len(history.go(reader, Position(0, reader.run().digest)).steps) == 1


# --- commands ---------------------------------------------------------------------------------------


@pytest.fixture
def base(history: History, tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    save_file(history.base, directory / "model.safetensors")
    return directory


def test_the_command_lists_the_merged_deltas_it_made(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(4):
        history.publish()
    address = history.bucket.address
    assert hubsync("compact", address) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "merged versions 0..2",
        "merged versions 2..4",
        "merged versions 0..4",
        "merged deltas written",
    ]
    assert hubsync("compact", address) == 0
    assert capsys.readouterr().out == "nothing to merge\n"


def test_watch_continues_with_each_new_version(
    history: History, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history.publish(), history.publish()

    def until_the_next_look(_changes: Changes, _seconds: float) -> bool:
        if history.writer.position.version == 4:
            raise KeyboardInterrupt
        history.publish(), history.publish()
        return True

    monkeypatch.setattr(Changes, "wait", until_the_next_look)
    with pytest.raises(KeyboardInterrupt):
        hubsync("compact", history.bucket.address, "--watch")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "merged versions 0..2",
        "merged deltas written",
        "merged versions 2..4",
        "merged versions 0..4",
        "merged deltas written",
    ]


def test_the_command_needs_the_base_for_compact_deltas(
    history: History, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history.publish(compact=True), history.publish(compact=True)
    assert hubsync("compact", history.bucket.address) == 0
    assert "spans of compact deltas skipped: 1" in capsys.readouterr().out
    assert hubsync("compact", history.bucket.address, "--base", base) == 0
    assert "merged versions 0..2" in capsys.readouterr().out


def test_ls_lists_merged_deltas_after_their_end(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(4):
        history.publish()
    hubsync("compact", history.bucket.address)
    capsys.readouterr()
    assert hubsync("ls", history.bucket.address) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["1", "delta", "0"],
        ["2", "delta", "1"],
        ["2", "merged", "0"],
        ["3", "delta", "2"],
        ["4", "delta", "3"],
        ["4", "merged", "2"],
        ["4", "merged", "0"],
    ]


def test_verify_replays_merged_deltas_too(history: History, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(4):
        history.publish()
    hubsync("compact", history.bucket.address)
    assert hubsync("verify", history.bucket.address, "--base", base) == 0
    assert "7 of 7 replayed bit for bit" in capsys.readouterr().out


def test_a_step_has_a_start_and_an_end(history: History) -> None:
    first = history.publish()
    assert (Step(first).start, Step(first).end) == (first.parent, first.position)
    assert (Step(first, inverse=True).start, Step(first, inverse=True).end) == (first.position, first.parent)


@pytest.mark.parametrize("options", [["--interval", "nan"], ["--interval", "-1"], ["--max-span", "0"]])
def test_invalid_numbers_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compact", "anywhere", *options]) == 1
    assert f"ConfigError: {options[0]} must be" in capsys.readouterr().err
