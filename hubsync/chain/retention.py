"""Retention: find the objects of a run that are no longer needed, and delete them.

Kept are the newest version, the served version, and the versions that the policy names. Each keeps a path to it from an
anchor, or from the base checkpoint where no anchor precedes it. So a replica that joins, or whose next deltas are gone,
reaches every kept version. A kept version keeps its own delta, so replicas that follow continue with deltas. Between
kept versions, the merged deltas that a compactor would make today are kept.

An object is deleted only after it has been unneeded for a grace period, by the storage's clock: a replica may be
downloading it. `gc.json` records since when. Manifests are deleted before their parts, so no existing manifest names
missing parts. Newer manifests are deleted before the older ones on the path to them, so a collector that is killed
leaves no listed version without a path. Parts without a manifest are never deleted from a live epoch: its writer may be
about to write the manifest.

Status objects of replicas, which nothing of the protocol reads, are unneeded once they were not renewed for a day.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hubsync.bucket.base import Bucket, Stat
from hubsync.errors import BucketError, FormatError, NoPath
from hubsync.format.documents import FORMAT, LAST_YEAR, MAX_TABLE_BYTES, seal, unseal
from hubsync.format.manifest import MAX_VERSION, Manifest, Position

from .index import ChainIndex
from .layout import Layout
from .planner import Planner
from .reader import ChainReader
from .spans import chain_of, due
from .visible import once_visible

logger = logging.getLogger(__name__)

_MOST_STATUSES = 1000  # that one call deletes
STALE_S = 24 * 3600.0  # seconds after which a status object that was not renewed is unneeded

_OURS = re.compile(r"epochs/(\d{8}-[0-9a-f]{8}|compact-[0-9a-f]{8})/(?:deltas|anchors|merged)/.+")


@dataclass(frozen=True)
class Policy:
    """The versions to keep, besides the newest and the served one.

    Attributes:
        keep_last: keep this many of the newest versions.
        keep_every: keep versions whose number is a multiple of this; 0 for none.
        ttl: seconds after which a version without an explicit expiry expires; None for never. The two rules above do
            not keep expired versions.
        grace: seconds that an object must be unneeded before it is deleted.
    """

    keep_last: int
    keep_every: int = 0
    ttl: float | None = None
    grace: float = 3600.0


@dataclass(frozen=True)
class Garbage:
    """Objects that are no longer needed.

    Attributes:
        what: a description such as "version 12" or "merged versions 8..12".
        why: why it is not needed.
        manifest: name of its manifest; None for parts without one.
        parts: names of its other objects.
        nbytes: size of all objects.
        wait: seconds until it may be deleted; 0 for now.
    """

    what: str
    why: str
    manifest: str | None
    parts: tuple[str, ...]
    nbytes: int
    wait: float

    @property
    def paths(self) -> tuple[str, ...]:
        return self.parts if self.manifest is None else (self.manifest, *self.parts)


def unneeded_since(bucket: Bucket) -> dict[str, float]:
    """Object name -> since when it has been unneeded, in seconds by the storage's clock, as `gc.json` states it."""
    try:
        data = bucket.read([Layout.GARBAGE]).get(Layout.GARBAGE)
        since = {} if data is None else unseal(data, Layout.GARBAGE, MAX_TABLE_BYTES).get("since")
    except FormatError as error:
        logger.warning("ignoring %s, so grace periods start again: %s", Layout.GARBAGE, error)
        return {}
    if not isinstance(since, dict):
        return {}
    return {path: float(time) for path, time in since.items() if type(time) in (int, float) and 0 <= time < LAST_YEAR}


class Collector:
    """Finds and deletes objects that a run no longer needs. Several may run at once.

    Raises:
        BucketError: also if the storage does not state when objects were written.
    """

    def __init__(self, bucket: Bucket, reader: ChainReader, policy: Policy):
        self._bucket = bucket
        self._reader = reader
        self._policy = policy

    def look(self) -> list[Garbage]:
        """Objects that are not needed now. Writes nothing. The newest object is the clock: waits are upper bounds."""
        stats = self._stats()
        return self._garbage(stats, self._marks(), max((_time(stat) for stat in stats.values()), default=0.0))

    def collect(self) -> list[Garbage]:
        """Delete objects that have been unneeded for the grace period. Returns these, and those that have to wait."""
        served, marks = self._reader.served(), self._marks()
        now = self._now(marks)
        garbage = self._garbage(self._stats(), marks, now)
        ripe = [found for found in garbage if found.wait == 0]
        marks = {path: min(marks.get(path, now), now) for found in garbage for path in found.paths}
        self._remember(marks)  # parts stay known as garbage even if this process ends before it deletes them
        if self._reader.served() != served:
            return self.collect()  # the served version was changed meanwhile
        self._bucket.delete([found.manifest for found in ripe if found.manifest is not None])
        self._bucket.delete([path for found in ripe for path in found.parts])
        for found in ripe:
            for path in found.paths:
                del marks[path]
        self._remember(marks)
        return garbage

    # --- needed objects -----------------------------------------------------------------------------

    def _garbage(self, stats: Mapping[str, Stat], marks: Mapping[str, float], now: float) -> list[Garbage]:
        index = ChainIndex(self._bucket, self._reader.run())
        index.survey()  # after the listing: every listed part has its manifest by now, or never
        manifests = index.everything()
        chain = self._reader.manifests()
        kept, reasons = self._kept(chain, stats, now)
        lost = self._lost(manifests, stats)
        needed = self._needed(index, manifests, kept, lost, self._shortcuts(chain))
        found = [
            self._describe(manifest, reasons, stats)
            for manifest in sorted(manifests, key=_newest_first)
            if Layout.manifest(manifest) not in needed
        ]
        claimed = {path for manifest in manifests for path in _paths(manifest)}
        found += list(_orphans(stats, claimed, marks, live=self._live_epoch(index)))
        found += list(_stale(self._bucket.list(Layout.REPLICAS), now))
        return [self._with_wait(garbage, marks, now) for garbage in found]

    def _kept(
        self, chain: list[Manifest], stats: Mapping[str, Stat], now: float
    ) -> tuple[set[Position], dict[Position, str]]:
        """Positions to keep, and the reasons why others of the chain are not kept."""
        policy, reader = self._policy, self._reader
        always = {reader.newest(), reader.served()}
        positions = list(dict.fromkeys(manifest.position for manifest in chain))
        last = set(positions[max(0, len(positions) - policy.keep_last) :])
        expired = {manifest.position for manifest in chain if self._has_expired(manifest, stats, now)}
        kept, reasons = set(always), {}
        for position in positions:
            every = policy.keep_every and position.version and position.version % policy.keep_every == 0
            if position in always:
                continue
            if position in expired:
                reasons[position] = "it has expired"
            elif position in last or every:
                kept.add(position)
            else:
                reasons[position] = f"it is not one of the last {policy.keep_last}"
        return kept, reasons

    def _has_expired(self, manifest: Manifest, stats: Mapping[str, Stat], now: float) -> bool:
        if manifest.expires is not None:
            return manifest.expires <= now
        stat = stats.get(Layout.manifest(manifest))
        return self._policy.ttl is not None and stat is not None and _time(stat) + self._policy.ttl <= now

    def _lost(self, manifests: list[Manifest], stats: Mapping[str, Stat]) -> set[str]:
        """Names of manifests with missing parts. Paths must not use them."""
        unseen = {part for manifest in manifests for part in _paths(manifest)[1:] if part not in stats}
        unseen -= self._bucket.stat(sorted(unseen)).keys()  # some were written after the listing
        return {path for manifest in manifests for path, *parts in [_paths(manifest)] if unseen.intersection(parts)}

    def _shortcuts(self, chain: list[Manifest]) -> set[tuple[Position | None, Position]]:
        """Start and end of the merged deltas that a compactor would make today."""
        spans = due(chain_of(chain, self._reader.spans(chain)), MAX_VERSION)
        return {(span[0].parent, span[-1].position) for span in spans}

    def _needed(
        self,
        index: ChainIndex,
        manifests: list[Manifest],
        kept: set[Position],
        lost: set[str],
        shortcuts: set[tuple[Position | None, Position]],
    ) -> set[str]:
        """Names of the manifests that kept versions need."""
        deltas = {manifest.position for manifest in manifests if manifest.kind == "delta"}
        needed = set()
        for manifest in manifests:
            own = manifest.kind == "delta" or (manifest.kind == "anchor" and manifest.position not in deltas)
            between = manifest.parent in kept and (manifest.parent, manifest.position) in shortcuts
            if manifest.position in kept and (own or (manifest.kind == "merged" and between)):
                needed.add(Layout.manifest(manifest))
        planner = Planner(index, self._reader.run().origin, lost)
        for position in kept:
            target = index.at_version(position.version) if position.version else None
            needed |= {Layout.manifest(manifest) for manifest in self._path_to(planner, target)}
        return needed

    def _path_to(self, planner: Planner, target: Manifest | None) -> list[Manifest]:
        """Manifests on the path to a version: from an anchor, where any replica can start; else from the run's base.

        NoPath: if no path leads to the newest version.
        """
        plan = planner.cheapest(target, None, base_available=False)
        if plan is None and self._reader.run().base.model is not None:
            plan = planner.cheapest(target, None, base_available=True)
        if plan is not None:
            return [*([plan.anchor] if plan.anchor else []), *plan.deltas]
        if target is not None and target.position == self._reader.newest():
            raise NoPath(
                f"no path leads to {target.position}, neither from an anchor nor from the base model. Nothing was "
                "deleted; let the trainer upload an anchor first (`engine.anchor()`)"
            )
        return []

    def _live_epoch(self, index: ChainIndex) -> str:
        """The first epoch in which parts without a manifest may still get one."""
        newest = index.newest()
        return "" if newest is None else newest.epoch

    # --- descriptions and times ---------------------------------------------------------------------

    def _describe(self, manifest: Manifest, reasons: Mapping[Position, str], stats: Mapping[str, Stat]) -> Garbage:
        path, *parts = _paths(manifest)
        if manifest.kind == "merged":
            assert manifest.parent is not None  # the parser guarantees it
            what = f"merged versions {manifest.parent.version}..{manifest.version}"
            why = "no kept version needs it"
        elif manifest.kind == "anchor":
            what, why = f"anchor of version {manifest.version}", "no kept version needs it"
        else:
            what = f"version {manifest.version}"
            why = reasons.get(manifest.position, "it is not on the current chain")
        return Garbage(what, why, path, tuple(parts), _size([path, *parts], stats), 0.0)

    def _with_wait(self, garbage: Garbage, marks: Mapping[str, float], now: float) -> Garbage:
        since = max(min(marks.get(path, now), now) for path in garbage.paths)
        wait = max(0.0, since + self._policy.grace - now)
        return Garbage(garbage.what, garbage.why, garbage.manifest, garbage.parts, garbage.nbytes, wait)

    def _stats(self) -> dict[str, Stat]:
        return {stat.path: stat for stat in self._bucket.list(Layout.EPOCHS)}

    def _marks(self) -> dict[str, float]:
        return unneeded_since(self._bucket)

    def _remember(self, marks: Mapping[str, float]) -> None:
        document = {"format": FORMAT, "since": dict(marks), "nonce": secrets.token_hex(8)}
        self._bucket.commit(Layout.GARBAGE, seal(document, MAX_TABLE_BYTES))

    def _now(self, marks: Mapping[str, float]) -> float:
        """The storage's time: that of the object written last."""
        self._remember(marks)
        path = Layout.GARBAGE
        return _time(once_visible(self._bucket, lambda: self._bucket.stat([path]).get(path), path))


def _orphans(stats: Mapping[str, Stat], claimed: set[str], marks: Mapping[str, float], live: str) -> Iterator[Garbage]:
    """Parts without a manifest, by epoch: of ended epochs, of compactors, and of deleted manifests."""
    epochs: dict[str, list[str]] = {}
    for path in stats:
        match = _OURS.fullmatch(path)
        if match is None or path in claimed or path.endswith(("/manifest.json", "/epoch.json")):
            continue
        if match[1] < live or match[1].startswith("compact-") or path in marks:
            epochs.setdefault(match[1], []).append(path)
    for epoch, paths in epochs.items():
        why = "their version was never committed, or was deleted"
        yield Garbage(f"{len(paths)} parts of epoch {epoch}", why, None, tuple(paths), _size(paths, stats), 0.0)


def _stale(statuses: Iterable[Stat], now: float) -> Iterator[Garbage]:
    """Status objects of replicas that are gone, and whatever else lies in their directory."""
    old = [stat for stat in statuses if stat.modified is not None and stat.modified + STALE_S <= now][:_MOST_STATUSES]
    if old:
        paths, nbytes = tuple(stat.path for stat in old), sum(stat.size for stat in old)
        yield Garbage(f"status of {len(old)} replicas", "it was not renewed for a day", None, paths, nbytes, 0.0)


def _newest_first(manifest: Manifest) -> tuple[int, bool]:
    """Sort key. Merged deltas come after the version that they lead to: they may be the only path to it."""
    return -manifest.version, manifest.kind == "merged"


def _paths(manifest: Manifest) -> list[str]:
    """Names of a manifest and of its parts."""
    return [Layout.manifest(manifest), *(Layout.part(manifest, part) for part in manifest.parts)]


def _size(paths: Iterable[str], stats: Mapping[str, Stat]) -> int:
    return sum(stats[path].size for path in paths if path in stats)


def _time(stat: Stat) -> float:
    if stat.modified is None:
        raise BucketError(
            f"the storage does not state when {stat.path} was written, so nothing can be deleted safely. "
            "Delete old runs as a whole instead"
        )
    return stat.modified
