"""Real processes are killed and stalled: every committed version stays readable, and the run can be continued."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import replay
from hubsync.format.digest import digest_view
from hubsync.kernels.bits import bits_of
from tests.support.processes import follower, publisher, weights

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the state of processes in /proc")

BASE: dict[str, Any] = {"base_model": "made/here"}  # version 0 is known: the weights of step 0


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


def assert_readable(address: Path, tmp_path: Path, versions: dict[int, int], *, base: bool = True) -> None:
    """Each version of {version: step} replays to the weights of its step."""
    for version, step in versions.items():
        reader = ChainReader(LocalBucket(address), tmp_path / "cache")
        view = replay(reader, reader.plan(None, version, base_available=base), weights(0) if base else None)
        expected = weights(step)
        assert all(bits_of(view.tensors[name]).tolist() == bits_of(expected[name]).tolist() for name in expected)


def newest(address: Path, tmp_path: Path) -> int:
    return ChainReader(LocalBucket(address), tmp_path / "cache").newest().version


PLACES = {
    "before the parts": ("put", "/deltas/"),
    "between parts and manifest": ("commit", "/versions/"),
    "between manifest and head": ("commit", "head.json"),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_next_publisher_continues_after_one_killed_in_a_commit(address: Path, tmp_path: Path, place: str) -> None:
    with publisher(address, first=0, last=1, **BASE) as child:
        assert child.expect("published") == (1, 1)
        child.expect("closed")
    committed = {0: 0, 1: 1}
    with publisher(address, first=1, last=2, stop=PLACES[place]) as child:
        child.expect_stop()
        child.kill()
    step = 1
    if place == "between manifest and head":
        step = 2
        committed[newest(address, tmp_path)] = 2
    assert newest(address, tmp_path) == max(committed)
    assert_readable(address, tmp_path, committed)
    with publisher(address, first=step, last=step + 2) as child:
        for _ in range(2):
            trained, version = child.expect("published")
            assert version not in committed
            committed[version] = trained
        child.expect("closed")
    assert newest(address, tmp_path) == max(committed)
    assert_readable(address, tmp_path, committed)
    kinds = {manifest.kind for manifest in ChainReader(LocalBucket(address), tmp_path / "cache").manifests()}
    assert kinds == {"delta"}


def test_a_trainer_that_lost_steps_publishes_a_delta_back(address: Path, tmp_path: Path) -> None:
    with publisher(address, first=0, last=3, **BASE) as child:
        for _ in range(3):
            child.expect("published")
        child.kill()
    with publisher(address, first=2, last=4) as child:  # its own checkpoint was one step older than the run
        versions = dict(reversed(child.expect("published")) for _ in range(2))
    assert_readable(address, tmp_path, {1: 1, 2: 2, 3: 3, **versions})
    assert newest(address, tmp_path) == max(versions)
    assert not list(address.glob("epochs/*/anchors"))


@pytest.mark.parametrize("place", ["epoch.json", "/anchors/00000000/model", "/anchors/00000000/manifest.json"])
def test_the_next_publisher_completes_a_run_whose_creator_was_killed(address: Path, tmp_path: Path, place: str) -> None:
    verb = "put" if place.endswith("model") else "commit"
    with publisher(address, first=0, last=1, stop=(verb, place)) as child:
        child.expect_stop()
        child.kill()
    with publisher(address, first=0, last=1) as child:
        _, version = child.expect("published")
    assert_readable(address, tmp_path, {0: 0, version: 1}, base=False)


@pytest.mark.parametrize("stop", [("put", "/deltas/00000002"), ("commit", "/versions/00000002")])
def test_a_stalled_publisher_that_resumes_after_its_successor_started_is_fenced(
    address: Path, tmp_path: Path, stop: tuple[str, str]
) -> None:
    with publisher(address, first=0, last=3, stop=stop, **BASE) as old:
        assert old.expect("published") == (1, 1)
        old.expect_stop()
        versions = {1: 1}
        with publisher(address, first=1, last=3) as new:
            for _ in range(2):
                step, version = new.expect("published")
                versions[version] = step
            new.expect("closed")
        old.wake()
        if stop[0] == "commit":  # it had passed the fence: a dead branch, but readable
            assert old.expect("published") == (2, 2)
            assert 2 not in versions
            assert_readable(address, tmp_path, {2: 2})
        assert old.expect("error") == "Fenced"
    assert newest(address, tmp_path) == max(versions)
    assert_readable(address, tmp_path, versions)
    with publisher(address, first=3, last=4) as last:
        _, version = last.expect("published")
    assert_readable(address, tmp_path, {**versions, version: 4})


def test_early_and_late_followers_catch_up(address: Path, tmp_path: Path) -> None:
    with publisher(address, first=0, last=20, stop=("commit", "/versions/00000003"), **BASE) as trainer:
        trainer.expect("published")
        trainer.expect("published")
        with follower(address, tmp_path / "early", until=20) as early:
            trainer.expect_stop()
            trainer.wake()
            with follower(address, tmp_path / "late", until=20) as late:
                table = ChainReader(LocalBucket(address), tmp_path / "cache").run().table
                expected = 20, digest_view(table, weights(20)).hex
                assert early.expect("at") == expected
                assert late.expect("at") == expected
