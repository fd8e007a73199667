"""The table of metrics: each metric has a unit and help, and is computed from publishes, ranks and commits."""

from __future__ import annotations

from pathlib import Path

from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position
from hubsync.format.times import Times
from hubsync.publish import metrics
from hubsync.publish.results import Published, RankShare
from hubsync.replicas.replica import CommitReport

POSITION = Position(3, "0" * 32)
SHARES = (
    RankShare(0, 6, 20, Times((0, 0.125), (1, 1.25), (2, 2.5))),
    RankShare(1, 4, 30, Times((0, 0.5), (1, 1.125), (2, 2.25))),
)


def published(*ranks: RankShare) -> Published:
    return Published(POSITION, 7, 10, 1000, 50, 2000, Encoding.COMPACT, 0.1, 0.2, 0.5, ranks)


def test_every_metric_is_documented_and_has_a_name_of_its_own() -> None:
    table = (*metrics.PUBLISH, *metrics.RANKS, *metrics.COMMITS)
    assert len({metric.name for metric in table}) == len(table)
    assert all(
        metric.help and metric.unit in ("s", "bytes", "bits", "fraction", "tensors", "0 or 1") for metric in table
    )


def test_the_documentation_has_every_metric_with_its_unit() -> None:
    text = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
    for metric in (*metrics.PUBLISH, *metrics.RANKS, *metrics.COMMITS):
        assert f"| `{metric.name}` | {metric.unit} | {metric.help} |" in text


def test_a_publish_of_one_rank_has_no_metrics_of_ranks() -> None:
    assert metrics.of_publish(published(SHARES[0])) == {
        "changed_fraction": 0.01,
        "payload_bytes": 50,
        "bits_per_change": 40,
        "compact": 1,
        "rewritten": 0,
        "detect_s": 0.1,
        "encode_s": 0.2,
        "upload_s": 0.5,
    }


def test_metrics_of_ranks_are_those_of_the_slowest() -> None:
    found = metrics.of_publish(published(*SHARES))
    assert {name: value for name, value in found.items() if name.startswith("rank_")} == {
        "rank_payload_bytes_max": 30,
        "rank_detect_s_max": 0.5,
        "rank_encode_s_max": 0.25,
        "rank_upload_s_max": 0.5,
    }


def test_metrics_of_commits_are_those_of_the_slowest_server() -> None:
    commits = [CommitReport(POSITION, 0.1, 0.5, 2.0, 10), CommitReport(POSITION, 0.3, 0.4, 1.0, 10)]
    assert metrics.of_commits(commits) == {"stage_s": 2.0, "commit_s": 0.5, "pause_s": 0.3}
    assert metrics.of_commits([]) == {}
