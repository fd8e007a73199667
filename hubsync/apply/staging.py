"""Staged changes: the edits that a commit writes, their inverse, and the digests afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hubsync.format.digest import Digest
from hubsync.format.manifest import Position

from .memory import Edit


@dataclass(frozen=True)
class Sums:
    """Digests of this rank's part: of the elements it owns, and of everything that is mapped, copies included."""

    owned: Digest = field(default_factory=Digest)
    held: Digest = field(default_factory=Digest)

    def plus(self, change: Digest, owned: bool, held: bool = True) -> Sums:
        return Sums(self.owned + change if owned else self.owned, self.held + change if held else self.held)


@dataclass(frozen=True)
class Staged:
    """A change of the live weights, ready to be written.

    Attributes:
        start: position of the live weights when it was computed; it can be written from there only. None: from any.
        target: position afterwards.
        edits: by key of the memory.
        touched: numbers of the storages that they change.
        sums: this rank's digests afterwards.
        changed: live elements that differ.
        dense: by table index, the new values of tensors that are loaded whole.
    """

    start: Position | None
    target: Position
    edits: dict[int, Edit]
    touched: frozenset[int]
    sums: Sums
    changed: int
    dense: dict[int, torch.Tensor] = field(default_factory=dict)

    def inverted(self, sums: Sums, dense: dict[int, torch.Tensor]) -> Staged | None:
        """The change that takes this one back; None if it started at no position.

        Args:
            sums: this rank's digests before.
            dense: values before of the tensors that are loaded whole.
        """
        if self.start is None:
            return None
        edits = {key: edit.inverted() for key, edit in self.edits.items()}
        return Staged(self.target, self.start, edits, self.touched, sums, self.changed, dense)
