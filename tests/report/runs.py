"""A run with real parts, and logs and events as trainers and followers write them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hubsync.bucket import LocalBucket
from hubsync.format.times import Times
from hubsync.report.gather import Gathered, gather
from hubsync.report.records import read_events, read_log
from tests.support.history import History

BEGAN = 1_800_000_000.0  # of version 1; each version a second later
SERVER = "http://server:8000"


def history(tmp_path: Path, versions: int = 6) -> History:
    made = History(LocalBucket(tmp_path / "run", create=True))
    for number in range(versions):
        made.publish(compact=number == 2, absolute=(1,) if number == 3 else ())
    return made


def timed(run: Gathered) -> Gathered:
    """The same with times: 0.1 s of detection, 0.2 s of encoding, 0.3 s of upload."""

    def times(version: int) -> Times:
        at = BEGAN + version - 1
        return Times((at, at + 0.1), (at + 0.1, at + 0.3), (at + 0.3, at + 0.6))

    return replace(run, deltas=[replace(delta, times=times(delta.version)) for delta in run.deltas])


def log_of(tmp_path: Path, versions: int = 6, *, dated: bool = False) -> Path:
    """`trainer_state.json`. `dated`: with versions of samples, as of asynchronous trainers."""
    rows = []
    for version in range(1, versions + 1):
        row = {"step": version, "loss": 0.1, "reward": 0.1 * version, "kl": float("nan"), "epoch": 0.0, "name": "x"}
        row |= {"weight_sync/version": float(version), "weight_sync/stage_s": 0.02, "weight_sync/commit_s": 0.003}
        row |= {"weight_sync/pause_s": 0.005, "grad_norm": 2.0 / version}
        if dated:
            row |= {"weight_sync/version_min": max(0.0, version - 2.0), "weight_sync/version_max": float(version)}
        rows.append(row)
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"global_step": versions, "log_history": rows}))
    return path


def events_of(tmp_path: Path) -> Path:
    """A follower that commits version 2 half a second after it is durable, and 5 at once."""
    rows: list[dict] = [
        {"event": "error", "error": "ObjectMissing", "message": "no run <b>yet</b>", "retry_s": 2},
        {
            "event": "commit",
            "version": 1,
            "digest": "0" * 32,
            "lag": 1,
            "stage_s": 0.1,
            "commit_s": 0.1,
            "pause_s": 0.1,
        },
    ]
    for version, at in ((2, BEGAN + 1.6 + 0.5), (5, BEGAN + 4.6)):
        head = {"server": SERVER, "version": version, "digest": "0" * 32}
        commit = {"stage_s": 0.04, "commit_s": 0.002, "pause_s": 0.004, "lag": 1, "changed": 3, "bytes": 5}
        rows.append({"event": "commit", "time": at, **head, **commit})
        rows.append({"event": "verified", "time": at + 3, **head, "verify_s": 0.007})
    path = tmp_path / "follow.jsonl"
    path.write_text("a line that is no event\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return path


def gathered(tmp_path: Path, made: History, **more: object) -> Gathered:
    return gather(made.bucket, made.reader(tmp_path / f"cache of {Path(made.bucket.address).name}"), **more)  # type: ignore[arg-type]


def everything(tmp_path: Path) -> Gathered:
    """A run with all that can be recorded."""
    made = history(tmp_path)
    made.anchor(tmp_path / "anchor")
    log, events = read_log(log_of(tmp_path, dated=True)), read_events(events_of(tmp_path))
    return timed(gathered(tmp_path, made, log=log, events=events))
