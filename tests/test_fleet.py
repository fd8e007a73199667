"""What a quorum means, and what TRL's versions mean. The servers are real sockets that speak like vLLM where asked to.

`Script` stands in for a server that follows: what it does is written by the test. Real ones are in test_async_grpo.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from hubsync.errors import ConfigError, HubsyncError, NoPath, ReplicaError, ReplicaRefused, ReplicaUnreachable
from hubsync.integrations.async_trl import Calendar
from hubsync.integrations.rollouts import UNKNOWN, versions_of
from hubsync.manifest import Position
from hubsync.replica.fleet import Fleet
from hubsync.replica.server import VLLMServer
from hubsync.replica.sync import CommitReport, Replica

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


def position(version: int) -> Position:
    return Position(version, f"{version:032x}")


@dataclass
class Script(Replica):
    """A replica that commits at once, or as it is told to."""

    url: str
    on_commit: Callable[[Position], None] = lambda position: None
    commits: list[Position] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(VLLMServer(self.url))

    def status(self) -> Any:
        return type("Status", (), {"position": position(0)})

    def wait_staged(self, position: Position, timeout: float = 0.0) -> None: ...

    def commit(self, position: Position) -> CommitReport:
        self.on_commit(position)
        self.commits.append(position)
        return CommitReport(position, 0.0, 0.0, 0.0, 1)


def refuse(error: HubsyncError) -> Callable[[Position], None]:
    def on_commit(position: Position) -> None:
        raise error

    return on_commit


@pytest.fixture
def fleet() -> Any:
    made: list[Fleet] = []

    def make(*replicas: Replica, **options: Any) -> Fleet:
        made.append(Fleet(replicas, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_all_servers_must_serve_a_position_unless_a_quorum_is_named(fleet: Any) -> None:
    dead = Replica(VLLMServer(NOBODY))
    with pytest.raises(ReplicaError, match=rf"1 of 2 servers serve .*, and 2 must\. {NOBODY}: cannot connect"):
        fleet(Script("http://a"), dead).deliver(position(1), timeout=3)


def test_a_quorum_does_without_the_rest_and_says_why(fleet: Any) -> None:
    delivery = fleet(Script("http://a"), Replica(VLLMServer(NOBODY)), quorum=1).deliver(position(1))
    assert [commit.position for commit in delivery.commits] == [position(1)]
    assert list(delivery.behind) == [NOBODY]


def test_a_slow_server_is_not_waited_for_and_goes_straight_to_the_newest_position(fleet: Any) -> None:
    entered, released = threading.Event(), threading.Event()

    def hold(position: Position) -> None:
        entered.set()
        assert released.wait(30)

    slow = Script("http://slow", hold)
    two = fleet(Script("http://fast"), slow, quorum=1)
    two.deliver(position(1))
    assert entered.wait(30)
    for version in (2, 3, 4):
        assert two.deliver(position(version)).behind == {"http://slow": "still on its way"}
    released.set()
    two.quorum = 2
    two.deliver(position(5))
    assert slow.commits[0] == position(1)
    assert position(2) not in slow.commits
    assert slow.commits[-1] == position(5)


def test_servers_that_refuse_end_it_before_the_time_is_up(fleet: Any) -> None:
    refusing = Script("http://a", refuse(ReplicaRefused("wrong model")))
    with pytest.raises(ReplicaError, match=r"http://a: wrong model"):
        fleet(refusing, Script("http://b")).deliver(position(1), timeout=1e6)


def test_the_only_server_fails_with_its_own_error(fleet: Any) -> None:
    with pytest.raises(ReplicaUnreachable, match="cannot connect"):
        fleet(Replica(VLLMServer(NOBODY))).deliver(position(1), timeout=2)


def test_a_server_that_comes_back_in_time_is_not_missed(fleet: Any) -> None:
    tries: list[Position] = []

    def first_time_not(position: Position) -> None:
        tries.append(position)
        if len(tries) == 1:
            raise ReplicaUnreachable("starting")

    assert fleet(Script("http://a", first_time_not)).deliver(position(1)).behind == {}
    assert len(tries) == 2


def test_a_way_is_made_for_a_server_that_has_none(fleet: Any) -> None:
    ways: list[str] = []

    def no_way_yet(position: Position) -> None:
        if not ways:
            raise NoPath("too far behind")

    fleet(Script("http://a", no_way_yet), make_path=lambda: ways.append("anchor")).deliver(position(1))
    assert ways == ["anchor"]


@pytest.mark.parametrize("quorum", [0, 3])
def test_a_quorum_is_of_the_servers(quorum: int) -> None:
    with pytest.raises(ConfigError, match="between 1 and the number of servers"):
        Fleet([Script("http://a"), Script("http://b")], quorum=quorum)


# --- what a version of the run is to TRL


def test_a_run_version_is_the_newest_of_trls_whose_policy_it_is() -> None:
    calendar = Calendar()
    for trl_version, run_version in [(1, 0), (2, 0), (3, 4), (4, 5)]:
        calendar.note(trl_version, run_version)
    assert [calendar.of(version) for version in (0, 3, 4, 5)] == [2, 2, 3, 4]


def test_weights_that_are_already_newer_than_what_trl_knows_count_as_what_trl_knows() -> None:
    calendar = Calendar()
    calendar.note(1, 7)
    assert calendar.of(8) == 1


def test_weights_of_no_version_and_of_before_this_training_are_older_than_any_staleness() -> None:
    calendar = Calendar()
    calendar.note(11, 7)
    assert calendar.of(UNKNOWN) < 11 - 10**6
    assert calendar.of(6) < 11 - 10**6


def test_a_choice_was_made_by_every_version_that_it_states() -> None:
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}]
    assert versions_of({"token_ids": [1, 2, 3], "weight_versions": spans}) == [3, 4]
    assert versions_of({"token_ids": [], "weight_versions": []}) == []
    assert versions_of({"token_ids": [1], "weight_versions": None}) == [UNKNOWN]
    assert versions_of({"token_ids": [1], "weight_versions": [{"version": "default"}]}) == [UNKNOWN]
