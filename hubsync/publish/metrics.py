"""Metrics of publishing and syncing: one table, and those that installed packages add.

Trainer integrations log each metric under `weight_sync/NAME`. To add a metric, add a row to the table of what it is
computed from: a publish (`PUBLISH`), the shares of several ranks (`RANKS`), or commits on servers (`COMMITS`).

A package adds a metric with an entry point. Its name is the metric's name, and its object is a function of a
`SyncReport` that returns a number:

    [project.entry-points."hubsync.metrics"]
    megabytes = "my_package:megabytes"    # def megabytes(report: SyncReport) -> float
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from hubsync.format.encoding import Encoding

from .results import Published, RankShare, SyncReport

if TYPE_CHECKING:
    from hubsync.replicas.replica import CommitReport

logger = logging.getLogger(__name__)

GROUP = "hubsync.metrics"

T = TypeVar("T")


@dataclass(frozen=True)
class Metric(Generic[T]):
    """One metric.

    Attributes:
        name: name in the log, after `weight_sync/`.
        unit: "s", "bytes", "bits", "fraction", "tensors" or "0 or 1".
        help: one line for documentation.
        value: how it is computed.
    """

    name: str
    unit: str
    help: str
    value: Callable[[T], float]


PUBLISH: tuple[Metric[Published], ...] = (
    Metric("changed_fraction", "fraction", "changed elements of the published view", lambda p: p.changed / p.total),
    Metric("payload_bytes", "bytes", "uploaded for the version, over all ranks", lambda p: p.payload_bytes),
    Metric("bits_per_change", "bits", "uploaded per changed element", lambda p: p.bits_per_change),
    Metric("compact", "0 or 1", "whether the encoding is compact", lambda p: p.encoding is Encoding.COMPACT),
    Metric("rewritten", "tensors", "published with new values: written outside of steps", lambda p: len(p.rewritten)),
    Metric("detect_s", "s", "detecting and proving changes, in the training thread", lambda p: p.detect_s),
    Metric("encode_s", "s", "encoding, in the background", lambda p: p.encode_s),
    Metric("upload_s", "s", "until the version was durable, in the background", lambda p: p.upload_s),
)

# Only with several ranks.
RANKS: tuple[Metric[Sequence[RankShare]], ...] = (
    Metric("rank_payload_bytes_max", "bytes", "most that a rank uploaded", lambda r: max(s.payload_bytes for s in r)),
    Metric("rank_detect_s_max", "s", "detection on the slowest rank", lambda r: max(s.detect_s for s in r)),
    Metric("rank_encode_s_max", "s", "encoding on the slowest rank", lambda r: max(s.encode_s for s in r)),
    Metric("rank_upload_s_max", "s", "upload on the slowest rank", lambda r: max(s.upload_s for s in r)),
)

COMMITS: tuple[Metric[Sequence[CommitReport]], ...] = (
    Metric("stage_s", "s", "download, verification and decoding on the slowest server", lambda c: _most(c, "stage_s")),
    Metric("commit_s", "s", "writing the changed weights on the slowest server", lambda c: _most(c, "commit_s")),
    Metric("pause_s", "s", "time without progress of requests on the slowest server", lambda c: _most(c, "pause_s")),
)


def of_publish(published: Published) -> dict[str, float]:
    """Metrics of a publish; with several ranks, also of the ranks' shares."""
    metrics = _values(PUBLISH, published)
    if len(published.ranks) > 1:
        metrics |= _values(RANKS, published.ranks)
    return metrics


def of_commits(commits: Sequence[CommitReport]) -> dict[str, float]:
    """Metrics of the commits of one version; none if there were no commits."""
    return _values(COMMITS, commits) if commits else {}


def of_packages(report: SyncReport) -> dict[str, float]:
    """Metrics of installed packages. One that fails is left out, with a warning: it must not stop a training."""
    metrics = {}
    for name, value in _registered().items():
        try:
            metrics[name] = float(value(report))
        except Exception as error:  # whatever a foreign function raises
            logger.warning("the metric %r is left out: %s: %s", name, type(error).__name__, error)
    return metrics


def _values(table: Iterable[Metric[T]], source: T) -> dict[str, float]:
    return {metric.name: float(metric.value(source)) for metric in table}


def _most(commits: Sequence[CommitReport], field: str) -> float:
    return max(getattr(commit, field) for commit in commits)


@cache
def _registered() -> dict[str, Callable[[SyncReport], float]]:
    """Functions of installed packages by metric name, read once per process. Reading takes some 30 ms."""
    own = {metric.name for table in (PUBLISH, RANKS, COMMITS) for metric in table}
    found: dict[str, Callable[[SyncReport], float]] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in own:
            logger.warning("ignoring the metric %r of %s: hubsync has one of that name", entry.name, entry.value)
            continue
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # whatever a foreign module raises
            logger.warning("the metric %r cannot be loaded from %s: %s", entry.name, entry.value, error)
    return found
