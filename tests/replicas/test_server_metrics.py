"""The Prometheus series of a server, from the answers of its workers."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("prometheus_client")

import prometheus_client as prometheus

from vllm_plugin.metrics import ServerMetrics

LABELS = {"model_name": "m", "engine": "0"}


def rank(version: int, **more: Any) -> dict[str, Any]:
    metrics = {"stage_s": 0.5, "stage_bytes": 100, "commit_s": 0.01, "verify_s": 0.2}
    status = {"state": "ready", "version": version, "digest": f"d{version}", "staged": None, "error": None}
    looks = {"verified": True, "passes": 1}
    return {**status, "metrics": metrics, "verification": looks, "engine": {"index": 0, "turn_s": 0.02}, **more}


class Observed:
    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self.metrics = ServerMetrics("m", self.registry)

    def __call__(self, method: str, *answers: dict[str, Any], **arguments: Any) -> None:
        self.metrics.observe(f"hubsync_{method}", arguments, answers)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"vllm:hubsync_{name}", {**LABELS, **labels})


def test_a_version_is_staged_committed_and_verified_once_however_often_it_is_asked_for() -> None:
    seen, staged = Observed(), {"staged": {"version": 2, "digest": "d2"}}
    seen("status", rank(1), rank(1))
    seen("stage", rank(1), rank(1), version=2)
    assert (seen.value("version"), seen.value("lag_versions"), seen.value("ready")) == (1, 1, 1)
    for _ in range(3):
        seen("status", rank(1, **staged), rank(1, **staged))
    assert (seen.value("stage_seconds_count"), seen.value("stage_seconds_sum")) == (1, 0.5)
    assert seen.value("staged_bytes_total") == 200
    applied = {"verification": {"verified": False, "passes": 1}, "state": "applied", "changed": 7}
    seen("commit", rank(2, **applied), rank(2, **applied), version=2)
    assert (seen.value("version"), seen.value("lag_versions"), seen.value("ready")) == (2, 0, 0)
    assert (seen.value("commit_seconds_count"), seen.value("changed_elements_total")) == (1, 14)
    assert seen.value("turn_seconds_sum") == 0.02
    assert seen.value("stage_seconds_count") == 1
    for _ in range(3):
        seen("status", *[rank(2, verification={"verified": True, "passes": 2})] * 2)
    assert (seen.value("verify_seconds_count"), seen.value("ready")) == (1, 1)


def test_a_staging_that_no_status_saw_is_counted_with_its_commit() -> None:
    seen = Observed()
    seen("commit", rank(2, changed=7), version=2)
    assert (seen.value("stage_seconds_count"), seen.value("commit_seconds_count")) == (1, 1)


def test_errors_are_counted_by_class_and_one_that_a_status_repeats_once() -> None:
    seen, error = Observed(), {"type": "NoPath", "message": "none"}
    for _ in range(3):
        seen("status", rank(1, error=error))
    seen("commit", {"error": {"type": "WrongParent", "message": "x"}, "engine": {"index": 0}}, version=3)
    seen("commit", {"error": {"type": "WrongParent", "message": "x"}, "engine": {"index": 0}}, version=3)
    assert (seen.value("failures_total", type="NoPath"), seen.value("failures_total", type="WrongParent")) == (1, 2)


def test_each_engine_has_its_own_series_and_nonsense_changes_nothing() -> None:
    seen = Observed()
    seen("status", rank(1), rank(2, engine={"index": 1}), {"error": None})
    assert seen.registry.get_sample_value("vllm:hubsync_version", {**LABELS, "engine": "1"}) == 2
    seen("status")
    seen("layout", {"rank": 0, "tensors": {}, "error": None})
