"""Requests to the Hub by operation, counted by the embedded Hub. docs/cost.md has the table.

    python -m benchmarks.hub_calls               a table; --json for a list of rows

Trainer, run and Hub are real. In place of a server, its reader of the run fetches what a worker would.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.cli.main import main as command
from hubsync.localhub import LocalHub
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine

ADDRESS = "hf://buckets/me/calls/run"
DELAY = 0.1  # seconds added to each request, to count those that wait for each other
REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        api: requests that count against the Hub's limit for its API.
        resolver: requests that count against its limit for files.
        storage: requests to the storage behind the Hub, which has no published limit.
        in_a_row: requests that wait for an earlier one: the operation takes at least that many round trips.
    """

    operation: str
    api: int
    resolver: int
    storage: int
    in_a_row: int | None


class Counter:
    """Counts requests of one operation after another.

    Args:
        repeats: how often an operation runs as it is, and again with slow requests.
        delay: seconds added to each slow request; 0 leaves those runs out.
    """

    def __init__(self, hub: LocalHub, repeats: int, delay: float):
        self._hub = hub
        self._repeats = repeats
        self._delay = delay
        self.rows: list[Row] = []

    def count(self, name: str, operation: Callable[[], object], *, prepare: Callable[[], object] | None = None) -> None:
        """Run something several times, each time after `prepare`."""
        delays = [0.0] * self._repeats + [self._delay] * (self._repeats if self._delay else 0)
        seconds: dict[float, list[float]] = {delay: [] for delay in delays}
        counts = []
        for delay in delays:
            if prepare is not None:
                prepare()
            self._hub.reset()
            if delay:
                self._hub.fail("", times=2**31, delay=delay)
            start = time.perf_counter()
            operation()
            seconds[delay].append(time.perf_counter() - start)
            counts.append(self._counted())
        self._hub.reset()
        api, resolver, storage = (int(median(column)) for column in zip(*counts, strict=True))
        longer = median(seconds[self._delay]) - median(seconds[0.0])
        self.rows.append(Row(name, api, resolver, storage, round(longer / self._delay) if self._delay else None))

    def once(self, name: str, operation: Callable[[], object]) -> None:
        """Run something that cannot be repeated. `name` may have a place for what it returns."""
        self._hub.reset()
        done = operation()
        self.rows.append(Row(name.format(done), *self._counted(), None))

    def _counted(self) -> tuple[int, int, int]:
        requests = self._hub.requests()
        resolver = sum(count for route, count in requests.items() if "/resolve/" in route)
        api = self._hub.api_calls()
        return api, resolver, sum(requests.values()) - api - resolver


class Training:
    """A trainer of a model of 200,000 parameters, whose every step changes some of them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(3)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.steps = 0
        self.engine: DeltaWeightTransferEngine | None = None

    def start(self) -> None:
        self.engine = DeltaWeightTransferEngine(self.model, self.optimizer, SyncConfig(bucket=ADDRESS))
        self.publish()

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.steps += 1

    def publish(self) -> None:
        assert self.engine is not None
        self.engine.publish(self.steps).result()

    def step_and_publish(self) -> None:
        self.step()
        self.publish()


def measure(repeats: int = REPEATS, delay: float = DELAY, *, care: bool = True) -> list[Row]:
    """Rows in the order of the table.

    Args:
        care: whether to count anchors, compaction and the like too.
    """
    with tempfile.TemporaryDirectory() as name, LocalHub(Path(name) / "hub") as hub:
        cache = Path(name) / "cache"
        os.environ.update(
            HF_ENDPOINT=hub.url, HF_TOKEN="hf_local", HF_XET_CACHE=str(cache / "xet"), HUBSYNC_CACHE=str(cache)
        )
        counter, training = Counter(hub, repeats, delay), Training()
        counter.once("create the run, upload the model", training.start)
        assert training.engine is not None
        counter.count("publish a version", training.publish, prepare=training.step)
        _count_readers(counter, training, cache)
        if care:
            counter.count("upload an anchor", training.engine.anchor, prepare=training.step_and_publish)
        training.engine.close()
        if care:
            _count_care(counter, training.steps)
        return counter.rows


def _count_care(counter: Counter, versions: int) -> None:
    keep = ("gc", ADDRESS, "--keep-last", "2")
    counter.count(f"list {versions} versions (`ls`)", lambda: _run("ls", ADDRESS))
    counter.once("write {} merged deltas (`compact`)", lambda: _run("compact", ADDRESS, "--json").count("\n") - 1)
    counter.once(f"mark what is unneeded of {versions} versions (`gc`)", lambda: _run(*keep))
    counter.once("delete it (`gc --grace 0`)", lambda: _run(*keep, "--grace", "0"))


def _count_readers(counter: Counter, training: Training, cache: Path) -> None:
    """A follower polls, and a server fetches: each with a reader of its own, which has read the run before."""
    bucket = open_bucket(ADDRESS)
    follower, server = ChainReader(bucket, cache / "follower"), ChainReader(bucket, cache / "server")
    have = server.served()
    follower.served()

    def fetch() -> None:
        """What a server does when a client names the next version."""
        nonlocal have
        plan = server.plan(have, to=have.version + 1)
        server.merged(plan.steps)
        have = plan.target

    counter.count("poll, nothing new (`follow`)", follower.served)
    counter.count("poll, a new version", follower.served, prepare=training.step_and_publish)
    fetch()
    have = server.served()
    counter.count("fetch a version (server)", fetch, prepare=training.step_and_publish)


def _run(*words: str) -> str:
    with redirect_stdout(StringIO()) as printed:
        assert command(words) == 0
    return printed.getvalue()


def print_table(rows: list[Row]) -> None:
    table = Table(title="Requests to the Hub")
    for heading in ("operation", "API", "resolver", "storage", "in a row"):
        table.add_column(heading, justify="left" if heading == "operation" else "right")
    for row in rows:
        numbers = (row.api, row.resolver, row.storage)
        table.add_row(row.operation, *map(str, numbers), "" if row.in_a_row is None else str(row.in_a_row))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure()
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
