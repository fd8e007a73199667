"""Metric `weight_sync/megabytes`."""

from __future__ import annotations

from hubsync.publish.engine import SyncReport


def megabytes(report: SyncReport) -> float:
    return report.published.payload_bytes / 1e6
