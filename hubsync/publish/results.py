"""Results of publishing: a version, each rank's share of it, and the ticket of a publish under way."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position
from hubsync.format.times import Times
from hubsync.retry import wait_reporting

if TYPE_CHECKING:
    from hubsync.replicas.deployment import ReplicaReport
    from hubsync.replicas.reports import CommitReport


@dataclass(frozen=True)
class Phase:
    """When a phase of a publish began and ended, in seconds since 1970."""

    ends: tuple[float, float]

    @classmethod
    def begun(cls) -> Phase:
        now = time.time()
        return cls((now, now))

    def ended(self) -> Phase:
        return Phase((self.ends[0], max(time.time(), self.ends[0])))  # a clock may be set back

    @property
    def seconds(self) -> float:
        return _seconds(self.ends)


@dataclass(frozen=True)
class RankShare:
    """One rank's share of a version.

    Attributes:
        rank: number of the rank.
        changed: changed elements among those that the rank owns.
        payload_bytes: bytes that it uploaded.
        times: when it detected, encoded and uploaded, without waits for other ranks and for the commit.
    """

    rank: int
    changed: int
    payload_bytes: int
    times: Times

    @property
    def detect_s(self) -> float:
        """Seconds of detection, in the training thread."""
        return _seconds(self.times.detect)

    @property
    def encode_s(self) -> float:
        """Seconds of encoding, in the background."""
        return _seconds(self.times.encode)

    @property
    def upload_s(self) -> float:
        """Seconds of uploading, in the background."""
        return _seconds(self.times.upload)


@dataclass(frozen=True)
class Published:
    """A finished publish.

    Attributes:
        position: version and digest of the published view.
        step: the trainer's step.
        changed: changed elements since the parent version; all elements if the whole model was uploaded; 0 if nothing
            changed and no version was made.
        total: elements of the view.
        payload_bytes: bytes uploaded for this version, without manifest and head.
        dense_bytes: bytes of the whole view.
        encoding: encoding of the version, dense for a whole model; None if no version was made.
        detect_s: seconds of the training thread.
        encode_s: seconds of encoding, in the background.
        upload_s: seconds until the version was durable, in the background.
        ranks: the share of each rank. The seconds above are those of this rank.
        rewritten: names of tensors that were written where no change was seen, and were published with new values. If
            this happens at every publish, use detector="snapshot".
    """

    position: Position
    step: int | None
    changed: int
    total: int
    payload_bytes: int
    dense_bytes: int
    encoding: Encoding | None
    detect_s: float
    encode_s: float = 0.0
    upload_s: float = 0.0
    ranks: tuple[RankShare, ...] = ()
    rewritten: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        return self.position.version

    @property
    def digest(self) -> str:
        return self.position.digest

    @property
    def bits_per_change(self) -> float:
        """Bits uploaded per changed element; 0 if nothing changed."""
        return 8 * self.payload_bytes / self.changed if self.changed else 0.0


class Ticket:
    """A publish under way."""

    def __init__(self, future: Future[Published]):
        self._future = future
        self.error_was_seen = False

    @classmethod
    def finished(cls, published: Published) -> Ticket:
        """The ticket of a publish that needs no work in the background."""
        future: Future[Published] = Future()
        future.set_result(published)
        return cls(future)

    def done(self) -> bool:
        """Whether the publish has ended, with success or failure."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Published:
        """Wait until the version is durable.

        Raises:
            TimeoutError: it is not durable after `timeout` seconds. The publish goes on.
            HubsyncError: the publish failed. The next one contains its changes.
        """
        try:
            within = math.inf if timeout is None else timeout
            what = "the publish under way"
            if not wait_reporting(lambda s: not wait([self._future], s).not_done, within, waiting_for=what):
                raise TimeoutError(f"the version is not durable after {within:g} s; its publish goes on")
            return self._future.result()
        except BaseException as error:  # the error of the job, or an interrupt of this wait
            self.error_was_seen = self._future.done() and error is self._future.exception()
            raise


@dataclass(frozen=True)
class SyncReport:
    """Result of `DeltaWeightTransferEngine.sync` and `.deliver`.

    Attributes:
        published: the version, or the current one if nothing had changed.
        commits: reports of the servers that have committed, in the order of `SyncConfig.servers`. These are all
            servers, unless `SyncConfig.quorum` lets some commit later.
        sync_s: seconds from the call of `deliver` until these commits.
        replicas: state of each of `SyncConfig.servers`.
    """

    published: Published
    commits: tuple[CommitReport, ...]
    sync_s: float
    replicas: tuple[ReplicaReport, ...] = ()


def _seconds(ends: tuple[float, float]) -> float:
    return ends[1] - ends[0]
