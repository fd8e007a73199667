"""What `hubsync status` and `hubsync watch` show: observations of a run and its servers, and their layout as text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hubsync.errors import HubsyncError, ReplicaUnreachable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hubsync.chain import ChainReader
    from hubsync.format.manifest import Position
    from hubsync.replicas.replica import Replica
    from hubsync.replicas.reports import ReplicaStatus

ANSWER_S = 10.0  # a server that does not answer in this time is shown as unreachable
_PHASES = ("fetch", "decode", "place", "stage", "commit", "verify")


@dataclass(frozen=True)
class RunSeen:
    """The newest version of a run and the one that replicas are to serve; why they are unknown now, if they are."""

    newest: Position | None = None
    served: Position | None = None
    created: float | None = None  # of the newest version, seconds since 1970
    error: HubsyncError | None = None


@dataclass(frozen=True)
class ServerSeen:
    """One server: its status, or why there is none."""

    url: str
    status: ReplicaStatus | None
    error: HubsyncError | None

    @property
    def state(self) -> str:
        if self.status is not None:
            return self.status.state
        return "unreachable" if isinstance(self.error, ReplicaUnreachable) else "unsuitable"

    @property
    def version(self) -> int | None:
        return None if self.status is None or self.status.position is None else self.status.position.version

    def lag(self, served: Position | None) -> int | None:
        """Versions from there to the served one, negative if that is older; None if unknown."""
        return None if served is None or self.version is None else served.version - self.version

    @property
    def seconds(self) -> dict[str, float]:
        """Of the last phases, on the slowest rank."""
        metrics = [rank.get("metrics", {}) for rank in self.status.ranks] if self.status is not None else []
        found = {phase: [float(each[f"{phase}_s"]) for each in metrics if f"{phase}_s" in each] for phase in _PHASES}
        return {phase: max(values) for phase, values in found.items() if values}

    @property
    def staged_bytes(self) -> int | None:
        """Of the last staging, of all ranks."""
        metrics = [rank.get("metrics", {}) for rank in self.status.ranks] if self.status is not None else []
        return sum(int(each.get("stage_bytes", 0)) for each in metrics) if metrics else None

    def to_json(self, served: Position | None = None) -> dict[str, Any]:
        position = None if self.status is None else self.status.position
        staged = None if self.status is None else self.status.staged
        looks = None if self.status is None else self.status.verification
        return {
            "server": self.url,
            "state": self.state,
            "version": None if position is None else position.version,
            "digest": None if position is None else position.digest,
            "staged": None if staged is None else staged.version,
            "lag": self.lag(served),
            "verified": None if looks is None else looks.verified,
            "verified_age_s": None if looks is None else looks.age_s,
            "workers": None if self.status is None else len(self.status.ranks),
            "seconds": self.seconds,
            "bytes": self.staged_bytes,
            "error": None if self.error is None else {"type": type(self.error).__name__, "message": str(self.error)},
        }


def look_at(replica: Replica) -> ServerSeen:
    """A server now; its errors are part of what is seen."""
    try:
        status = replica.status()
    except HubsyncError as error:
        return ServerSeen(replica.server.url, None, error)
    return ServerSeen(replica.server.url, status, status.error)


def look_at_run(reader: ChainReader, before: RunSeen) -> RunSeen:
    """A run now; while it cannot be read, what was seen before, and the error."""
    try:
        newest, served = reader.newest(), reader.served()
        created = before.created
        if newest != before.newest:
            created = reader.manifest(newest.version).created if newest.version else None
    except HubsyncError as error:
        return RunSeen(before.newest, before.served, before.created, error)
    return RunSeen(newest, served, created)


class Watch:
    """Looks at a run and at servers again and again, each in its own thread, so that a slow one delays no other.

    Args:
        reader: makes the reader of the run.
        replicas: the servers.
        interval: longest time in seconds between two looks at the run.
        server_interval: seconds between two looks at a server.
    """

    def __init__(
        self,
        reader: Callable[[], ChainReader],
        replicas: Sequence[Replica],
        *,
        interval: float,
        server_interval: float = 1.0,
    ):
        self.run = RunSeen()
        self._make = reader
        self._reader: ChainReader | None = None
        self._replicas = replicas
        self._seen: dict[str, ServerSeen] = {}
        self._intervals = interval, server_interval
        self._ended = threading.Event()

    @property
    def servers(self) -> list[ServerSeen]:
        return [self._seen[replica.server.url] for replica in self._replicas if replica.server.url in self._seen]

    def look(self) -> None:
        """Look at everything once."""
        with ThreadPoolExecutor(len(self._replicas) + 1) as threads:
            jobs = [threads.submit(self._look_at, replica) for replica in self._replicas]
            jobs.append(threads.submit(self._look_at_run))
        for job in jobs:
            job.result()

    @contextmanager
    def looking(self) -> Iterator[Watch]:
        """Look in the background while the context is open."""
        threading.Thread(target=self._watch_run, daemon=True).start()
        for replica in self._replicas:
            threading.Thread(target=self._watch_server, args=(replica,), daemon=True).start()
        try:
            yield self
        finally:
            self._ended.set()

    def _watch_run(self) -> None:
        self._look_at_run()
        while self._reader is None and not self._ended.wait(self._intervals[0]):
            self._look_at_run()
        if self._reader is None:
            return
        with self._reader.changes() as changes:
            while not self._ended.is_set():
                pause = changes if self.run.error is None else self._ended  # reports must not shorten that of an error
                pause.wait(self._intervals[0])
                self._look_at_run()

    def _watch_server(self, replica: Replica) -> None:
        while not self._ended.is_set():
            self._look_at(replica)
            self._ended.wait(self._intervals[1])

    def _look_at_run(self) -> None:
        try:
            self._reader = self._reader or self._make()
        except HubsyncError as error:
            self.run = RunSeen(error=error)
            return
        self.run = look_at_run(self._reader, self.run)

    def _look_at(self, replica: Replica) -> None:
        seen = look_at(replica)
        self._seen[seen.url] = seen


# --- layout ---------------------------------------------------------------------------------------------


def drawn(address: str, run: RunSeen, servers: Sequence[ServerSeen], now: float | None = None) -> RenderableType:
    """The picture of `hubsync watch`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    now = time.time() if now is None else now
    clock = f"{datetime.fromtimestamp(now).astimezone():%H:%M:%S %Z}"
    lines: list[RenderableType] = [Text(f"{address}  {clock}"), _of_run(run, now)]
    table = Table(expand=True)
    for column in ("server", "state", "version", "lag", "staged", "verified", "last phases (s)", "bytes"):
        table.add_column(column, justify="right" if column in ("version", "lag", "staged", "bytes") else "left")
    for seen in servers:
        table.add_row(*_cells(seen, run.served), style="red" if seen.error is not None else "")
    lines += [table] if servers else []
    lines += [Text(f"{seen.url}: {seen.error}", style="red") for seen in servers if seen.error is not None]
    return Group(*lines)


def _of_run(run: RunSeen, now: float) -> RenderableType:
    from rich.text import Text

    if run.newest is None:
        return Text("reading the run ..." if run.error is None else str(run.error), style="red" if run.error else "")
    age = "" if run.created is None else f", {_age(now - run.created)} ago"
    text = Text(f"newest {run.newest}{age}; served {run.served}")
    if run.error is not None:
        text.append(f"\nnot read now: {run.error}", style="red")
    return text


def _cells(seen: ServerSeen, served: Position | None) -> list[str]:
    lag, looks = seen.lag(served), None if seen.status is None else seen.status.verification
    staged = None if seen.status is None else seen.status.staged
    return [
        seen.url,
        seen.state,
        "-" if seen.version is None else str(seen.version),
        "-" if lag is None else str(lag),
        "-" if staged is None else str(staged.version),
        "-" if looks is None or looks.age_s is None else f"{_age(looks.age_s)} ago",
        " ".join(f"{phase} {seconds:.3f}" for phase, seconds in seen.seconds.items()) or "-",
        "-" if seen.staged_bytes is None else f"{seen.staged_bytes:,}",
    ]


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
