"""The manifests of a run as a graph: which exist, which is the newest, and which deltas connect them.

Each epoch is a straight line, because it has one writer. A new epoch continues from a version of an older one: its
first delta names that version as its parent. Where its weights are unrelated, it begins with an anchor. So the newest
version of the run is the newest of the highest epoch that has any. Versions that a replaced writer still commits in its
own, lower epoch are a dead branch: readable, but never the newest.

Merged deltas lie in directories of compactors. They are shortcuts between existing versions and never decide which
version is the newest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hubsync.bucket.base import Bucket
from hubsync.errors import FormatError
from hubsync.format.documents import MAX_BYTES
from hubsync.format.manifest import MAX_VERSION, Manifest, Position, Run

from .layout import EpochNames, Layout, epoch_names, merged_names

logger = logging.getLogger(__name__)

READ_AHEAD = 990  # manifests of earlier versions, read in one call while walking back; a call takes 1000 names


@dataclass(frozen=True)
class Link:
    """One position on a chain, and the delta that ends there: None where the chain begins or is cut off."""

    position: Position
    delta: Manifest | None


class ChainIndex:
    """Reads names and manifests (never parts) and keeps them. Manifests are immutable, so they never go stale."""

    def __init__(self, bucket: Bucket, run: Run):
        self._bucket = bucket
        self._run = run
        self._manifests: dict[str, Manifest] = {}
        self._epochs: dict[str, EpochNames] = {}
        self._ignored: set[str] = set()  # names of unusable manifests that are not needed
        self._merged: dict[int, list[tuple[int, str]]] = {}  # end version of merged deltas -> start version, name

    @property
    def epochs(self) -> dict[str, EpochNames]:
        """Epochs and their versions as of the last `survey`, oldest first."""
        return self._epochs

    def survey(self) -> None:
        """List every epoch with its manifests, in one listing. Forget deleted manifests."""
        paths = {stat.path for stat in self._bucket.list(Layout.EPOCHS)}
        self._epochs = epoch_names(paths)
        self._merged = merged_names(paths)
        self._manifests = {path: manifest for path, manifest in self._manifests.items() if path in paths}

    def newest(self, below: int | None = None) -> Manifest | None:
        """Newest manifest of the last survey, of versions lower than `below` if given; None if there is none."""
        for epoch in reversed(self._epochs):
            versions = self._epochs[epoch].versions
            for version in sorted(versions if below is None else (v for v in versions if v < below), reverse=True):
                manifest = self.at(epoch, version)
                if manifest is not None:
                    return manifest
        return None

    def at_version(self, version: int) -> Manifest | None:
        """Manifest of this version in the highest epoch that has it, as of the last survey."""
        for epoch, names in reversed(self._epochs.items()):
            if version in names.versions:
                return self.at(epoch, version)
        return None

    def at(self, epoch: str, version: int, *, down_to: int | None = None) -> Manifest | None:
        """The delta to this version, else its anchor, else None.

        The same call reads earlier deltas of the epoch, from `down_to` on: walking back needs them next.
        """
        delta, anchor = Layout.delta(epoch, version), Layout.anchor(epoch, version)
        if delta not in self._manifests:
            first = version if down_to is None else max(1, down_to, version - READ_AHEAD)
            self._load([anchor, *(Layout.delta(epoch, v) for v in range(first, version + 1))])
        return self._manifests.get(delta) or self._manifests.get(anchor)

    def anchor_of(self, position: Position) -> Manifest | None:
        """A committed anchor with exactly this position, as of the last survey."""
        epochs = [epoch for epoch, names in reversed(self._epochs.items()) if position.version in names.anchors]
        self._load(Layout.anchor(epoch, position.version) for epoch in epochs)
        found = (self._manifests.get(Layout.anchor(epoch, position.version)) for epoch in epochs)
        return next((anchor for anchor in found if anchor is not None and anchor.position == position), None)

    def newest_anchor(self) -> Manifest | None:
        """The readable anchor of the highest version of the last survey. Reads no other manifest."""
        places = {(version, epoch) for epoch, names in self._epochs.items() for version in names.anchors}
        for version, epoch in sorted(places, reverse=True):
            path = Layout.anchor(epoch, version)
            self._load_shortcuts([path])
            if path in self._manifests:
                return self._manifests[path]
        return None

    def anchors(self) -> list[Manifest]:
        """All committed anchors of the last survey, newest first."""
        places = [(epoch, version) for epoch, names in self._epochs.items() for version in sorted(names.anchors)]
        paths = [Layout.anchor(epoch, version) for epoch, version in reversed(places)]
        self._load(paths)
        return [self._manifests[path] for path in paths if path in self._manifests]

    def everything(self) -> list[Manifest]:
        """All manifests of the last survey: deltas and anchors by epoch and version, then merged deltas."""
        paths = []
        for epoch, names in self._epochs.items():
            paths += [Layout.delta(epoch, version) for version in sorted(names.deltas)]
            paths += [Layout.anchor(epoch, version) for version in sorted(names.anchors)]
        self._load(paths)
        return [self._manifests[path] for path in paths if path in self._manifests] + self.merged(0, MAX_VERSION)

    def add(self, manifest: Manifest) -> None:
        """Keep a manifest from elsewhere (the head), after the same checks."""
        path = Layout.manifest(manifest)
        self._check(manifest, path)
        self._manifests[path] = manifest

    def extract(self, deltas: Iterable[Manifest], names: Iterable[str]) -> ChainIndex:
        """An index of some deltas, and of those anchors and merged deltas among `names` that exist, in one call."""
        names = list(names)
        self._load_shortcuts(names)
        found = ChainIndex(self._bucket, self._run)
        found._ignored = self._ignored
        found._manifests = {name: self._manifests[name] for name in names if name in self._manifests}
        found._manifests |= {Layout.manifest(delta): delta for delta in deltas}
        found._epochs, found._merged = epoch_names(found._manifests), merged_names(found._manifests)
        return found

    def walk(self, start: Manifest | None, *, floor: int = 0) -> Iterator[Link]:
        """Positions from `start` (None: version 0) back to the beginning of the chain, each with the delta to it.

        The last link has no delta: it is version 0, or an anchor that restarted the chain, or a version whose manifest
        is gone. FormatError if a parent is not the one that its child names.
        """
        manifest = start
        position = self._run.origin if start is None else start.position
        while manifest is not None:
            delta = self.leading_to(manifest)
            yield Link(position, delta)
            if delta is None:
                return
            assert delta.parent is not None  # the parser guarantees it for deltas
            position = delta.parent
            manifest = self.parent_of(delta, floor=floor)
        yield Link(position, None)

    def leading_to(self, manifest: Manifest) -> Manifest | None:
        """The delta to a manifest's version: the manifest itself, unless it is an anchor."""
        return manifest if manifest.kind == "delta" else self._delta_to(manifest.position)

    def parent_of(self, delta: Manifest, *, floor: int = 0) -> Manifest | None:
        """Manifest of the version that a delta applies to; None if that is version 0, or the manifest is gone.

        FormatError if the version is not the one that the delta names. A merged delta with that fault is ignored
        instead: it is only a shortcut, and must not block the path around it. `floor`: the lowest version to read
        ahead.
        """
        position = delta.parent
        assert position is not None  # the parser guarantees it for deltas
        if delta.kind == "merged":
            return self._delta_to(position)
        if delta.parent_epoch is None:
            if position != self._run.origin:
                raise FormatError(f"{Layout.manifest(delta)}: names {position} as parent, run.json another version 0")
            return None
        manifest = self.at(delta.parent_epoch, position.version, down_to=min(floor, position.version))
        if manifest is not None and manifest.position != position:
            raise FormatError(f"{Layout.manifest(delta)}: names {position} as parent, found {manifest.position}")
        return manifest

    def merged(self, low: int, high: int) -> list[Manifest]:
        """Merged deltas of the last survey whose versions all lie in `low..high`, by their end."""
        ends = sorted(last for last in self._merged if low <= last <= high)
        paths = [path for last in ends for first, path in self._merged[last] if low <= first]
        self._load_shortcuts(paths)
        return [self._manifests[path] for path in paths if path in self._manifests]

    def merged_into(self, position: Position, *, floor: int = 0) -> list[Manifest]:
        """Merged deltas that lead to a position. The same call reads those to earlier versions."""
        last = position.version
        paths = [path for _, path in self._merged.get(last, ())]
        if any(path not in self._manifests for path in paths):
            ahead = range(max(floor, last - READ_AHEAD), last)
            self._load_shortcuts(
                [*paths, *(path for to in ahead for first, path in self._merged.get(to, ()) if first >= floor)]
            )
        found = (self._manifests.get(path) for path in paths)
        return [manifest for manifest in found if manifest is not None and manifest.position == position]

    def _delta_to(self, position: Position) -> Manifest | None:
        # An anchor does not name the epoch of the delta to its version. It is the anchor's own epoch, or an earlier one
        # if a writer was resumed at this version.
        epochs = [epoch for epoch, names in self._epochs.items() if position.version in names.deltas]
        self._load_shortcuts(Layout.delta(epoch, position.version) for epoch in epochs)
        found = (self._manifests.get(Layout.delta(epoch, position.version)) for epoch in epochs)
        return next((delta for delta in found if delta is not None and delta.position == position), None)

    def unreadable(self) -> dict[str, FormatError]:
        """Names of the unusable manifests of the last survey, each with its error."""
        paths = [path for last in self._merged.values() for _, path in last]
        for epoch, names in self._epochs.items():
            paths += [Layout.delta(epoch, version) for version in names.deltas]
            paths += [Layout.anchor(epoch, version) for version in names.anchors]
        return self._load_usable(sorted(paths))

    def _load_shortcuts(self, paths: Iterable[str]) -> None:
        """`_load`, but ignore a manifest that is damaged or not signed: other deltas lead there too."""
        for path, error in self._load_usable([path for path in paths if path not in self._ignored]).items():
            logger.warning("ignoring an unusable manifest: %s", error)
            self._ignored.add(path)

    def _load_usable(self, paths: Sequence[str]) -> dict[str, FormatError]:
        """`_load`, and return the error of each manifest that cannot be loaded. Few bad ones cost few reads."""
        try:
            self._load(paths)
        except FormatError as error:
            if len(paths) == 1:
                return {paths[0]: error}
            half = len(paths) // 2
            return self._load_usable(paths[:half]) | self._load_usable(paths[half:])
        return {}

    def _load(self, paths: Iterable[str]) -> None:
        unknown = [path for path in paths if path not in self._manifests]
        if not unknown:
            return
        for path, data in self._bucket.read(unknown, max_bytes=MAX_BYTES).items():
            try:
                manifest = Manifest.loads(data)
            except FormatError as error:
                raise type(error)(f"{path}: {error}") from None
            self._check(manifest, path)
            self._manifests[path] = manifest

    def _check(self, manifest: Manifest, path: str) -> None:
        if Layout.manifest(manifest) != path:
            raise FormatError(f"{path}: holds the manifest of {Layout.manifest(manifest)}")
        if manifest.run_id != self._run.run_id or manifest.table_hash != self._run.table.hash:
            raise FormatError(f"{path}: belongs to another run or tensor table than {self._run.run_id}")
        if manifest.version == 0 and manifest.position != self._run.origin:
            raise FormatError(f"{path}: holds {manifest.position}, run.json another version 0")
