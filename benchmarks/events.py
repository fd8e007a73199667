"""How soon a poller of a run knows of a new version, and its API calls, with and without the Hub's event stream.

    python -m benchmarks.events                          # 12 versions, 90 s
    python -m benchmarks.events --versions 40 --json     # one JSON object for each way

Against the local Hub, on loopback: the real one adds its own latency to every row. Latency is the time from the moment
at which the Hub has the new head to the moment at which the poller knows the version. Calls per hour are computed from
the measured calls of one look, for a run with one version a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")  # no request leaves this machine

import torch
from rich.console import Console
from rich.table import Table

from hubsync.bucket.changes import Changes
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader, Layout
from hubsync.localhub import LocalHub
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine

_VERSIONS_AN_HOUR = 60


@dataclass
class Poller:
    """One way to poll, on a run of its own."""

    name: str
    interval: float
    events: bool
    latencies: list[float] = field(default_factory=list)
    looks: int = 0
    calls: int = 0

    def poll(self, bucket: HubBucket, cache: Path, ended: threading.Event) -> None:
        reader = ChainReader(bucket, cache)
        self._count(bucket)
        with reader.changes() if self.events else Changes() as changes:
            seen = reader.served().version
            self.calls = self.looks = 0  # the first look reads run.json too
            while not ended.is_set():
                served = reader.served().version
                now, calls = time.time(), self.calls
                self.looks += 1
                if served != seen:
                    seen = served
                    written = bucket.stat([Layout.HEAD])[Layout.HEAD].modified
                    self.latencies.append(now - (written or now))
                self.calls = calls  # without that of the measurement
                changes.wait(self.interval)

    def _count(self, bucket: HubBucket) -> None:
        attempt = bucket._api._attempt

        def counted(*args: Any) -> Any:
            self.calls += 1
            return attempt(*args)

        bucket._api._attempt = counted  # type: ignore[method-assign, assignment]

    def row(self) -> dict[str, Any]:
        a_look = self.calls / self.looks
        looks = 3600 / self.interval + (2 * _VERSIONS_AN_HOUR if self.events else 0)
        return {
            "way": self.name,
            "interval_s": self.interval,
            "median_s": statistics.median(self.latencies),
            "longest_s": max(self.latencies),
            "calls_a_look": a_look,
            "calls_an_hour": round(a_look * looks),
        }


class Trainer:
    """Publishes versions of one small layer."""

    def __init__(self, hub: LocalHub, address: str):
        self.model = torch.nn.Linear(64, 64)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        os.environ["HF_ENDPOINT"] = hub.url
        self.engine = DeltaWeightTransferEngine(self.model, self.optimizer, SyncConfig(bucket=address))

    def publish(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.engine.publish().result()


def measure(versions: int, every: float) -> list[dict[str, Any]]:
    ways = [
        Poller("poll", 5.0, events=False),
        Poller("poll and events", 5.0, events=True),
        Poller("poll and events", 60.0, events=True),
    ]
    with tempfile.TemporaryDirectory(prefix="hubsync-events-") as directory, LocalHub(Path(directory, "hub")) as hub:
        trainers = [Trainer(hub, f"hf://buckets/me/events/run{n}") for n in range(len(ways))]
        for trainer in trainers:
            trainer.publish()
        ended, threads = threading.Event(), []
        for n, way in enumerate(ways):
            bucket = HubBucket(f"hf://buckets/me/events/run{n}", endpoint=hub.url)
            threads.append(threading.Thread(target=way.poll, args=(bucket, Path(directory, f"cache{n}"), ended)))
            threads[-1].start()
        for _ in range(versions):
            time.sleep(random.uniform(0.5, 1.5) * every)
            for trainer in trainers:
                trainer.publish()
        time.sleep(6.0)  # the poll without events sees the last version
        ended.set()
        for trainer in trainers:  # ends the pauses that reports end
            trainer.publish()
            trainer.engine.close()
        for thread in threads:
            thread.join()
    return [way.row() for way in ways]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--versions", type=int, default=12)
    parser.add_argument("--every", type=float, default=7.0, metavar="SECONDS", help="mean time between versions")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args.versions, args.every)
    if args.json:
        print("\n".join(map(json.dumps, rows)))
        return
    table = Table(*("way", "interval", "median", "longest", "calls a look", "calls an hour"))
    for row in rows:
        latencies = (f"{row[name]:.2f} s" for name in ("median_s", "longest_s"))
        table.add_row(
            row["way"], f"{row['interval_s']:g} s", *latencies, f"{row['calls_a_look']:.1f}", str(row["calls_an_hour"])
        )
    Console().print(table)


if __name__ == "__main__":
    main()
