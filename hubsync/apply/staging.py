"""Staged changes: what a commit writes, what takes it back, and the digests that go with either."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from hubsync.format.digest import Digest
from hubsync.format.manifest import Position

from .memory import Edit, Memory, merged


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


class EditCollector:
    """Collects edits of storages into one edit for each key of the memory."""

    def __init__(self, memory: Memory):
        self.changed = 0
        self._memory = memory
        self._touched: set[int] = set()
        self._parts: dict[int, list[Edit]] = defaultdict(list)

    def add(self, storage: int, places: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        self.changed += len(places)
        self._touched.add(storage)
        self._parts[self._memory.key(storage)].append(Edit(places, old, new.to(old.dtype).to(old.device)))

    @property
    def touched(self) -> frozenset[int]:
        return frozenset(self._touched)

    def finish(self) -> dict[int, Edit]:
        return {key: merged(parts) for key, parts in self._parts.items()}
