"""What a session needs of a served model or adapter."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from hubsync.errors import HubsyncError
from hubsync.format.manifest import Position

from .background import Background


class Served(Protocol):
    """What a worker serves of a run, and how a version of it is prepared and loaded.

    `attach`, `stage` and `verify` run on the background thread and only read live weights. All else runs on the main
    thread. All methods may raise HubsyncErrors.
    """

    metrics: dict[str, float]
    """Part of the status. The session adds its own."""

    remedy: str
    """A sentence: what an operator does when healing fails."""

    @property
    def run_id(self) -> str | None: ...

    @property
    def position(self) -> Position | None:
        """Position of the served weights; None until it is known."""
        ...

    @property
    def staged(self) -> Position | None: ...

    @property
    def mapped(self) -> bool:
        """Has `attach` found what this rank holds?"""
        ...

    @property
    def joined(self) -> bool:
        """Have the ranks agreed on what all of them hold?"""
        ...

    @property
    def verified(self) -> bool:
        """Has the digest been recomputed from the served weights since the last write?"""
        ...

    @property
    def poisoned(self) -> str | None:
        """Why the served weights are not known to be right; None if they are."""
        ...

    def details(self) -> dict[str, Any]:
        """More fields for the status."""
        ...

    def attach(self) -> None:
        """Map this rank's weights and, once the ranks have joined or there is only one, find its position."""
        ...

    def join(self, obstacle: HubsyncError | None) -> HubsyncError | None:
        """Combine the inventories of all ranks. A collective.

        Args:
            obstacle: why this rank cannot join.

        Returns:
            why the parts do not form a whole; None if they do.

        Raises:
            the first rank's obstacle, on all ranks.
        """
        ...

    def layout(self) -> dict[str, Any] | None:
        """The class of every tensor in this rank's memory; None before it is mapped."""
        ...

    def expect(self, target: Position) -> None:
        """`target` is wanted next. Raise if it cannot be staged now."""
        ...

    def stage(self, target: Position, reading: AbstractContextManager[Any]) -> int:
        """Prepare the version at `target`. Returns bytes downloaded. Reads live weights within `reading` only."""
        ...

    def discard(self) -> None:
        """Forget the staged version."""
        ...

    def commit(self, target: Position) -> int:
        """Serve `target` on all ranks, or on none. A collective. Returns elements written."""
        ...

    def undo(self) -> Position:
        """Take the last commit back, on all ranks or on none. A collective. Returns the position afterwards."""
        ...

    def doubt(self) -> None:
        """Something may have changed the served weights: they are not verified any more."""
        ...

    def verify(self) -> bool:
        """Recompute the digest of the served weights. False if they changed meanwhile, so that nothing is known."""
        ...

    def verify_slice(self) -> bool:
        """Look at some more of verified weights, in a few milliseconds.

        Returns whether all have been looked at once more.
        """
        ...

    def heal(self, background: Background) -> int:
        """Rebuild the served weights. Returns elements written. Take `background.working` to use the run's reader."""
        ...

    def poison(self, reason: str) -> None:
        """From here on the served weights are not known to be right."""
        ...
