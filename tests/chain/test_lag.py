"""Runs in a bucket that shows writes late: nothing is lost, no version number is used twice, readers never go back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket.base import Bucket
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader, ChainWriter, Layout
from hubsync.chain.creation import Claim, claimed
from hubsync.chain.replay import replay
from hubsync.chain.serving import serve
from hubsync.errors import BucketUnavailable, Fenced, RunMismatch
from hubsync.format.manifest import Base, Run
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.localhub import LocalHub
from tests.support.faults import FaultyBucket
from tests.support.fixtures_hub import TOKEN
from tests.support.history import History

LAG = 0.25  # seconds


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubsync.bucket.hub.LAG_SECONDS", 20.0)
    monkeypatch.setattr("hubsync.bucket.hub._RESEND_SECONDS", 10.0)


def test_a_run_is_created_and_continued(hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path) -> None:
    local_hub.lag(LAG)
    history = History(hub_bucket)
    first = history.publish()
    history.resume()
    second = history.publish()
    assert second.parent == first.position
    local_hub.reset()
    reader = ChainReader(hub_bucket, tmp_path)
    assert [m.position for m in reader.manifests()] == [first.position, second.position]


def begin(bucket: Bucket, run: Run) -> ChainWriter:
    """As a trainer that joins the run, whatever its run would be called."""
    with claimed(bucket, lambda: run) as new:
        return ChainWriter.resume(bucket, run.table) if new is None else ChainWriter.create(bucket, new)


def new_run(number: int) -> Run:
    table = TensorTable([TensorSpec("weight", (4, 64), "BF16")])
    return Run(f"{number:032x}", table, "0" * 32, Base("base/model"), 1.0)


def run_in(bucket: Bucket) -> str:
    return Run.loads(bucket.read([Layout.RUN])[Layout.RUN]).run_id


def test_a_trainer_restarted_before_its_run_is_visible_joins_it(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    """It died right after it had created the run."""
    local_hub.lag(1.0)
    faulty = FaultyBucket(hub_bucket)

    def die_afterwards(path: str) -> None:
        if path == Layout.RUN:
            faulty.fail("commit", when="after", error=KeyboardInterrupt())

    faulty.before_commit = die_afterwards
    with pytest.raises(KeyboardInterrupt):
        begin(faulty, new_run(1))
    assert not hub_bucket.read([Layout.RUN]), "it is not visible yet"
    again = begin(hub_bucket, new_run(2))
    assert again.run.run_id == new_run(1).run_id
    local_hub.reset()
    assert run_in(hub_bucket) == new_run(1).run_id
    assert not list(hub_bucket.list(Layout.CLAIMS))


def test_a_trainer_that_must_create_a_run_refuses_one_that_was_invisible(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", local_hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    local_hub.lag(0.5)
    hub_bucket.commit(Layout.RUN, new_run(1).dumps())
    with pytest.raises(RunMismatch, match="already holds a run, and resume is False"):
        DeltaWeightTransferEngine(torch.nn.Linear(2, 2), None, SyncConfig(bucket=hub_bucket.address, resume=False))
    local_hub.reset()
    assert run_in(hub_bucket) == new_run(1).run_id


@pytest.mark.parametrize("lag", [0.0, LAG])
def test_trainers_that_start_at_once_never_make_two_runs(
    hub_bucket: HubBucket, local_hub: LocalHub, lag: float
) -> None:
    """One creates it. The others join it, and the newest of them goes on."""
    local_hub.lag(lag)
    with ThreadPoolExecutor(3) as pool:
        runs = [one.run.run_id for one in pool.map(lambda number: begin(hub_bucket, new_run(number)), range(3))]
    local_hub.reset()
    assert set(runs) == {run_in(hub_bucket)}
    assert not hub_bucket.list(Layout.CLAIMS)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of claims, in the order in which they are written."""
    given = iter(["5", "7", "1", "8", "6"])
    monkeypatch.setattr("hubsync.chain.creation.secrets", SimpleNamespace(token_hex=lambda size: next(given)))


def written_claim(bucket: Bucket) -> Claim:
    claim = Claim(bucket)
    claim.write()
    return claim


def test_of_trainers_that_all_see_others_one_creates_the_run(hub_bucket: HubBucket, names: None) -> None:
    first, second, third = (written_claim(hub_bucket) for _ in range(3))
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(claim.wins) for claim in (first, second)]
        assert third.wins(), "once the others have withdrawn their claims"
        assert [stat.path for stat in hub_bucket.list(Layout.CLAIMS)] == [Layout.claim("1")]
        assert not any(other.done() for other in others)
        hub_bucket.commit(Layout.RUN, new_run(1).dumps())
        assert not any(other.result() for other in others)


def test_the_next_trainer_goes_on_if_the_first_one_fails(hub_bucket: HubBucket, names: None) -> None:
    first, second = written_claim(hub_bucket), written_claim(hub_bucket)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second.wins)
        assert first.wins()
        first.withdraw()
        assert other.result()
    assert [stat.path for stat in hub_bucket.list(Layout.CLAIMS)] == [Layout.claim("1")], "a claim of its own"


def test_a_claim_of_a_trainer_that_died_delays_the_next_one_and_no_more(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hubsync.bucket.hub.LAG_SECONDS", 0.5)
    monkeypatch.setattr("hubsync.retry.REPORT_SECONDS", 0.1)
    hub_bucket.commit(Layout.claim("00000000"), b"{}")
    assert begin(hub_bucket, new_run(1)).run.run_id == run_in(hub_bucket) == new_run(1).run_id
    assert "still waiting for another trainer that creates a run" in caplog.text


def test_a_run_that_was_just_deleted_is_not_continued(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    history = History(hub_bucket)
    local_hub.lag(LAG)
    hub_bucket.delete([Layout.RUN])
    with pytest.raises(RunMismatch, match="was deleted or replaced a moment ago: start again"):
        ChainWriter.resume(hub_bucket, history.table)


def test_a_replaced_writer_commits_at_most_one_version_and_its_number_is_left_out(
    hub_bucket: HubBucket, local_hub: LocalHub
) -> None:
    old = History(hub_bucket)
    old.publish()
    local_hub.lag(LAG)
    new = ChainWriter.resume(hub_bucket, old.table)
    late: list[int] = []

    def publish() -> None:
        for _ in range(3):
            late.append(old.publish().version)

    with pytest.raises(Fenced):
        publish()
    assert len(late) <= 1
    assert new.next_version not in late


def test_epochs_that_were_invisible_do_not_fence_the_newest_writer(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    history = History(hub_bucket)
    names = [history.writer.epoch]
    local_hub.lag(LAG)
    for _ in range(4):
        history.resume()
        names.append(history.writer.epoch)
    assert names == sorted(names)
    history.publish()


def test_two_writers_that_open_an_epoch_at_once_get_different_ones(
    hub_bucket: HubBucket, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = History(hub_bucket)
    hub_bucket.commit("epochs/00000003-ffffffff/epoch.json", b"{}")  # higher than the one that is opened now
    monkeypatch.setattr(
        "hubsync.chain.epochs._epochs",
        lambda bucket: [history.writer.epoch],  # a listing that does not show it yet
    )
    writer = ChainWriter.resume(hub_bucket, history.table)
    assert writer.epoch > "00000003-ffffffff"


def test_a_lost_commit_that_is_invisible_at_first_is_found(hub_bucket: HubBucket, local_hub: LocalHub) -> None:
    faulty = FaultyBucket(hub_bucket)
    history = History(faulty)
    local_hub.lag(LAG)
    faulty.fail("commit", when="after")
    with pytest.raises(BucketUnavailable):
        history.publish()
    lost = history.writer.settle()
    assert lost is not None
    assert history.writer.position == lost.position


def test_a_reader_that_is_told_of_a_version_waits_until_it_is_visible(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path
) -> None:
    history = History(hub_bucket)
    history.publish()
    reader = history.reader(tmp_path)
    reader.newest()
    local_hub.lag(LAG)
    told = history.publish()
    assert history.go(reader, history.views and reader.newest(), to=told.version).target == told.position


def test_a_rollback_from_outside_survives_a_version_that_was_invisible(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path
) -> None:
    history = History(hub_bucket)
    first, reader = history.publish(), history.reader(tmp_path)
    local_hub.lag(LAG)
    history.publish()
    serve(hub_bucket, reader, first.version)
    local_hub.reset()
    assert history.reader(tmp_path / "another").served() == first.position


def test_the_newest_version_never_goes_back(hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path) -> None:
    history = History(hub_bucket)
    reader, seen = history.reader(tmp_path), []
    local_hub.lag(LAG)
    for _ in range(6):
        history.publish()
        seen.append(reader.newest().version)
    assert seen == sorted(seen)


def test_every_change_arrives_although_answers_are_lost_and_names_are_late(
    hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 4: the baseline advances with a durable version, and not without one."""
    monkeypatch.setattr("hubsync.bucket.hub_api.PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("HF_ENDPOINT", local_hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    local_hub.lag(LAG)
    model = torch.nn.Linear(32, 32, bias=False)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=hub_bucket.address)) as engine:
        for turn in range(5):
            with torch.no_grad():
                model.weight += 0.01
            local_hub.fail("/batch", lose_answer=True, times=1 + turn % 2)
            engine.publish().result()
        expected = engine.position
    local_hub.reset()
    reader = ChainReader(hub_bucket, tmp_path)
    view = replay(reader, reader.plan(None))
    view.verify()
    assert view.position == expected
