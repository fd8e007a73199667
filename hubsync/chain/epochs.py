"""Writer epochs, which fence older writers.

Storage has no conditional write. So each writer opens an epoch: a directory that no other writer writes to. Before each
commit it checks whether a newer epoch exists. Between the check and the write it may stall for any time. What it
commits then lies in its own, older epoch and has a version number that no other writer uses.

Storage may show writes late. A listing counts as evidence only if it shows, or comes after a look that showed, the
writer's own last write: then it also shows every older one.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass

from hubsync.bucket.base import Bucket
from hubsync.errors import ChainError, Fenced
from hubsync.format.documents import FORMAT
from hubsync.format.manifest import Manifest, Position, Run

from .index import ChainIndex
from .layout import MAX_EPOCH, Layout, epoch_names
from .visible import once_visible


@dataclass(frozen=True)
class OpenedEpoch:
    """Where the writer of a new epoch continues.

    Attributes:
        newest: the newest manifest of the run; None if it has none.
        position: the position of `newest`, or version 0.
        position_epoch: the epoch that holds `position`; None for version 0.
        next_version: the number of the next version.
        highest: the highest epoch: this one, or one that was opened at the same time and was not visible.
    """

    newest: Manifest | None
    position: Position
    position_epoch: str | None
    next_version: int
    highest: str


def next_epoch(bucket: Bucket, above: str = "00000000") -> str:
    """A name for the next epoch, higher than `above`. Writes nothing."""
    epochs = _epochs(bucket)
    number = 1 + max(int(epoch[:8]) for epoch in (*epochs, above))
    if number > MAX_EPOCH:
        raise ChainError(
            f"{bucket.address} has the last possible epoch, {number - 1}: choose another prefix for a new run"
        )
    return f"{number:08d}-{secrets.token_hex(4)}"


def open_epoch(bucket: Bucket, run: Run, name: str) -> OpenedEpoch:
    """Write the marker of an epoch, which fences older writers, then find where to continue.

    A version number is never used twice, although each older writer may have one manifest on its way that is not
    visible yet: for each epoch from that of the newest version on, one number is left out.
    """
    marker = {"format": FORMAT, "epoch": name, "created": time.time()}
    bucket.commit(Layout.epoch(name), json.dumps(marker).encode())
    chain = ChainIndex(bucket, run)

    def survey() -> str | None:
        chain.survey()
        return max(chain.epochs) if name in chain.epochs else None

    highest = once_visible(bucket, survey, f"the epoch {name}")
    newest = chain.newest()
    if newest is None:
        older = len(chain.epochs) - 1
        return OpenedEpoch(None, run.origin, None, run.origin.version + 1 + older, highest)
    version = newest.version
    holder = next(epoch for epoch, names in chain.epochs.items() if version in names.versions)
    older = sum(holder <= epoch < name for epoch in chain.epochs)
    return OpenedEpoch(newest, newest.position, holder if version else None, version + 1 + older, highest)


def check_fence(bucket: Bucket, epoch: str, last: str | None = None) -> None:
    """Fenced if a newer epoch than `epoch` exists. One listing, once the writer's `last` object is visible."""
    if last is not None:
        once_visible(bucket, lambda: bucket.stat([last]) or None, last)
    epochs = _epochs(bucket)
    if epochs and epochs[-1] > epoch:
        raise Fenced(
            f"another publisher has taken over {bucket.address} (epoch {epochs[-1]}, ours is {epoch}): this "
            "one must stop"
        )


def _epochs(bucket: Bucket) -> list[str]:
    """Names of the epochs, oldest first."""
    return list(epoch_names(stat.path for stat in bucket.list(Layout.EPOCHS, recursive=False)))
