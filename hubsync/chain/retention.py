"""What of a run is still needed, and deleting the rest.

Kept are the newest version, the one to serve, and those that the policy asks for; each with a way to it from an anchor,
or from the base checkpoint where there is no anchor before it, so that whoever joins, or finds the deltas after its own
version gone, comes to every kept version. A version that is kept keeps its own delta, so whoever follows goes on with
deltas. Between kept versions are kept the merged deltas that a compactor would make today.

An object is deleted only after it has been seen unneeded for a grace period, by the storage's clock: somebody may be
downloading it. `gc.json` remembers since when. Manifests go before their parts, so that no manifest that is still there
names parts that are not; and newer ones before the older ones that lead to them, so that a collector that is killed
leaves no version that is listed and cannot be reached. Nothing is ever deleted of a live epoch that has no manifest:
its writer may be about to write that.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hubsync.bucket.base import Bucket, Stat
from hubsync.errors import BucketError, FormatError, NoPath
from hubsync.format.documents import FORMAT, LAST_YEAR, seal, unseal
from hubsync.format.manifest import MAX_VERSION, Manifest, Position

from .index import ChainIndex
from .layout import Layout
from .planner import Planner
from .reader import ChainReader
from .spans import chain_of, due

logger = logging.getLogger(__name__)

_OURS = re.compile(r"epochs/(\d{8}-[0-9a-f]{8}|compact-[0-9a-f]{8})/(?:deltas|anchors|merged)/.+")


@dataclass(frozen=True)
class Policy:
    """Which versions are kept, beside the newest and the one to serve.

    Attributes:
        keep_last: the newest so many.
        keep_every: those whose number is a multiple of this; 0 for none.
        ttl: seconds after which a version expires that does not say itself when; None for never. What is expired is
            not kept for its number.
        grace: seconds that an object must have been unneeded before it is deleted.
    """

    keep_last: int
    keep_every: int = 0
    ttl: float | None = None
    grace: float = 3600.0


@dataclass(frozen=True)
class Garbage:
    """Something that nobody needs.

    Attributes:
        what: for people, such as "version 12" or "merged versions 8..12".
        why: why it is not needed.
        manifest: name of its manifest; None for parts without one.
        parts: names of its other objects.
        nbytes: size of all of it.
        wait: seconds until it may be deleted; 0 if it may.
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


class Collector:
    """Finds and deletes what a run does not need any more. Several may run at once.

    Raises:
        BucketError: also where the storage does not tell when objects were written.
    """

    def __init__(self, bucket: Bucket, reader: ChainReader, policy: Policy):
        self._bucket = bucket
        self._reader = reader
        self._policy = policy

    def look(self) -> list[Garbage]:
        """What is not needed now. Writes nothing: the time is that of the newest object, waits are rather too long."""
        stats = self._stats()
        return self._garbage(stats, self._marks(), max((_time(stat) for stat in stats.values()), default=0.0))

    def collect(self) -> list[Garbage]:
        """Delete what has not been needed for the grace period. Returns it, and what has to wait."""
        served, marks = self._reader.served(), self._marks()
        now = self._now(marks)
        garbage = self._garbage(self._stats(), marks, now)
        ripe = [found for found in garbage if found.wait == 0]
        marks = {path: min(marks.get(path, now), now) for found in garbage for path in found.paths}
        self._remember(marks)  # also so that parts are known as garbage if this ends before they are deleted
        if self._reader.served() != served:
            return self.collect()  # somebody has rolled back meanwhile
        self._bucket.delete([found.manifest for found in ripe if found.manifest is not None])
        self._bucket.delete([path for found in ripe for path in found.parts])
        for found in ripe:
            for path in found.paths:
                del marks[path]
        self._remember(marks)
        return garbage

    # --- what is needed -----------------------------------------------------------------------------

    def _garbage(self, stats: Mapping[str, Stat], marks: Mapping[str, float], now: float) -> list[Garbage]:
        index = ChainIndex(self._bucket, self._reader.run())
        index.survey()  # after the objects were listed: a part that was listed has its manifest by now, or never
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
        return [self._with_wait(garbage, marks, now) for garbage in found]

    def _kept(
        self, chain: list[Manifest], stats: Mapping[str, Stat], now: float
    ) -> tuple[set[Position], dict[Position, str]]:
        """Positions to keep; and why the others of the chain are not kept."""
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
        """Names of manifests whose parts are not all there: no way may count on them."""
        unseen = {part for manifest in manifests for part in _paths(manifest)[1:] if part not in stats}
        unseen -= self._bucket.stat(sorted(unseen)).keys()  # some were written after the listing
        return {path for manifest in manifests for path, *parts in [_paths(manifest)] if unseen.intersection(parts)}

    def _shortcuts(self, chain: list[Manifest]) -> set[tuple[Position | None, Position]]:
        """Ends of the merged deltas that a compactor would make: those that overlap are not for ever."""
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
        """What leads to a version: from an anchor, which anybody can start from; else from the run's base checkpoint.

        NoPath if nothing leads to the newest version.
        """
        plan = planner.cheapest(target, None, base_available=False)
        if plan is None and self._reader.run().base.model is not None:
            plan = planner.cheapest(target, None, base_available=True)
        if plan is not None:
            return [*([plan.anchor] if plan.anchor else []), *plan.deltas]
        if target is not None and target.position == self._reader.newest():
            raise NoPath(
                f"nothing leads to {target.position} any more, from no anchor and not from the base model: ask the "
                "trainer for an anchor (`engine.anchor()`) before anything is deleted"
            )
        return []

    def _live_epoch(self, index: ChainIndex) -> str:
        """From this epoch on, parts without a manifest may still get one."""
        newest = index.newest()
        return "" if newest is None else newest.epoch

    # --- words and times ----------------------------------------------------------------------------

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
        """Since when objects have been seen unneeded, in seconds of the storage's clock."""
        try:
            data = self._bucket.read([Layout.GARBAGE]).get(Layout.GARBAGE)
            since = {} if data is None else unseal(data, Layout.GARBAGE).get("since")
        except FormatError as error:
            logger.warning("%s is not used, the grace of what is unneeded begins anew: %s", Layout.GARBAGE, error)
            return {}
        if not isinstance(since, dict):
            return {}
        return {
            path: float(time) for path, time in since.items() if type(time) in (int, float) and 0 <= time < LAST_YEAR
        }

    def _remember(self, marks: Mapping[str, float]) -> None:
        document = {"format": FORMAT, "since": dict(marks), "nonce": secrets.token_hex(8)}
        self._bucket.commit(Layout.GARBAGE, seal(document))

    def _now(self, marks: Mapping[str, float]) -> float:
        """The storage's time: that of what was written last."""
        self._remember(marks)
        return _time(self._bucket.stat([Layout.GARBAGE])[Layout.GARBAGE])


def _orphans(stats: Mapping[str, Stat], claimed: set[str], marks: Mapping[str, float], live: str) -> Iterator[Garbage]:
    """Parts without a manifest, by epoch: of epochs that are over, of compactors, and of manifests deleted before."""
    epochs: dict[str, list[str]] = {}
    for path in stats:
        match = _OURS.fullmatch(path)
        if match is None or path in claimed or path.endswith(("/manifest.json", "/epoch.json")):
            continue
        if match[1] < live or match[1].startswith("compact-") or path in marks:
            epochs.setdefault(match[1], []).append(path)
    for epoch, paths in epochs.items():
        why = "their version was never committed, or has been deleted"
        yield Garbage(f"{len(paths)} parts of epoch {epoch}", why, None, tuple(paths), _size(paths, stats), 0.0)


def _newest_first(manifest: Manifest) -> tuple[int, bool]:
    """Merged deltas after the version that they lead to: they may be the only way to it."""
    return -manifest.version, manifest.kind == "merged"


def _paths(manifest: Manifest) -> list[str]:
    """Names of a manifest and of its parts."""
    return [Layout.manifest(manifest), *(Layout.part(manifest, part) for part in manifest.parts)]


def _size(paths: Iterable[str], stats: Mapping[str, Stat]) -> int:
    return sum(stats[path].size for path in paths if path in stats)


def _time(stat: Stat) -> float:
    if stat.modified is None:
        raise BucketError(f"the storage does not tell when {stat.path} was written: nothing can be deleted safely")
    return stat.modified
