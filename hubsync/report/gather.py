"""Read what there is to know of a run: its documents, what followers and servers say now, and what was written down."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from hubsync.bucket.base import Bucket
from hubsync.chain import ChainReader
from hubsync.chain.retention import unneeded_since
from hubsync.errors import HubsyncError
from hubsync.format.manifest import Manifest, Position, Run
from hubsync.replicas.reports import ReplicaStatus
from hubsync.replicas.status_objects import Reported, read_reported

from .records import SYNC, Event, TrainerLog

if TYPE_CHECKING:
    from hubsync.replicas.replica import Replica

    from .density import Density

_ADDRESS = re.compile(r"[\d.]+(:|$)|\[")  # an IP address, of which no part is a name
PUBLISHER = "trainer"
PUSHED = "the trainer's server"  # where only the trainer's log tells of it


class PhaseSpan(NamedTuple):
    """One phase of one version.

    Attributes:
        lane: `PUBLISHER`, or the server.
        begin, end: seconds since 1970.
    """

    lane: str
    phase: str
    version: int
    begin: float
    end: float


@dataclass(frozen=True)
class ServerNow:
    """What a server answered, or why it did not."""

    url: str
    status: ReplicaStatus | None
    error: HubsyncError | None


@dataclass(frozen=True)
class Gathered:
    """A run, and what is known around it.

    Attributes:
        made: when it was read, seconds since 1970.
        deltas, anchors: of the current chain, oldest first.
        merged: merged deltas between its versions.
        unneeded: names of manifests that `hubsync gc` found unneeded -> since when.
        reported: what followers said of their servers in the bucket. Not proved.
        log: of the trainer, if one was given.
        events: of followers, if any were given.
    """

    address: str
    made: float
    run: Run
    newest: Position
    served: Position
    deltas: list[Manifest]
    anchors: list[Manifest]
    merged: list[Manifest]
    density: Density
    unneeded: dict[str, float] = field(default_factory=dict)
    reported: Sequence[Reported] = ()
    servers: Sequence[ServerNow] = ()
    log: TrainerLog | None = None
    events: Sequence[Event] = ()

    @cached_property
    def durable(self) -> dict[int, float]:
        """Version -> when it was durable, seconds since 1970."""
        return {delta.version: delta.times.upload[1] if delta.times else delta.created for delta in self.deltas}

    @cached_property
    def commits(self) -> list[Event]:
        """Commits and verifications with a time, oldest first: of events, else as the trainer's log tells them."""
        known = [event for event in self.events if event.time is not None and event.version is not None]
        told = {event.server for event in known}
        known += [] if PUSHED in told else self._pushed()
        return sorted(known, key=lambda event: event.time or 0.0)

    def _pushed(self) -> list[Event]:
        """Commits that the trainer's log tells. It has durations only: each is placed behind the upload."""
        found = []
        for row in self.log.rows if self.log is not None else ():
            version = row.get(f"{SYNC}version", 0.0)
            durable = self.durable.get(int(version)) if version == int(version) else None
            seconds = {
                name: row[f"{SYNC}{name}_s"] for name in ("stage", "commit", "pause") if f"{SYNC}{name}_s" in row
            }
            if durable is not None and any(seconds.values()):
                at = durable + seconds.get("stage", 0.0) + max(seconds.get("commit", 0.0), seconds.get("pause", 0.0))
                found.append(Event("commit", PUSHED, at, int(version), seconds))
        return found

    @cached_property
    def spans(self) -> list[PhaseSpan]:
        """Phases of all versions, the publisher's first."""
        found = []
        for delta in self.deltas:
            for phase in ("detect", "encode", "upload") if delta.times else ():
                found.append(PhaseSpan(PUBLISHER, phase, delta.version, *getattr(delta.times, phase)))
        committed = {(event.server, event.version): event.time for event in self.commits if event.kind == "commit"}
        for event in self.commits:
            assert event.time is not None
            assert event.version is not None
            of = event.seconds
            if event.kind == "commit":
                begin = event.time - max(of.get("commit", 0.0), of.get("pause", 0.0))
                found.append(PhaseSpan(event.server, "stage", event.version, begin - of.get("stage", 0.0), begin))
                found.append(PhaseSpan(event.server, "commit", event.version, begin, event.time))
            elif "verify" in of:  # workers verify at once after a commit; the follower hears of it later
                begin = committed.get((event.server, event.version)) or event.time - of["verify"]
                found.append(PhaseSpan(event.server, "verify", event.version, begin, begin + of["verify"]))
        return found

    @cached_property
    def lanes(self) -> list[str]:
        """The publisher and all servers with commits."""
        return list(dict.fromkeys([PUBLISHER, *(event.server for event in self.commits)]))

    @cached_property
    def labels(self) -> dict[str, str]:
        """Lane -> its name in figures: the first part of the host's name if that tells all lanes apart."""
        hosts = {lane: lane.split("://")[-1] for lane in self.lanes}
        first = {lane: host if _ADDRESS.match(host) else host.split(".")[0] for lane, host in hosts.items()}
        return first if len(set(first.values())) == len(first) else hosts


def gather(
    bucket: Bucket,
    reader: ChainReader,
    *,
    plain: Bucket | None = None,
    replicas: Sequence[Replica] = (),
    log: TrainerLog | None = None,
    events: Sequence[Event] = (),
) -> Gathered:
    """Read a run. Errors of its documents are raised; what is only shown may be missing.

    Args:
        plain: the same bucket without a key: what followers say of their servers is not signed.
        replicas: servers to ask for their status.
    """
    from .density import read_density  # imports torch and numba

    manifests = reader.manifests()
    deltas = [manifest for manifest in manifests if manifest.kind == "delta"]
    return Gathered(
        address=bucket.address,
        made=time.time(),
        run=reader.run(),
        newest=reader.newest(),
        served=reader.served(),
        deltas=deltas,
        anchors=[manifest for manifest in manifests if manifest.kind == "anchor"],
        merged=reader.spans(manifests),
        density=read_density(bucket, reader, deltas),
        unneeded=unneeded_since(bucket),
        reported=read_reported(plain or bucket),
        servers=[_now(replica) for replica in replicas],
        log=log,
        events=events,
    )


def _now(replica: Replica) -> ServerNow:
    try:
        status = replica.status()
    except HubsyncError as error:
        return ServerNow(replica.server.url, None, error)
    return ServerNow(replica.server.url, status, status.error)
