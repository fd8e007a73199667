"""Path planner: finds the manifests that lead from given weights to a version for the fewest bytes."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from hubsync.format.manifest import Manifest, Position

from .index import ChainIndex
from .layout import Layout


@dataclass(frozen=True)
class Step:
    """One delta on a path, applied or undone (`inverse`)."""

    manifest: Manifest
    inverse: bool = False

    @property
    def start(self) -> Position:
        """The position that the step applies to."""
        return self.manifest.position if self.inverse else self._parent

    @property
    def end(self) -> Position:
        """The position after the step."""
        return self._parent if self.inverse else self.manifest.position

    @property
    def _parent(self) -> Position:
        assert self.manifest.parent is not None  # the parser guarantees it for deltas
        return self.manifest.parent


@dataclass(frozen=True)
class Plan:
    """A path to `target`: a starting point, then `steps` in order.

    Attributes:
        start: the caller's position, if the path starts there.
        anchor: manifest of the anchor to load first, if the path starts there.
        base: whether the path starts at the local base checkpoint (version 0).
        steps: deltas to apply or to undo. Each starts at the end of the one before.
        target: the end of the path.
    """

    start: Position | None
    anchor: Manifest | None
    base: bool
    steps: tuple[Step, ...]
    target: Position

    @property
    def deltas(self) -> list[Manifest]:
        """Manifests to download for the steps, in their order."""
        return [step.manifest for step in self.steps]

    @property
    def nbytes(self) -> int:
        """Bytes to download."""
        return sum(delta.nbytes for delta in self.deltas) + (self.anchor.nbytes if self.anchor else 0)


@dataclass(order=True)
class _Place:
    """A position on a possible path, and the path from there to the target."""

    nbytes: int
    steps: int
    number: int  # of two equal places, the one found first comes first
    position: Position = field(compare=False)
    step: Step | None = field(compare=False, default=None)
    onward: _Place | None = field(compare=False, default=None)

    def path(self) -> tuple[Step, ...]:
        steps, place = [], self
        while place.step is not None and place.onward is not None:
            steps.append(place.step)
            place = place.onward
        return tuple(steps)


class Planner:
    """Finds paths in the last survey of an index, by Dijkstra's algorithm from the target backwards.

    Args:
        lost: names of manifests whose parts are gone.
    """

    def __init__(self, index: ChainIndex, origin: Position, lost: Collection[str] = ()):
        self._index = index
        self._origin = origin
        self._lost = lost
        self._numbers = itertools.count()

    def cheapest(self, target: Manifest | None, have: Position | None, base_available: bool) -> Plan | None:
        """The plan with the fewest bytes (then the fewest steps) to a version (None: version 0); None if there is none.

        Searches from the target backwards, the cheapest place first, so that only relevant manifests are read.
        """
        end = self._origin if target is None else target.position
        floor = self._floor(end, have)
        local = have is not None or base_available  # a start that costs no download, however far back
        undone = self._undone(have, end, floor)
        places = [_Place(0, 0, next(self._numbers), end)]
        best: Plan | None = None
        visited: set[Position] = set()
        while places:
            place = heapq.heappop(places)
            if best is not None and best.nbytes <= place.nbytes:
                break
            if place.position in visited:
                continue
            visited.add(place.position)
            for plan in self._beginnings(place, end, have, base_available):
                if best is None or plan.nbytes < best.nbytes:
                    best = plan
            # Places before this one cost more. An older anchor has as many bytes as this one, and more deltas after it.
            if best is not None and (best.nbytes <= place.nbytes or not local):
                break
            ahead = floor if place.position.version > floor else 0
            for step in self._into(place, target, undone, ahead):
                spent, count = place.nbytes + step.manifest.nbytes, place.steps + 1
                heapq.heappush(places, _Place(spent, count, next(self._numbers), step.start, step, place))
        return best

    def _floor(self, end: Position, have: Position | None) -> int:
        """The lowest version to read ahead at first: where a path is likely to start."""
        if have is not None:
            return min(have.version, end.version)
        anchored = (version for names in self._index.epochs.values() for version in names.anchors)
        return max((version for version in anchored if version <= end.version), default=0)

    def _undone(self, have: Position | None, end: Position, floor: int) -> dict[Position, list[Step]]:
        """Deltas that can be undone on the path down from `have`, by the position that undoing reaches.

        Only deltas that their files alone can invert. A compact delta is encoded against weights that are not
        available there.
        """
        undone: dict[Position, list[Step]] = defaultdict(list)
        manifest = None if have is None else self._index.at_version(have.version)
        if manifest is None or manifest.position != have:
            return undone
        deltas = list(self._index.merged(floor, manifest.version)) if manifest.version > end.version else []
        for link in self._index.walk(manifest, floor=floor):
            if link.delta is None:
                break
            deltas.append(link.delta)
            if Step(link.delta).start.version <= end.version:
                break
        for delta in deltas:
            if delta.invertible and not self._is_lost(delta):
                step = Step(delta, inverse=True)
                undone[step.end].append(step)
        return undone

    def _beginnings(self, place: _Place, end: Position, have: Position | None, base_available: bool) -> Iterator[Plan]:
        """Plans that start at a place."""
        if place.position == have:
            yield Plan(have, None, False, place.path(), end)
        elif base_available and place.position == self._origin:
            yield Plan(None, None, True, place.path(), end)
        else:
            anchor = self._index.anchor_of(place.position)
            if anchor is not None and not self._is_lost(anchor):
                yield Plan(None, anchor, False, place.path(), end)

    def _into(
        self, place: _Place, target: Manifest | None, undone: dict[Position, list[Step]], floor: int
    ) -> Iterator[Step]:
        """Steps that lead to a place."""
        yield from undone.get(place.position, ())
        if place.step is not None and place.step.inverse:
            return  # up and down again is a circle
        manifest = target if place.step is None else self._index.parent_of(place.step.manifest, floor=floor)
        single = None if manifest is None else self._index.leading_to(manifest)
        deltas = [*self._index.merged_into(place.position, floor=floor), *([] if single is None else [single])]
        yield from (Step(delta) for delta in deltas if not self._is_lost(delta))

    def _is_lost(self, manifest: Manifest) -> bool:
        return Layout.manifest(manifest) in self._lost
