"""Is there a run already? A storage that shows writes late cannot tell by itself.

So a trainer that finds none writes a *claim* first. Once its claim is visible, everything that was written before it is
visible too. It creates the run if a listing then shows no other claim, and a look after that no run: of two trainers
whose claims exist at the same time, the one whose claim was written later sees both. If there are other claims, the
trainer with the lowest name keeps its claim until they are gone, and the others withdraw theirs and wait for its run.

No clock decides between trainers that live, so creating a run may take its time. A claim that stays for longer than the
storage's lag is one of a trainer that has died; the lowest name waits the shortest, so that one of the others goes on.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from hubsync.bucket.base import Bucket
from hubsync.errors import BucketError
from hubsync.format.documents import FORMAT
from hubsync.retry import Deadline, attempts

from .layout import Layout
from .visible import once_visible

logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextmanager
def claimed(bucket: Bucket, prepare: Callable[[], T]) -> Iterator[T | None]:
    """What `prepare` returns, if the bucket holds no run: create it within the context, others wait. Else None.

    `prepare` does what takes long before a run is created. It is called before others wait.

    Raises:
        BucketUnavailable: what was written does not become visible.
    """
    if bucket.read([Layout.RUN]):
        yield None
        return
    prepared = prepare()
    if not bucket.lag:
        yield prepared
        return
    claim = Claim(bucket)
    try:
        claim.write()
        yield prepared if claim.wins() else None
    finally:
        claim.withdraw()


class Claim:
    """The claim of this trainer, and what it sees of those of others."""

    def __init__(self, bucket: Bucket):
        self._bucket = bucket
        self._name: str | None = None  # while there is one
        self._mine: set[str] = set()  # also what was withdrawn: a listing may show it for a while
        self._others: dict[str, Deadline] = {}  # claim of another trainer -> when it counts as that of a dead one

    def write(self) -> None:
        """Returns once the claim is visible."""
        name = Layout.claim(secrets.token_hex(4))
        self._bucket.commit(name, json.dumps({"format": FORMAT, "created": time.time()}).encode())
        self._mine.add(name)
        self._name = name
        once_visible(self._bucket, lambda: self._bucket.stat([name]) or None, name)

    def wins(self) -> bool:
        """Whether this trainer creates the run; it holds a claim then. Otherwise there is a run. Waits for others."""
        what = f"another trainer that creates a run in {self._bucket.address} now, or has died while it did"
        for _ in attempts(math.inf, waiting_for=what):  # every claim has a deadline
            others = self._living()  # before the look at the run: a claim is withdrawn after its run was written
            if self._bucket.read([Layout.RUN]):
                return False
            if not others and self._name is not None:
                return True
            if not others:  # the others have not created a run
                self.write()
            elif self._name is not None and self._name > min(others):
                self.withdraw()
        raise AssertionError("waits without a deadline end by their condition")

    def withdraw(self) -> None:
        if self._name is None:
            return
        name, self._name = self._name, None
        try:
            self._bucket.delete([name])
        except BucketError as error:  # it makes the next creator wait, of which there will be none
            logger.warning("%s stays in %s: %s", name, self._bucket.address, error)

    def _living(self) -> list[str]:
        """Claims of other trainers that count."""
        others = sorted({stat.path for stat in self._bucket.list(Layout.CLAIMS)} - self._mine)
        for claim in others:
            rank = sum(other < self._name for other in others) if self._name is not None else len(others)
            self._others.setdefault(claim, Deadline(self._bucket.lag * (1 + rank)))
        return [claim for claim in others if not self._others[claim].passed]
