"""A real run: publish, follow, roll back, verify bit for bit. The server is a stand-in: it moves no weights."""

from __future__ import annotations

import io
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch

from hubsync.bucket.changes import SHORTEST_S, Changes
from hubsync.chain import ChainReader
from hubsync.cli.main import main
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.publish.results import Published
from hubsync.replicas.follower import Follower
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from hubsync.retry import attempts
from tests.support.standin import StandIn

from .measuring import DIFFERS, FAILED, OK, Site, seconds

_FOLLOWED_S = 120.0
_MOST_CALLS = 9  # of a publish, the storage's tokens included


def publish_follow_roll_back(site: Site) -> None:
    """What a user does, with its latencies and API calls."""
    address = f"hf://buckets/{site.name}/run"
    with _engine(address) as (engine, train), StandIn(engine.run.origin) as server:
        train().result()
        with _following(site, server, interval=60.0):
            _until(lambda: server.position.version == 1)
            published, latencies = _published(site, train, server)
            _say(site, published, latencies, "from durable to followed, with events")
            began = time.monotonic()
            engine.serve(1)
            _until(lambda: server.position.version == 1)
            site.say(OK, "rollback to version 1", f"{time.monotonic() - began:.2f} s", "soon, at most the interval")
        with _following(site, server, interval=site.interval, events=False):
            _, latencies = _published(site, train, server)
            what = f"from durable to followed, poll of {site.interval:g} s"
            site.say(OK, what, seconds(latencies), "at most the interval")
    with redirect_stdout(io.StringIO()) as said:
        code = main(["verify", address, "--token", site.token])
    last = said.getvalue().strip().splitlines()[-1:]
    site.say(FAILED if code else OK, "hubsync verify", "".join(last), "all replayed bit for bit")


@contextmanager
def _engine(address: str) -> Iterator[tuple]:
    """An engine, and a function that makes a step and publishes it."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    engine = DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address))
    steps = iter(range(1, 1000))

    def train():  # type: ignore[no-untyped-def]
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return engine.publish(next(steps))

    try:
        yield engine, train
    finally:
        engine.close()


@contextmanager
def _following(site: Site, server: StandIn, *, interval: float, events: bool = True) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as cache:

        def reader() -> ChainReader:
            bucket = site.bucket("run")
            if not events:
                bucket.changes = lambda paths: Changes()  # type: ignore[method-assign]
            return ChainReader(bucket, cache)

        follower = Follower(reader, Replica(VLLMServer(server.url)), interval=interval)
        thread = threading.Thread(target=follower.run)
        thread.start()
        try:
            yield
        finally:
            follower.stop()
            thread.join()


def _published(site: Site, train, server: StandIn) -> tuple[list[tuple[Published, int]], list[float]]:  # type: ignore[no-untyped-def]
    """Publishes, each with its API calls, and the seconds from durable to followed."""
    published, latencies = [], []
    for _ in range(max(2, site.rounds // 2)):
        time.sleep(SHORTEST_S)  # events that follow each other faster are waited for
        before = site.calls
        done = train().result()
        published.append((done, site.calls - before))
        began = time.monotonic()
        _until(lambda version=done.version: server.position.version == version)
        latencies.append(time.monotonic() - began)
    return published, latencies


def _say(site: Site, published: list[tuple[Published, int]], latencies: list[float], what: str) -> None:
    site.say(OK, "publish, encode", seconds([done.encode_s for done, _ in published]))
    site.say(OK, "publish, until durable", seconds([done.upload_s for done, _ in published]))
    calls = max(number for _, number in published)
    verdict = OK if calls <= _MOST_CALLS else DIFFERS
    site.say(verdict, "publish, API calls (a follower's included)", str(calls), f"at most {_MOST_CALLS}")
    site.say(OK, what, seconds(latencies), "0.04 s on loopback")


def _until(condition) -> None:  # type: ignore[no-untyped-def]
    for _ in attempts(_FOLLOWED_S, waiting_for="the follower", longest=0.05):
        if condition():
            return
    raise TimeoutError(f"the follower did not get there in {_FOLLOWED_S:.0f} s")
