"""Status objects: what a follower says of its server, in a small object of the run's bucket.

They are optional, and for eyes only: `hubsync watch` shows them, so that servers are seen that cannot be reached.
Nothing of the protocol reads them. They are not signed, so what they say is not proved: whoever may write to the bucket
may write anything. Readers take limited numbers, sizes and characters of them.

Each follower of a server on one host writes one object, `replicas/<name>.json`, at most every `SHORTEST_S` seconds and
at least every `LONGEST_S`. `hubsync gc` deletes those that were not renewed for a day.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from hubsync.bucket.base import Bucket, Stat
from hubsync.chain.layout import Layout
from hubsync.errors import HubsyncError
from hubsync.format.documents import FORMAT
from hubsync.retry import Deadline

from .reports import ReplicaStatus
from .server import plain_url

logger = logging.getLogger(__name__)

SHORTEST_S = 30.0
LONGEST_S = 300.0
MAX_BYTES = 4096
MOST = 100  # objects that are read, the newest
_MAX_TEXT = 300
_MAX_NUMBER = 10**15


@dataclass(frozen=True)
class Reported:
    """What a follower said of its server.

    Attributes:
        server: its URL as the follower knows it, without a user.
        host: name of the follower's host.
        state: see `hubsync.apply.protocol.WorkerState`, or "unknown".
        version, digest: what is served; None if unknown.
        staged: version that is staged, or None.
        verified_age_s: seconds since the weights were last verified.
        seconds: of the last phases, by name.
        nbytes: of the last staging.
        error: of the server or of the follower, or None.
        written: when the storage was given it, in seconds since 1970 by its clock. None if unknown.
    """

    server: str
    host: str
    state: str = "unknown"
    version: int | None = None
    digest: str | None = None
    staged: int | None = None
    verified_age_s: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    nbytes: int | None = None
    error: str | None = None
    written: float | None = None

    def of(self, status: ReplicaStatus) -> Reported:
        """The same server with this status."""
        looks = status.verification
        return replace(
            self,
            state=status.state,
            version=None if status.position is None else status.position.version,
            digest=None if status.position is None else status.position.digest,
            staged=None if status.staged is None else status.staged.version,
            verified_age_s=None if looks is None else looks.age_s,
            seconds=status.seconds,
            nbytes=status.staged_bytes,
            error=None if status.error is None else f"{type(status.error).__name__}: {status.error}",
        )

    def dumps(self) -> bytes:
        document = {"format": FORMAT, **asdict(self)}
        del document["written"]
        document["error"] = None if self.error is None else self.error[:_MAX_TEXT]
        data = json.dumps(document).encode()
        return data if len(data) <= MAX_BYTES else Reported(self.server[:100], self.host[:100], self.state).dumps()

    @classmethod
    def loads(cls, data: bytes, written: float | None) -> Reported | None:
        """None for anything but such a document."""
        try:
            document = json.loads(data)
            server, host = _text(document["server"]), _text(document["host"])
            if server is None or host is None or document["format"] != FORMAT:
                return None
            seconds = document.get("seconds")
            pairs = list(seconds.items())[:16] if isinstance(seconds, dict) else []
            return cls(
                server,
                host,
                _text(document.get("state")) or "unknown",
                _whole(document.get("version")),
                _text(document.get("digest")),
                _whole(document.get("staged")),
                _number(document.get("verified_age_s")),
                {name[:16]: value for name, given in pairs if name.isalnum() and (value := _number(given)) is not None},
                _whole(document.get("nbytes")),
                _text(document.get("error")),
                written,
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def read_reported(bucket: Bucket) -> list[Reported]:
    """What followers have said, the newest first, at most `MOST`. Objects that hold anything else are left out.

    One listing, and one read if there are any. The bucket must not check signatures.
    """
    found = [stat for stat in bucket.list(Layout.REPLICAS) if Layout.is_replica(stat.path) and stat.size <= MAX_BYTES]
    newest: Sequence[Stat] = sorted(found, key=lambda stat: -(stat.modified or 0.0))[:MOST]
    if not newest:
        return []
    contents = bucket.read([stat.path for stat in newest], max_bytes=1 << 20)  # one may have been replaced meanwhile
    documents = (
        Reported.loads(contents[stat.path], stat.modified)
        for stat in newest
        if len(contents.get(stat.path, b"")) <= MAX_BYTES and stat.path in contents
    )
    return [reported for reported in documents if reported is not None]


class StatusReporter:
    """Writes the status object of one server from a thread of its own: a slow bucket delays no follower.

    Args:
        open_bucket: opens the run's bucket for writing. Its errors are logged once, and tried again later.
        url: of the server.
    """

    def __init__(self, open_bucket: Callable[[], Bucket], url: str):
        host = socket.gethostname()
        name = hashlib.sha256(f"{host} {url}".encode()).hexdigest()[:16]
        self._path = Layout.replica(name)
        self._open = open_bucket
        self._bucket: Bucket | None = None
        self._now = Reported(plain_url(url), host)
        self._news = threading.Condition()
        self._is_new = self._closed = self._failed = False
        self._thread = threading.Thread(target=self._work, name="hubsync-status", daemon=True)
        self._thread.start()

    def status(self, status: ReplicaStatus) -> None:
        """Take the server's status."""
        self._tell(self._now.of(status))

    def error(self, error: HubsyncError) -> None:
        """Take an error of the follower. What was known before stays."""
        self._tell(replace(self._now, error=f"{type(error).__name__}: {error}"))

    def close(self, wait_s: float = 0.0) -> None:
        """Write what is new, if that takes no longer than `wait_s` seconds, and no more."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._thread.join(wait_s)

    def _tell(self, reported: Reported) -> None:
        with self._news:
            before, self._now = self._now, reported
            steady = ("verified_age_s",)  # changes all the time: it goes with the next write
            if {**vars(before), **dict.fromkeys(steady)} != {**vars(reported), **dict.fromkeys(steady)}:
                self._is_new = True
                self._news.notify_all()

    def _work(self) -> None:
        soonest = Deadline(0.0)
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or self._is_new, LONGEST_S)
                self._news.wait_for(lambda: self._closed, soonest.left)
                ended, is_new = self._closed, self._is_new
            if is_new or not ended:
                self._write()
            if ended:
                return
            soonest = Deadline(SHORTEST_S)

    def _write(self) -> None:
        with self._news:
            self._is_new = False
            reported = self._now
        if reported.state == "unknown" and reported.error is None:
            return  # nothing is known yet
        try:
            if self._bucket is None:
                self._bucket = self._open()
            self._bucket.commit(self._path, reported.dumps())
        except (HubsyncError, OSError) as error:
            if not self._failed:
                logger.warning("the status of %s is not in the bucket (following goes on): %s", self._now.server, error)
            self._failed = True
        else:
            self._failed = False


def _text(value: object) -> str | None:
    """Printable text of limited length: it is shown in terminals."""
    if not isinstance(value, str):
        return None
    return "".join(letter if letter.isprintable() else " " for letter in value[:_MAX_TEXT])


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MAX_NUMBER else None


def _number(value: object) -> float | None:
    known = type(value) in (int, float) and 0 <= value < _MAX_NUMBER  # type: ignore[operator]
    return float(value) if known else None  # type: ignore[arg-type]
