"""Writers and readers of a run: commit order, fencing, the head, paths, and the cache.

The chain does not look into parts, so digests and parts are made up here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from pathlib import Path

import pytest

from hubsync.bucket import LocalBucket
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader, ChainWriter, Layout, Plan, Step, VersionInfo
from hubsync.errors import (
    BucketError,
    BucketUnavailable,
    ChainError,
    Fenced,
    FormatError,
    HeadTooOld,
    NoPath,
    ObjectCorrupt,
    ObjectMissing,
    RunMismatch,
)
from hubsync.format.documents import MAX_BYTES
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Base, Head, Manifest, Position, Run
from hubsync.format.table import TensorSpec, TensorTable
from tests.support.faults import FaultyBucket

TABLE = TensorTable([TensorSpec("embed.weight", (8, 4), "BF16"), TensorSpec("norm.weight", (4,), "BF16")])


def digest(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()[:32]


RUN = Run(run_id=digest("run"), table=TABLE, digest=digest("view 0"), base=Base("base/model"), created=1.0)


@pytest.fixture
def bucket(tmp_path: Path) -> FaultyBucket:
    return FaultyBucket(LocalBucket(tmp_path / "bucket", create=True))


@pytest.fixture
def reader(bucket: FaultyBucket, tmp_path: Path) -> ChainReader:
    return ChainReader(bucket, tmp_path / "cache")


def commit(writer: ChainWriter, size: int = 100) -> Manifest:
    part = writer.next_version.to_bytes(4, "big") * (size // 4)
    return writer.commit_delta(
        [part], digest=digest(f"{writer.epoch} {writer.next_version}"), changed=5, info=VersionInfo(step=7)
    )


def anchor(writer: ChainWriter, directory: Path, at: Position | None = None, size: int = 1000) -> Manifest:
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(b"w" * size)
    (directory / "config.json").write_text("{}")
    (directory / "training_args.bin").write_bytes(b"not for inference")
    return writer.commit_anchor(directory, at=at or writer.position)


def versions(manifests: list[Manifest]) -> list[int]:
    return [manifest.version for manifest in manifests]


# --- one writer -------------------------------------------------------------------------------------


def test_each_version_names_the_one_before_as_its_parent(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    one, two = commit(writer), commit(writer)
    assert (one.parent, one.parent_epoch) == (RUN.origin, None)
    assert (two.parent, two.parent_epoch) == (one.position, writer.epoch)
    assert reader.newest() == two.position == writer.position
    assert reader.manifests() == [one, two]
    assert reader.run() == RUN


def test_a_run_is_not_created_twice(bucket: FaultyBucket) -> None:
    ChainWriter.create(bucket, RUN)
    with pytest.raises(RunMismatch, match="already holds a run"):
        ChainWriter.create(bucket, dataclasses.replace(RUN, run_id=digest("other")))


def test_a_missing_run_is_reported_when_resuming_and_reading(bucket: FaultyBucket, reader: ChainReader) -> None:
    with pytest.raises(ObjectMissing, match=r"no run\.json"):
        ChainWriter.resume(bucket, TABLE)
    with pytest.raises(ObjectMissing, match="start the trainer"):
        reader.run()


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (
            [TABLE[0], TensorSpec("norm.weight", (4,), "F32")],
            r"norm\.weight BF16\[4\] where this .* norm\.weight F32",
        ),
        ([TABLE[0]], r"only the run has norm\.weight"),
        ([*TABLE, TensorSpec("lm_head.weight", (8, 4), "BF16")], r"only this model has lm_head\.weight"),
    ],
)
def test_resuming_another_models_run_names_the_first_difference(
    bucket: FaultyBucket, ours: list[TensorSpec], says: str
) -> None:
    ChainWriter.create(bucket, RUN)
    with pytest.raises(RunMismatch, match=says):
        ChainWriter.resume(bucket, TensorTable(ours))


def test_parts_then_fence_then_manifest_then_head(bucket: FaultyBucket) -> None:
    writer = ChainWriter.create(bucket, RUN)
    order: list[str] = []

    def look(path: str) -> None:
        there = {stat.path for stat in bucket.inner.list()}
        order.append(path.rpartition("/")[2])
        if path == Layout.HEAD:
            assert Layout.delta(writer.epoch, 1) in there
        else:
            assert any("deltas/00000001" in name for name in there)
            assert bucket.calls["list"] > listed

    listed = bucket.calls["list"]
    bucket.before_commit = look
    commit(writer)
    assert order == ["00000001.json", "head.json"]


def test_a_commit_costs_four_calls_and_an_idle_poll_one(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer)
    reader.newest()
    bucket.calls.clear()
    commit(writer)
    assert bucket.calls == {"put": 1, "list": 1, "commit": 2}
    bucket.calls.clear()
    reader.newest()
    assert bucket.calls == {"read": 1}


# --- failures at every step of a commit -------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("verb", "nth"), [("put", 1), ("list", 1), ("commit", 1), ("commit", 2)])
def test_after_a_failure_anywhere_the_next_commit_continues_the_chain(
    bucket: FaultyBucket, reader: ChainReader, verb: str, nth: int, when: str
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first = commit(writer)
    bucket.fail(verb, nth, when=when)
    failed = None
    try:
        second = commit(writer)
    except BucketUnavailable as error:
        failed = error
        assert reader.plan(RUN.origin).deltas[0] == first  # readable at any time
        second = writer.settle() or first
    assert (failed is None) == ((verb, nth) == ("commit", 2))  # a head that fails is no failure
    assert writer.position == second.position
    third = commit(writer)
    assert third.parent == second.position
    assert reader.newest() == third.position
    assert versions(reader.plan(RUN.origin).deltas) == sorted({1, second.version, third.version})


@pytest.mark.parametrize("error", [BucketUnavailable("injected"), KeyboardInterrupt()], ids=repr)
def test_an_unknown_manifest_that_was_written_counts(bucket: FaultyBucket, error: BaseException) -> None:
    writer = ChainWriter.create(bucket, RUN)
    bucket.fail("commit", when="after", error=error)
    with pytest.raises(type(error)):
        commit(writer)
    with pytest.raises(ChainError, match="settle"):
        commit(writer)
    lost = writer.settle()
    assert lost is not None
    assert lost.version == 1
    assert writer.position == lost.position
    assert writer.settle() is None


def test_a_manifest_whose_answer_was_lost_leaves_its_number_unused_if_it_was_not_written(bucket: FaultyBucket) -> None:
    writer = ChainWriter.create(bucket, RUN)
    epoch = writer.epoch
    bucket.fail("commit", when="before")
    with pytest.raises(BucketUnavailable):
        commit(writer)
    assert writer.settle() is None
    assert writer.epoch > epoch
    assert commit(writer).version > 1  # the lost write of version 1 may still arrive, in the old epoch


def test_settle_can_be_repeated_after_a_failure(bucket: FaultyBucket) -> None:
    writer = ChainWriter.create(bucket, RUN)
    bucket.fail("commit", when="after")
    with pytest.raises(BucketUnavailable):
        commit(writer)
    for verb, nth, when in [("list", 1, "before"), ("commit", 1, "after"), ("list", 3, "before")]:
        bucket.fail(verb, nth, when=when)
        with pytest.raises(BucketUnavailable):
            writer.settle()
    lost = writer.settle()
    assert lost is not None
    assert commit(writer).parent == lost.position


def test_a_head_that_cannot_be_written_is_written_at_the_next_commit(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer)
    reader.newest()
    bucket.fail("commit", 2, when="before")
    second = commit(writer)
    assert "head could not be written" in caplog.text
    assert reader.newest().version == 1  # a hint is all the head is
    assert reader.plan(RUN.origin, to=2).target == second.position  # told of version 2, it finds it
    anchor(writer, tmp_path / "anchor")
    head = reader.head()
    assert head is not None
    assert head.manifest == second


# --- several writers --------------------------------------------------------------------------------


def test_a_replaced_writer_is_fenced_and_commits_nothing(bucket: FaultyBucket, reader: ChainReader) -> None:
    old = ChainWriter.create(bucket, RUN)
    commit(old)
    new = ChainWriter.resume(bucket, TABLE)
    with pytest.raises(Fenced, match="taken over"):
        commit(old)
    second = commit(new)
    assert second.parent == old.position
    assert reader.newest() == second.position


def test_an_old_writer_that_stalls_between_fence_and_manifest_does_no_harm(
    bucket: FaultyBucket, tmp_path: Path
) -> None:
    old = ChainWriter.create(bucket, RUN)
    commit(old)
    follower = ChainReader(bucket, tmp_path / "follower")
    follower.newest()
    stalled = []

    def replaced(path: str) -> None:
        if path.endswith("/00000002.json"):  # the old writer has passed the fence and stops here
            bucket.before_commit = lambda path: None
            new = ChainWriter.resume(bucket, TABLE)
            stalled.append(commit(new))

    bucket.before_commit = replaced
    late = commit(old)
    (new_second,) = stalled
    assert late.version != new_second.version
    head = Head.loads(bucket.read([Layout.HEAD])[Layout.HEAD])
    assert head.manifest == late  # the late writer has overwritten the head
    assert ChainReader(bucket, tmp_path / "fresh").newest() == new_second.position
    assert follower.plan(RUN.origin, to=late.version).target == late.position  # committed, hence readable


def test_the_high_water_mark_is_never_undercut(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first, second = commit(writer), commit(writer)
    assert reader.newest() == second.position
    bucket.commit(Layout.HEAD, Head(first, 1).dumps())
    for _ in range(2):
        assert reader.newest() == second.position
    bucket.delete([Layout.HEAD])
    assert reader.newest() == second.position
    for unusable in (b"{", Head(dataclasses.replace(second, run_id=digest("another run")), 2).dumps()):
        bucket.commit(Layout.HEAD, unusable)
        assert reader.newest() == second.position
    bucket.delete([Layout.delta(writer.epoch, 2)])
    bucket.commit(Layout.HEAD, Head(first, 1).dumps())
    assert reader.newest() == second.position


def test_a_head_behind_the_mark_triggers_a_listing(bucket: FaultyBucket, reader: ChainReader) -> None:
    old = ChainWriter.create(bucket, RUN)
    first, second = commit(old), commit(old)
    assert reader.newest() == second.position
    third = commit(ChainWriter.resume(bucket, TABLE))
    bucket.commit(Layout.HEAD, Head(first, 1).dumps())
    assert reader.newest() == third.position


def test_a_bad_head_costs_one_listing_not_one_per_poll(bucket: FaultyBucket, reader: ChainReader) -> None:
    old = ChainWriter.create(bucket, RUN)
    stale = Head(commit(old), 1).dumps()
    new = ChainWriter.resume(bucket, TABLE)
    second = commit(new)
    assert reader.newest() == second.position
    bucket.commit(Layout.HEAD, stale)
    reader.newest()
    bucket.calls.clear()
    assert reader.newest() == second.position
    assert bucket.calls == {"read": 1}


def test_resume_repairs_the_head_of_a_writer_that_died_before_writing_it(bucket: FaultyBucket) -> None:
    writer = ChainWriter.create(bucket, RUN)
    bucket.fail("commit", 2, when="before")
    first = commit(writer)
    assert not bucket.read([Layout.HEAD])
    ChainWriter.resume(bucket, TABLE)
    assert Head.loads(bucket.read([Layout.HEAD])[Layout.HEAD]).manifest == first


def test_no_two_writers_ever_use_the_same_number(bucket: FaultyBucket) -> None:
    # Each writer is stalled right before its manifest while the next one starts; then all of them wake up.
    numbers: list[int] = []
    depth = itertools.count()

    def stall(path: str) -> None:
        if "/versions/" in path and next(depth) < 4:
            numbers.append(commit(ChainWriter.resume(bucket, TABLE)).version)

    bucket.before_commit = stall
    numbers.append(commit(ChainWriter.create(bucket, RUN)).version)
    assert len(numbers) == 5
    assert len(set(numbers)) == 5


def test_unrelated_weights_restart_the_chain_with_an_anchor(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path
) -> None:
    old = ChainWriter.create(bucket, RUN)
    first = commit(old)
    new = ChainWriter.resume(bucket, TABLE)
    rebased = anchor(new, tmp_path / "anchor", at=Position(new.next_version, digest("other weights")))
    assert rebased.version > first.version
    second = commit(new)
    assert second.parent == rebased.position
    plan = reader.plan(first.position)
    assert (plan.anchor, plan.deltas, plan.target) == (rebased, [second], second.position)
    assert reader.manifests() == [first, rebased, second]
    assert reader.plan(RUN.origin, to=first.version).deltas == [first]


def test_an_uncommitted_anchor_leaves_its_number_unused(bucket: FaultyBucket, tmp_path: Path) -> None:
    writer = ChainWriter.create(bucket, RUN)
    at = Position(writer.next_version, digest("other weights"))
    bucket.fail("put", when="after", error=BucketError("injected"))
    with pytest.raises(BucketError):
        anchor(writer, tmp_path / "anchor", at=at)
    assert writer.next_version == at.version + 1


def test_an_anchor_of_another_version_is_refused(bucket: FaultyBucket, tmp_path: Path) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer)
    with pytest.raises(ChainError, match="an anchor is of the current version 1"):
        anchor(writer, tmp_path / "anchor", at=RUN.origin)


# --- paths ------------------------------------------------------------------------------------------


def test_the_plan_to_the_current_position_is_empty(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    assert reader.plan(RUN.origin).deltas == []
    first = commit(writer)
    plan = reader.plan(first.position)
    assert (plan.start, plan.deltas, plan.nbytes) == (first.position, [], 0)


def test_deltas_lead_from_any_version_of_any_epoch(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    manifests = [commit(writer), commit(writer)]
    writer = ChainWriter.resume(bucket, TABLE)
    manifests += [commit(writer), commit(writer)]
    for start, manifest in enumerate(manifests):
        for target in range(start, len(manifests)):
            plan = reader.plan(manifest.position, to=manifests[target].version)
            assert plan.deltas == manifests[start + 1 : target + 1]
    assert reader.plan(RUN.origin).deltas == manifests


def test_a_long_chain_is_read_in_few_calls(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    for _ in range(300):
        commit(writer)
    bucket.calls.clear()
    assert len(reader.plan(None, base_available=True).deltas) == 300
    assert sum(bucket.calls.values()) <= 8


def test_the_newest_anchor_on_the_way_or_the_base_whichever_is_fewer_bytes(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first = commit(writer)
    with pytest.raises(NoPath, match=r"no deltas lead there.*deltas to versions 1\.\.1 and no anchors"):
        reader.plan(None)
    assert reader.plan(None, base_available=True).base
    anchored = anchor(writer, tmp_path / "anchor", size=1000)
    assert reader.plan(None).anchor == anchored
    assert reader.plan(None, base_available=True).base  # 100 bytes of delta against 1002 of anchor
    bulky = [commit(writer, 2000), commit(writer)]
    assert (reader.plan(None).anchor, reader.plan(None).deltas) == (anchored, bulky)
    assert reader.plan(first.position).deltas == bulky
    newest = anchor(writer, tmp_path / "anchor2", size=1000)
    plan = reader.plan(None, base_available=True)
    assert (plan.anchor, plan.base, plan.deltas) == (newest, False, [])


def test_an_anchor_of_an_older_epochs_version_is_found(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path
) -> None:
    first = commit(ChainWriter.create(bucket, RUN))
    reader.newest()
    resumed = ChainWriter.resume(bucket, TABLE)
    anchored = anchor(resumed, tmp_path / "anchor")
    assert anchored.position == first.position
    assert reader.plan(None).anchor == anchored
    assert reader.plan(RUN.origin).deltas == [first]
    assert commit(ChainWriter.resume(bucket, TABLE)).parent_epoch == first.epoch
    fresh = ChainReader(bucket, tmp_path / "fresh")
    assert versions(fresh.manifests()) == [1, 1, 4]
    assert [m.kind for m in fresh.manifests()] == ["delta", "anchor", "delta"]


def test_no_path_starts_at_an_unknown_position(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer), commit(writer)
    stranger = Position(1, digest("somebody else's version 1"))
    with pytest.raises(NoPath, match="from version 1"):
        reader.plan(stranger)
    assert reader.plan(stranger, base_available=True).base


def test_no_path_leads_to_an_unknown_version(bucket: FaultyBucket, reader: ChainReader) -> None:
    commit(ChainWriter.create(bucket, RUN))
    with pytest.raises(NoPath, match=r"version 9 is not in .*deltas to versions 1\.\.1"):
        reader.plan(None, to=9, base_available=True)


def test_deltas_lead_back_to_version_0(bucket: FaultyBucket, reader: ChainReader, tmp_path: Path) -> None:
    writer = ChainWriter.create(bucket, dataclasses.replace(RUN, base=Base()))
    zero = anchor(writer, tmp_path / "anchor")
    first = commit(writer)
    assert reader.plan(first.position, to=0).steps == (Step(first, inverse=True),)
    assert reader.plan(None).deltas == [first]
    bulky = commit(writer, size=5000)
    assert reader.plan(bulky.position, to=0).anchor == zero
    assert reader.plan(bulky.position, to=0, base_available=True).base


def test_the_path_back_undoes_deltas_newest_first(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    manifests = [commit(writer) for _ in range(4)]
    plan = reader.plan(manifests[3].position, to=2)
    assert plan.steps == (Step(manifests[3], inverse=True), Step(manifests[2], inverse=True))
    assert [(step.start, step.end) for step in plan.steps] == [
        (manifests[3].position, manifests[2].position),
        (manifests[2].position, manifests[1].position),
    ]
    assert (plan.start, plan.target) == (manifests[3].position, manifests[1].position)


def test_compact_deltas_are_not_undone(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer)
    two = writer.commit_delta([b"compact"], digest=digest(2), changed=1, encoding=Encoding.COMPACT)
    with pytest.raises(NoPath):
        reader.plan(two.position, to=1)
    assert reader.plan(two.position, to=1, base_available=True).base


def test_a_path_leads_from_a_dead_branch_to_the_chain(bucket: FaultyBucket, reader: ChainReader) -> None:
    old = ChainWriter.create(bucket, RUN)
    first = commit(old)
    replaced = []

    def replace(path: str) -> None:
        if path.endswith("/00000002.json"):
            bucket.before_commit = lambda path: None
            replaced.append(commit(ChainWriter.resume(bucket, TABLE)))

    bucket.before_commit = replace
    dead = commit(old)
    assert reader.newest() == replaced[0].position
    assert reader.plan(dead.position).steps == (Step(dead, inverse=True), Step(replaced[0]))
    assert replaced[0].parent == first.position


# --- which version is served ------------------------------------------------------------------------


def test_the_newest_version_is_served_by_default(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    assert reader.served() == RUN.origin
    first = commit(writer)
    assert reader.served() == first.position
    saved = writer.commit_delta([b"saved"], digest=digest("saved"), changed=1, info=VersionInfo(serve=False))
    assert (reader.newest(), reader.served()) == (saved.position, first.position)
    writer.serve(saved.version)
    assert reader.served() == saved.position


def test_a_rollback_changes_only_the_served_version(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first, second = commit(writer), commit(writer)
    assert reader.served() == second.position
    assert writer.serve(1) == first.position
    assert (reader.newest(), reader.served()) == (second.position, first.position)
    assert writer.serve(0) == RUN.origin
    assert reader.served() == RUN.origin
    third = commit(writer)
    assert third.parent == second.position
    assert reader.served() == third.position


def test_only_existing_versions_can_be_served(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    assert writer.serve(0) == RUN.origin
    first = commit(writer)
    with pytest.raises(ChainError, match="version 9 is not in"):
        writer.serve(9)
    assert reader.served() == first.position
    bucket.commit(Layout.HEAD, Head(first, serve=9).dumps())
    assert reader.served() == first.position
    ChainWriter.resume(bucket, TABLE)
    with pytest.raises(Fenced):
        writer.serve(0)


def test_polling_the_served_version_costs_one_call(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer), commit(writer)
    writer.serve(1)
    reader.served()
    bucket.calls.clear()
    reader.served()
    assert bucket.calls == {"read": 1}


def test_the_head_of_a_stalled_writer_does_not_decide_the_served_version(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path
) -> None:
    old = ChainWriter.create(bucket, RUN)
    first, second = commit(old), commit(old)
    new = ChainWriter.resume(bucket, TABLE)
    third = commit(new)
    new.serve(2)
    assert reader.served() == second.position
    bucket.commit(Layout.HEAD, Head(second, serve=1).dumps())  # the old writer wakes up
    assert reader.served() == second.position  # this reader has seen what the new one wants
    assert ChainReader(bucket, tmp_path / "fresh").served() == third.position  # and this one what it published
    for unreadable in (b"", b"{"):
        bucket.commit(Layout.HEAD, unreadable)
        assert reader.served() == second.position
    fourth = commit(new)
    assert reader.served() == fourth.position
    assert first.parent == RUN.origin


def test_without_a_head_the_newest_manifest_decides_the_served_version(bucket: FaultyBucket, tmp_path: Path) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first = commit(writer)
    writer.commit_delta([b"saved"], digest=digest("saved"), changed=1, info=VersionInfo(serve=False))
    bucket.delete([Layout.HEAD])
    assert ChainReader(bucket, tmp_path / "cache").served() == first.position
    assert ChainWriter.resume(bucket, TABLE).serving == first.version


def test_resume_keeps_the_served_version(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first, _ = commit(writer), commit(writer)
    writer.serve(1)
    resumed = ChainWriter.resume(bucket, TABLE)
    assert (resumed.serving, reader.served()) == (1, first.position)
    resumed.commit_delta([b"saved"], digest=digest("saved"), changed=1, info=VersionInfo(serve=False))
    assert reader.served() == first.position


def test_an_anchor_of_the_newest_version_by_the_next_writer_changes_nothing(
    bucket: FaultyBucket, tmp_path: Path
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first, _ = commit(writer), commit(writer)
    resumed = ChainWriter.resume(bucket, TABLE)
    anchor(resumed, tmp_path / "anchor")
    resumed.serve(1)
    assert ChainReader(bucket, tmp_path / "cache").served() == first.position
    assert ChainWriter.resume(bucket, TABLE).serving == 1


def test_a_head_that_was_not_written_is_repeated_with_the_next_commit(
    bucket: FaultyBucket, reader: ChainReader
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first, _ = commit(writer), commit(writer)
    bucket.fail("commit")
    with pytest.raises(BucketUnavailable):
        writer.serve(1)
    writer.commit_delta([b"saved"], digest=digest("saved"), changed=1, info=VersionInfo(serve=False))
    assert reader.served() == first.position


# --- what is gone -----------------------------------------------------------------------------------


def test_a_missing_part_makes_the_reader_take_another_path(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first, second = commit(writer), commit(writer)
    anchored = anchor(writer, tmp_path / "anchor", size=9000)
    bucket.delete([Layout.part(second, second.parts[0])])
    taken = []

    def use(plan: Plan) -> Plan:
        taken.append(plan)
        for delta in plan.deltas:
            reader.fetch(delta)
        return plan

    assert reader.carry_out(lambda: reader.plan(first.position), use).anchor == anchored
    assert taken[0].deltas == [second]
    bucket.delete([Layout.manifest(anchored)])
    with pytest.raises(NoPath):
        reader.carry_out(lambda: reader.plan(first.position), use)


def test_positions_are_found_by_digest(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first, second = commit(writer), commit(writer)
    assert reader.find(first.position.digest) == first.position
    assert reader.find(second.position.digest) == second.position
    assert reader.find(RUN.digest) == RUN.origin
    assert reader.find(digest("never")) is None


def test_republished_weights_of_version_0_are_found_where_deltas_continue(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path
) -> None:
    commit(ChainWriter.create(bucket, RUN))
    restarted = ChainWriter.resume(bucket, TABLE)
    again = anchor(restarted, tmp_path / "anchor", at=Position(restarted.next_version, RUN.digest))
    last = commit(restarted)
    have = reader.find(RUN.digest)
    assert have == again.position
    assert reader.plan(have).deltas == [last]


def test_a_hub_bucket_and_a_directory_hold_the_same_run(hub_bucket: HubBucket, tmp_path: Path) -> None:
    bucket = FaultyBucket(hub_bucket)
    old = ChainWriter.create(bucket, RUN)
    first = commit(old)
    new = ChainWriter.resume(bucket, TABLE)
    anchored = anchor(new, tmp_path / "anchor")
    second = commit(new)
    with pytest.raises(Fenced):
        commit(old)
    reader = ChainReader(bucket, tmp_path / "cache")
    assert reader.manifests() == [first, anchored, second]
    assert reader.plan(RUN.origin).deltas == [first, second]
    assert reader.plan(None).anchor == anchored
    assert [path.stat().st_size for path in reader.fetch(second)] == [100]


# --- hostile or damaged documents -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epoch": "00000009-00000000"}, "holds the manifest of"),
        ({"position": Position(3, digest("x"))}, "holds the manifest of"),
        ({"run_id": digest("another run")}, "another run"),
        ({"table_hash": digest(1) + digest(2)}, "another run"),
        ({"parent": Position(1, digest("not what version 1 is"))}, "names version 1"),
    ],
)
def test_a_manifest_that_does_not_belong_where_it_lies_is_refused(
    bucket: FaultyBucket, reader: ChainReader, change: dict, says: str
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer)
    second = commit(writer)
    bucket.delete([Layout.HEAD])
    bucket.commit(Layout.delta(writer.epoch, 2), dataclasses.replace(second, **change).dumps())
    with pytest.raises(FormatError, match=says):
        reader.plan(RUN.origin)


def test_an_unreadable_manifest_is_named(bucket: FaultyBucket, reader: ChainReader) -> None:
    path = Layout.delta(ChainWriter.create(bucket, RUN).epoch, 1)
    bucket.commit(path, b"{}")
    with pytest.raises(FormatError, match=f"{path}: .*upgrade hubsync"):
        reader.newest()


@pytest.mark.parametrize("name", ["README", "backup/head.json", "zzz/versions/00000009.json", "00000009/epoch.json"])
def test_other_names_below_epochs_are_ignored(bucket: FaultyBucket, reader: ChainReader, name: str) -> None:
    writer = ChainWriter.create(bucket, RUN)
    bucket.commit(f"{Layout.EPOCHS}/{name}", b"not ours")
    commit(writer)
    last = commit(ChainWriter.resume(bucket, TABLE))
    assert reader.newest() == last.position


def test_a_run_with_the_last_possible_epoch_cannot_be_resumed(bucket: FaultyBucket) -> None:
    ChainWriter.create(bucket, RUN)
    bucket.commit(Layout.epoch("99999999-00000000"), b"{}")
    before = [stat.path for stat in bucket.list()]
    with pytest.raises(ChainError, match="choose another prefix"):
        ChainWriter.resume(bucket, TABLE)
    assert [stat.path for stat in bucket.list()] == before


def test_a_false_version_0_is_refused(bucket: FaultyBucket, reader: ChainReader) -> None:
    writer = ChainWriter.create(bucket, RUN)
    first = commit(writer)
    forged = dataclasses.replace(first, parent=Position(0, digest("another base")))
    bucket.commit(Layout.delta(writer.epoch, 1), forged.dumps())
    bucket.delete([Layout.HEAD])
    with pytest.raises(FormatError, match=r"run\.json another version 0"):
        reader.plan(None, base_available=True)


def test_a_missing_manifest_cuts_the_chain_there(bucket: FaultyBucket, reader: ChainReader, tmp_path: Path) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer), commit(writer)
    anchored = anchor(writer, tmp_path / "anchor")
    last = commit(writer)
    bucket.delete([Layout.delta(writer.epoch, 1), Layout.delta(writer.epoch, 2)])
    plan = reader.plan(RUN.origin, base_available=True)
    assert (plan.anchor, plan.deltas) == (anchored, [last])


# --- files ------------------------------------------------------------------------------------------


def test_fetched_parts_are_the_bytes_that_were_committed(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    file = tmp_path / "rank1.safetensors"
    file.write_bytes(b"of rank one")
    manifest = writer.commit_delta([b"of rank zero", file], digest=digest(1), changed=2)
    assert [path.read_bytes() for path in reader.fetch(manifest)] == [b"of rank zero", b"of rank one"]


def test_an_anchor_is_fetched_into_one_loadable_directory(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path
) -> None:
    manifest = anchor(ChainWriter.create(bucket, RUN), tmp_path / "anchor")
    paths = reader.fetch(manifest)
    assert {path.name for path in paths} == {"model.safetensors", "config.json"}
    assert len({path.parent for path in paths}) == 1


def test_damaged_parts_are_never_handed_out(bucket: FaultyBucket, reader: ChainReader, tmp_path: Path) -> None:
    manifest = commit(ChainWriter.create(bucket, RUN))
    stored = Path(bucket.address) / Layout.part(manifest, manifest.parts[0])
    stored.write_bytes(b"\xff" * manifest.parts[0].size)
    with pytest.raises(ObjectCorrupt):
        reader.fetch(manifest)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_trim_evicts_the_least_recently_used_files_but_not_the_last_fetch(
    bucket: FaultyBucket, reader: ChainReader
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    paths = [reader.fetch(commit(writer))[0] for _ in range(3)]
    reader.trim(keep_bytes=200)
    assert [path.exists() for path in paths] == [False, True, True]
    reader.trim(keep_bytes=0)
    assert [path.exists() for path in paths] == [False, False, True]


# --- what a host remembers


def test_a_new_reader_of_a_host_takes_no_older_version_for_the_newest(bucket: FaultyBucket, tmp_path: Path) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer)
    old_head = bucket.read([Layout.HEAD])[Layout.HEAD]
    newest = commit(writer)
    assert ChainReader(bucket, tmp_path / "cache").newest() == newest.position
    bucket.delete([Layout.manifest(newest)])
    bucket.commit(Layout.HEAD, old_head)
    assert ChainReader(bucket, tmp_path / "cache").newest() == newest.position
    assert ChainReader(bucket, tmp_path / "another host").newest().version == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"garbage"])
def test_a_damaged_high_water_mark_is_ignored(bucket: FaultyBucket, tmp_path: Path, content: bytes) -> None:
    newest = commit(ChainWriter.create(bucket, RUN))
    ChainReader(bucket, tmp_path / "cache").newest()
    (memory,) = (tmp_path / "cache").glob("*.newest.json")
    memory.write_bytes(content)
    assert ChainReader(bucket, tmp_path / "cache").newest() == newest.position


def test_a_cache_that_cannot_be_written_is_no_failure_and_said_once(
    bucket: FaultyBucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer)
    (tmp_path / "a file").write_text("nothing can be written below it, as on a full disk")
    reader = ChainReader(bucket, tmp_path / "a file" / "cache")
    assert reader.newest().version == 1
    commit(writer)
    assert reader.newest().version == 2
    assert len([message for message in caplog.messages if "cannot record the newest version" in message]) == 1


def test_a_head_that_is_too_large_is_not_parsed_and_not_in_the_way(
    bucket: FaultyBucket, reader: ChainReader, tmp_path: Path
) -> None:
    newest = commit(ChainWriter.create(bucket, RUN))
    (tmp_path / "bucket" / Layout.HEAD).write_bytes(b" " * (MAX_BYTES + 1))
    assert reader.newest() == newest.position


def test_a_new_reader_can_require_a_fresh_head(bucket: FaultyBucket, tmp_path: Path) -> None:
    writer = ChainWriter.create(bucket, RUN)
    with pytest.raises(HeadTooOld, match="it does not exist"):
        ChainReader(bucket, tmp_path / "a", max_head_age=60).newest()
    newest = commit(writer)
    assert ChainReader(bucket, tmp_path / "b", max_head_age=60).newest() == newest.position
    head = Head.loads(bucket.read([Layout.HEAD])[Layout.HEAD])
    bucket.commit(Layout.HEAD, dataclasses.replace(head, written=head.written - 100).dumps())
    with pytest.raises(HeadTooOld, match=r"was written 10[01] s ago"):
        ChainReader(bucket, tmp_path / "c", max_head_age=60).newest()
    assert ChainReader(bucket, tmp_path / "b", max_head_age=60).newest() == newest.position, "it has joined before"


def test_the_age_of_a_head_is_measured_by_the_storages_clock(
    bucket: FaultyBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(ChainWriter.create(bucket, RUN))
    written = bucket.stat([Layout.HEAD])[Layout.HEAD].modified
    assert written is not None
    monkeypatch.setattr(bucket, "now", lambda: written + 100, raising=False)
    with pytest.raises(HeadTooOld, match=r"was written 10[01] s ago"):
        ChainReader(bucket, tmp_path / "b", max_head_age=60).newest()


def test_a_rewritten_head_is_fresh(bucket: FaultyBucket, tmp_path: Path) -> None:
    writer = ChainWriter.create(bucket, RUN)
    commit(writer)
    newest = commit(writer)
    writer.serve(1)
    reader = ChainReader(bucket, tmp_path / "cache", max_head_age=60)
    assert (reader.served().version, reader.newest()) == (1, newest.position)
