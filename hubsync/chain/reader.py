"""Read a run: its newest and its served version, paths to them, and verified files.

The head is a hint. A stalled old writer that wakes up may overwrite it, and a writer may die before it writes it. So a
reader keeps a high-water mark and never goes below it. It lists the epochs on first use, when the head is older than
the mark, and when a requested version is missing.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hubsync.bucket.base import Bucket, Changes
from hubsync.errors import ConfigError, FormatError, HeadTooOld, NoPath, ObjectMissing, RunMismatch
from hubsync.format.manifest import MAX_VERSION, SIDE_FILES, Head, Manifest, Position, Run
from hubsync.retry import attempts

from .head import REJECTED, read_head
from .index import ChainIndex
from .layout import Layout
from .nearby import index_between
from .part_files import PartCache
from .planner import Plan, Planner, Step

if TYPE_CHECKING:
    from hubsync.format.codec import OldBits
    from hubsync.format.patch import Patch

logger = logging.getLogger(__name__)

REPLANS = 2  # how often another path is searched after objects of the first one are gone

T = TypeVar("T")


class ChainReader:
    """One reader of one run. Not thread-safe. Several readers, also in several processes, may share a cache.

    Args:
        bucket: the run's prefix.
        cache_dir: downloaded parts are kept in `cache_dir/<run id>/`, under their names in the bucket. The newest
            version seen is kept in `cache_dir/<run id>.newest.json`: no reader with this cache ever takes an older
            version for the newest.
        max_head_age: seconds by the storage's clock. A reader without a cached version rejects an older head
            (HeadTooOld).
    """

    def __init__(self, bucket: Bucket, cache_dir: str | os.PathLike[str], *, max_head_age: float | None = None):
        self._bucket = bucket
        self._cache = Path(cache_dir)
        if max_head_age is not None and not max_head_age > 0:
            raise ConfigError(f"max_head_age must be a positive number of seconds, not {max_head_age:g}")
        self._max_head_age = max_head_age
        self._run: Run | None = None
        self._chain: ChainIndex | None = None
        self._mark: Manifest | None = None  # the newest manifest seen, by (epoch, version)
        self._seen_head: bytes | None = None
        self._served: tuple[Position, int] | None = None  # (newest, its served version) by a valid head
        self._resolved: tuple[Manifest, int, Position] | None = None  # (newest, served version, position)
        self._lost: set[str] = set()  # names of manifests whose parts are gone
        self._part_cache: PartCache | None = None
        self._can_remember = True

    def run(self) -> Run:
        """`run.json`, read once. ObjectMissing if the run does not exist yet."""
        if self._run is None:
            data = self._bucket.read([Layout.RUN]).get(Layout.RUN)
            if data is None:
                raise ObjectMissing(
                    f"{self._bucket.address} holds no run (no {Layout.RUN}): check the address, or start the trainer"
                )
            self._run = Run.loads(data)
        return self._run

    def newest(self) -> Position:
        """The newest committed position. One call while the head is valid. Never goes backwards."""
        self.head()
        return self._position(self._mark)

    def head(self) -> Head | None:
        """Read the head, and list the epochs if it is in doubt. None if it does not exist or is unreadable."""
        data = read_head(self._bucket)
        first_use = self._chain is None
        head = self._parse(data)
        if self._mark is None:
            self._require_fresh(head)
        # One listing per bad head, not one per poll. But a rejected one may be another each time.
        changed, self._seen_head = data != self._seen_head, data
        in_order = head is not None and (self._mark is None or _order(head.manifest) >= _order(self._mark))
        if head is not None and in_order:
            self._raise_mark(head.manifest)
        if first_use or data == REJECTED or (changed and not in_order):
            self._survey()
        return head

    def served(self) -> Position:
        """The committed position that replicas should serve. One call while the head is valid.

        It may be older than the newest (a rollback), and may go backwards. A head that is missing, unreadable or left
        by a stalled old writer is ignored, and so is one that names a version that does not exist. Then the last valid
        head of the newest version decides, if this reader has seen one; else the manifest of that version.
        """
        head = self.head()
        newest = self._mark
        if newest is None:
            return self.run().origin
        if head is not None and head.manifest.position == newest.position:
            self._served = newest.position, head.serve
        said = newest.served
        if self._served is not None and self._served[0] == newest.position:
            said = self._served[1]
        if self._resolved is None or self._resolved[:2] != (newest, said):
            position = self._committed(said) or self._committed(newest.served) or newest.position
            self._resolved = newest, said, position
        return self._resolved[2]

    def changes(self) -> Changes:
        """Pauses between two calls of `newest` or `served`."""
        return self._bucket.changes([Layout.HEAD])

    def manifests(self) -> list[Manifest]:
        """Deltas and anchors of the current chain, oldest first (the delta of a version before its anchor).

        Where an anchor restarted the chain, the versions before it are listed too.
        """
        self._survey()
        found: list[Manifest] = []
        start = self._mark
        while start is not None:
            position = start.position
            for link in self._index.walk(start):
                position = link.position
                anchor = self._index.anchor_of(position)
                found += [manifest for manifest in (anchor, link.delta) if manifest is not None]
            start = self._index.newest(below=position.version)
        return found[::-1]

    def spans(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        """Merged deltas between versions of a chain (as `manifests` returns it), in the order of their ends.

        Includes merged deltas whose single deltas have been deleted.
        """
        known = {manifest.position for manifest in manifests} | {self.run().origin}
        known |= {manifest.parent for manifest in manifests if manifest.parent is not None}
        numbers = {position.version for position in known}
        found = []
        for merged in reversed(self._index.merged(0, MAX_VERSION)):
            parent = merged.parent
            assert parent is not None  # the parser guarantees it
            if parent.version in numbers and parent not in known:
                logger.warning("ignoring %s: the run has no such %s", Layout.manifest(merged), parent)
            elif merged.position in known:
                known.add(parent)
                numbers.add(parent.version)
                found.append(merged)
        return found[::-1]

    def manifest(self, version: int) -> Manifest:
        """Manifest of the delta to this version, or of its anchor if there is no delta.

        A version newer than all known ones may be invisible yet: the storage is asked again for as long as its lag.
        NoPath if the version was never committed, or was deleted.
        """
        if self._chain is None:
            self.newest()
        found = self._index.at(self._mark.epoch, version) if self._mark else None
        if found is None:
            fresh = version > self._position(self._mark).version
            lag = self._bucket.lag if fresh else 0.0
            for _ in attempts(lag, waiting_for=f"{self._bucket.address} to show version {version}"):
                self._survey()
                found = self._index.at_version(version)
                if found is not None:
                    return found
            raise NoPath(f"version {version} is not in {self._bucket.address}; {self._inventory()}")
        return found

    def find(self, digest: str) -> Position | None:
        """The committed position with this digest (32 hex digits); None if there is none.

        Of several, any one will do: the same weights lead to the newest version from each. The newest version, anchors
        and version 0 are tried first. Live weights mostly are there, and reading the manifests of a long chain is slow.
        """
        if self.newest().digest == digest:
            return self._position(self._mark)
        self._survey()
        likely = [anchor.position for anchor in self._index.anchors()] + [self.run().origin]
        for position in likely:
            if position.digest == digest:
                return position
        found = (manifest.position for manifest in reversed(self.manifests()))
        return next((position for position in found if position.digest == digest), None)

    def plan(self, have: Position | None, to: int | None = None, *, base_available: bool = False) -> Plan:
        """The path with the fewest bytes from `have` (None: nothing) to version `to` (None: the newest).

        It starts at `have`, at an anchor, or at the base checkpoint if the caller has it (`base_available`). It
        continues with deltas, merged ones where they exist. Backwards it undoes deltas, which compact deltas do not
        allow.

        Raises:
            NoPath: no path exists; states which versions and anchors do.
        """
        target = self._target(to)
        position = self._position(target)
        if have == position:
            return Plan(have, None, False, (), position)
        if have and target and target.parent == have and Layout.manifest(target) not in self._lost:
            return Plan(have, None, False, (Step(target),), position)
        plan = self._cheapest(target, have, base_available)
        if plan is None:
            origin = "the base checkpoint is not available" if not base_available else "deltas are missing"
            raise NoPath(
                f"no path from {have or 'nothing'} to {position} in {self._bucket.address}: no deltas lead there, "
                f"no anchor lies on a path, and {origin}; {self._inventory()}. "
                "Let the trainer upload an anchor (`engine.anchor()`)"
            )
        self._parts.expect([*([plan.anchor] if plan.anchor else []), *plan.deltas])
        return plan

    def carry_out(self, find: Callable[[], Plan], use: Callable[[Plan], T]) -> T:
        """Return `use(find())`. If an object is gone meanwhile (retention deletes them), try another path.

        ObjectMissing if that happens repeatedly; NoPath if there is no other path.
        """
        self._lost.clear()  # an object may have been invisible only for a moment
        for _ in range(REPLANS):
            try:
                return use(find())
            except ObjectMissing:
                self._survey()
        return use(find())

    def fetch(self, manifest: Manifest) -> list[Path]:
        """Local files of a manifest's parts, in their order, each with the stated size and SHA-256.

        The files of an anchor are in one directory that `from_pretrained` can load. The same call downloads parts that
        the last plan needs next. ObjectMissing if a part is gone; `plan` then avoids paths that need it (see
        `carry_out`).
        """
        try:
            return self._parts.fetch(manifest)
        except ObjectMissing:
            self._lost.add(Layout.manifest(manifest))
            raise

    def side_files(self) -> list[Path]:
        """Config, tokenizer and so on of the newest anchor, without its weights. Empty if there is no anchor."""
        if not self._index.epochs:
            self._survey()
        anchor = self._index.newest_anchor()
        if anchor is None:
            return []
        return self.fetch(replace(anchor, parts=tuple(part for part in anchor.parts if part.file in SIDE_FILES)))

    def patch(self, manifest: Manifest, old: OldBits | None = None) -> Patch:
        """The decoded delta of a manifest: all of its parts (one per publisher rank, on disjoint elements).

        Args:
            old: the weights at the manifest's parent, which compact deltas are encoded against. Elements that it does
                not hold are left out.

        Raises:
            ConfigError: the delta is compact and `old` is None.
        """
        if manifest.kind == "anchor":
            raise FormatError(f"{Layout.manifest(manifest)} is an anchor, not a delta")
        from hubsync.format.parts import read_delta  # imports torch and numba
        from hubsync.format.patch import compose

        table = self.run().table
        parts = [read_delta(path, table, manifest, old) for path in self.fetch(manifest)]
        return reduce(compose, parts) if parts else {}

    def merged(self, steps: Sequence[Step], old: OldBits | None = None) -> Patch:
        """Consecutive steps of a plan as one patch of `old`.

        Each step is decoded against the weights after the steps before it. Memory is O(changes).
        """
        from hubsync.format.patch import compose, invert  # imports numba
        from hubsync.format.view_bits import Advanced

        table = self.run().table
        patch: Patch = {}
        for step in steps:
            delta = self.patch(step.manifest, None if old is None else Advanced(table, old, patch))
            delta = invert(delta) if step.inverse else delta
            patch = compose(patch, delta) if patch else delta
        return patch

    def trim(self, keep_bytes: int) -> None:
        """Delete cached files of this run, the least recently used first, until at most `keep_bytes` are left.

        Files of the last download stay. A file in use elsewhere is fetched again when it is next needed.
        """
        self._parts.trim(keep_bytes)

    @property
    def _parts(self) -> PartCache:
        if self._part_cache is None:
            self._part_cache = PartCache(self._bucket, self._cache / self.run().run_id)
        return self._part_cache

    # --- newest and served version ------------------------------------------------------------------

    @property
    def _index(self) -> ChainIndex:
        if self._chain is None:
            self._chain = ChainIndex(self._bucket, self.run())
            self._mark = self._remembered()
        return self._chain

    def _parse(self, data: bytes | None) -> Head | None:
        if data is None:
            return None
        try:
            head = Head.loads(data)
            self._require_same_run(head.manifest.run_id)
            self._index.add(head.manifest)
        except FormatError:
            return None  # only a hint: the manifests decide, and their errors are raised
        return head

    def _require_same_run(self, run_id: str) -> None:
        """RunMismatch if the run was deleted and created again: no cached version belongs to the new one."""
        ours = self.run().run_id
        if run_id == ours:
            return
        data = self._bucket.read([Layout.RUN]).get(Layout.RUN)
        if data is not None and (found := Run.loads(data).run_id) != ours:
            raise RunMismatch(
                f"{self._bucket.address} holds another run now ({found}, it was {ours}): the old one was deleted. "
                "Restart its followers, and its servers from the base model of the new run"
            )

    def _survey(self) -> None:
        self._index.survey()
        newest = self._index.newest()
        if newest is not None:
            self._raise_mark(newest)

    def _raise_mark(self, manifest: Manifest) -> None:
        if self._mark is None or _order(manifest) > _order(self._mark):
            self._mark = manifest
            self._remember(manifest)

    @property
    def _memory(self) -> Path:
        return self._cache / f"{self.run().run_id}.newest.json"

    def _remember(self, manifest: Manifest) -> None:
        """Keep the newest version for later readers. It is only a floor: a full or read-only cache is no failure."""
        temporary = self._memory.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}")
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(manifest.dumps())
                temporary.replace(self._memory)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            if self._can_remember:
                logger.warning(
                    "cannot record the newest version in the cache (%s): until it can be written again, a restarted "
                    "reader may take an older version for the newest. Free some space, or set HUBSYNC_CACHE",
                    error,
                )
            self._can_remember = False
        else:
            self._can_remember = True

    def _remembered(self) -> Manifest | None:
        """The newest manifest that a reader with this cache has seen. It is only a floor: a damaged file is ignored."""
        try:
            manifest = Manifest.loads(self._memory.read_bytes())
        except (OSError, FormatError):
            return None
        return manifest if manifest.run_id == self.run().run_id and manifest.kind != "merged" else None

    def _require_fresh(self, head: Head | None) -> None:
        if self._max_head_age is None:
            return
        age = None if head is None else self._age(head)
        if age is None or age > self._max_head_age:
            what = "it does not exist" if age is None else f"it was written {age:.0f} s ago"
            raise HeadTooOld(
                f"the head of {self._bucket.address} must not be older than {self._max_head_age:g} s, but {what}. "
                "Check that the trainer is running, wait for its next version, or allow a greater age"
            )

    def _age(self, head: Head) -> float:
        """Seconds since the head was written, by its own time or by the storage's, whichever is longer ago.

        The storage's time covers a writer whose clock is ahead. The head's own, signed time covers an old head that was
        put back: to the storage it is new.
        """
        stat = self._bucket.stat([Layout.HEAD]).get(Layout.HEAD)
        times = [head.written, *([stat.modified] if stat is not None and stat.modified is not None else [])]
        return self._bucket.now() - min(times)

    def _position(self, manifest: Manifest | None) -> Position:
        return self.run().origin if manifest is None else manifest.position

    # --- paths --------------------------------------------------------------------------------------

    def _cheapest(self, target: Manifest | None, have: Position | None, base_available: bool) -> Plan | None:
        """Lists the run only if the names of what lies between the two positions do not say enough."""
        origin = self.run().origin
        if have is not None and target is not None:
            near = index_between(self._bucket, self._index, have, target)
            if near is not None and (plan := Planner(near, origin, self._lost).cheapest(target, have, base_available)):
                return plan
        self._survey()  # anchors and merged deltas may have been added to known versions
        return Planner(self._index, origin, self._lost).cheapest(target, have, base_available)

    def _target(self, version: int | None) -> Manifest | None:
        """Manifest of a version; None for version 0."""
        if version == 0:
            return None
        if version is None:
            self.newest()
            return self._mark
        return self.manifest(version)

    def _committed(self, version: int) -> Position | None:
        """Position of a version; None if it does not exist."""
        try:
            return self._position(self._target(version))
        except NoPath:
            return None

    def _inventory(self) -> str:
        versions = sorted({version for names in self._index.epochs.values() for version in names.deltas})
        anchors = sorted({version for names in self._index.epochs.values() for version in names.anchors})
        deltas = f"deltas to versions {versions[0]}..{versions[-1]}" if versions else "no deltas"
        if versions and len(versions) <= versions[-1] - versions[0]:
            deltas += " (not all of them: a restarted trainer skips a number, and retention deletes versions)"
        return (
            f"the run has {deltas} and {'anchors of ' + ', '.join(map(str, anchors[-8:])) if anchors else 'no anchors'}"
        )


def _order(manifest: Manifest) -> tuple[str, int]:
    return manifest.epoch, manifest.version
