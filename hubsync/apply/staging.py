"""Staged changes: the edits that a commit writes, the digests afterwards, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

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


@dataclass(frozen=True)
class Undo:
    """The last commit, and what it replaced.

    Attributes:
        staged: the change that was written, from a known position.
        sums: this rank's digests before.
        dense: values before of the tensors that are loaded whole.
    """

    staged: Staged
    sums: Sums
    dense: dict[int, torch.Tensor]

    @cached_property
    def change(self) -> Staged:
        """The change that takes the commit back."""
        staged = self.staged
        assert staged.start is not None
        edits = {key: edit.inverted() for key, edit in staged.edits.items()}
        return Staged(staged.target, staged.start, edits, staged.touched, self.sums, staged.changed, self.dense)
