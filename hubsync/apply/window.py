"""The commit window: the time in which a client has paused a server to commit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hubsync.format.manifest import Position


@dataclass
class CommitWindow:
    """A commit that a client is driving: it has paused the server, or is about to."""

    position: Position
    token: str
    committed: bool
    opened: float

    @property
    def age(self) -> float:
        """Seconds."""
        return time.monotonic() - self.opened

    def to_json(self) -> dict[str, Any]:
        return {**position_json(self.position), "token": self.token, "committed": self.committed, "age_s": self.age}


def position_json(position: Position) -> dict[str, Any]:
    return {"version": position.version, "digest": position.digest}
