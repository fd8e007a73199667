"""What `hubsync status` and `hubsync watch` show: observations of a run and its servers, and their layout as text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    from hubsync.replicas.status_objects import Reported

ANSWER_S = 10.0  # a server that does not answer in this time is shown as unreachable


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
            "seconds": {} if self.status is None else self.status.seconds,
            "bytes": None if self.status is None else self.status.staged_bytes,
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
        reported: reads what followers have said in the bucket of their servers.
        reported_interval: seconds between two calls of it.
    """

    def __init__(
        self,
        reader: Callable[[], ChainReader],
        replicas: Sequence[Replica],
        *,
        interval: float,
        server_interval: float = 1.0,
        reported: Callable[[], Sequence[Reported]] = tuple,
        reported_interval: float = 30.0,
    ):
        self.run = RunSeen()
        self.reported: Sequence[Reported] = ()
        self._make = reader
        self._reader: ChainReader | None = None
        self._replicas = replicas
        self._seen: dict[str, ServerSeen] = {}
        self._read_reported = reported
        self._intervals = interval, server_interval, reported_interval
        self._ended = threading.Event()

    @property
    def servers(self) -> list[ServerSeen]:
        return [self._seen[replica.server.url] for replica in self._replicas if replica.server.url in self._seen]

    def look(self) -> None:
        """Look at everything once."""
        with ThreadPoolExecutor(len(self._replicas) + 2) as threads:
            jobs = [threads.submit(self._look_at, replica) for replica in self._replicas]
            jobs += [threads.submit(self._look_at_run), threads.submit(self._look_at_reported)]
        for job in jobs:
            job.result()

    @contextmanager
    def looking(self) -> Iterator[Watch]:
        """Look in the background while the context is open."""
        threading.Thread(target=self._watch_run, daemon=True).start()
        threading.Thread(target=self._watch_reported, daemon=True).start()
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

    def _watch_reported(self) -> None:
        while not self._ended.is_set():
            self._look_at_reported()
            self._ended.wait(self._intervals[2])

    def _look_at_reported(self) -> None:
        try:
            self.reported = self._read_reported()
        except HubsyncError:
            pass  # what was read before is shown, with its age; errors of the bucket are those of the run

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


def drawn(
    address: str,
    run: RunSeen,
    servers: Sequence[ServerSeen],
    reported: Sequence[Reported] = (),
    now: float | None = None,
) -> RenderableType:
    """The picture of `hubsync watch`."""
    from rich.console import Group
    from rich.text import Text

    now = time.time() if now is None else now
    clock = f"{datetime.fromtimestamp(now).astimezone():%H:%M:%S %Z}"
    lines: list[RenderableType] = [Text(f"{address}  {clock}"), _of_run(run, now)]
    rows = [(_cells(seen, run.served), seen.error is not None) for seen in servers]
    lines += [_table(rows)] if servers else []
    lines += [Text(f"{seen.url}: {seen.error}", style="red") for seen in servers if seen.error is not None]
    rows = [(_reported_cells(seen, run.served, now), seen.error is not None) for seen in reported]
    lines += [Text("\nreported in the bucket by followers (not proved):"), _table(rows)] if reported else []
    lines += [Text(f"{seen.server}: {seen.error}", style="red") for seen in reported if seen.error is not None]
    return Group(*lines)


def _table(rows: Sequence[tuple[Sequence[str], bool]]) -> RenderableType:
    """Rows of servers, each with whether it has an error."""
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for column in ("server", "state", "version", "lag", "staged", "verified", "last phases (s)", "bytes"):
        table.add_column(column, justify="right" if column in ("version", "lag", "staged", "bytes") else "left")
    for cells, failed in rows:
        table.add_row(*map(Text, cells), style="red" if failed else "")  # Text: what comes from elsewhere is no markup
    return table


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
        _phases({} if seen.status is None else seen.status.seconds),
        "-" if seen.status is None else f"{seen.status.staged_bytes:,}",
    ]


def _reported_cells(seen: Reported, served: Position | None, now: float) -> list[str]:
    lag = None if served is None or seen.version is None else served.version - seen.version
    said = "" if seen.written is None else f", {_age(now - seen.written)} ago"
    return [
        f"{seen.server} on {seen.host}{said}",
        seen.state,
        *("-" if number is None else str(number) for number in (seen.version, lag, seen.staged)),
        "-" if seen.verified_age_s is None else f"{_age(seen.verified_age_s)} before",
        _phases(seen.seconds),
        "-" if seen.nbytes is None else f"{seen.nbytes:,}",
    ]


def _phases(seconds: Mapping[str, float]) -> str:
    return " ".join(f"{phase} {value:.3f}" for phase, value in seconds.items()) or "-"


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
