"""Merged deltas: one delta over several versions, so that who is far behind downloads few and small ones.

Spans are powers of two, aligned: over versions (32, 34], (32, 36], (32, 40] and so on. Any stretch of k versions is
then at most 2 log2(k) of them, and whatever changed twice within one of them is downloaded once. Who begins or ends
between two large ones would still go through many small ones; so near the newest version, where nearly everybody goes,
spans overlap: a span that ends at most its own length before it also starts at each quarter of its length, one of 4 or
8 versions anywhere. Farther back that would save little of a long way, and retention deletes these. They are made from
the deltas' files alone, and always in the *fast* level, so they can be merged on, and undone.

A compactor writes to a place of its own, which is no epoch: it fences nobody and can never be taken for a publisher.
What it writes is true whenever it arrives, however long it was stalled, because a merged delta names the digests of
both of its ends. So several compactors may run at once; they only do work twice.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from hubsync.bucket.base import Bucket, Upload
from hubsync.errors import NoPath
from hubsync.format.manifest import Manifest, Part, Position
from hubsync.format.parts import write_delta
from hubsync.format.patch import Patch, changed, compose

from .layout import Layout
from .planner import Step
from .reader import ChainReader
from .replay import View, replay

MAX_SPAN = 256  # versions
_SHORT = 8  # versions: spans of 4 up to these may start anywhere
_CACHE_BYTES = 4 << 30  # downloads kept while merging on

Span = tuple[Manifest, ...]  # deltas that follow each other


class Compactor:
    """Makes the merged deltas that a run lacks.

    Args:
        bucket: the run's prefix.
        reader: a reader of the same run. Its cache holds what is merged.
        base: the tensors of version 0. With them also *compact* deltas are merged, which are coded against the weights
            before them: a view of the whole model is then held and moved along.
        max_span: the most versions that one merged delta spans; memory is O(changes) of that.
        patches: what is known of single deltas by who has made them, by where they lead; read in each `run`. With it
            compact deltas are merged without weights.

    Attributes:
        skipped: spans that the last `run` could not make, because they hold compact deltas, and there is no `base`, or
            no way to the weights that they begin with.
    """

    def __init__(
        self,
        bucket: Bucket,
        reader: ChainReader,
        base: Mapping[str, torch.Tensor] | None = None,
        max_span: int = MAX_SPAN,
        patches: Mapping[Position, Patch] | None = None,
    ):
        self.skipped = 0
        self._bucket = bucket
        self._reader = reader
        self._base = base
        self._max_span = max_span
        self._patches = {} if patches is None else patches
        self._place = f"compact-{secrets.token_hex(4)}"
        self._view: View | None = None
        self._from: dict[Position, list[Manifest]] = {}  # merged deltas that exist, by where they start

    def run(self) -> Iterator[Manifest]:
        """Make what is due on the current chain, shortest spans first, and yield each when it is durable."""
        manifests = self._reader.manifests()
        self.skipped = 0
        self._from = defaultdict(list)
        merged = self._reader.spans(manifests)
        for delta in merged:
            self._remember(delta)
        for span in due(chain_of(manifests, merged), self._max_span):
            if self._exists(span):
                continue
            steps = self._steps(span)
            if len(steps) == 1 and not steps[0].manifest.encoding.needs_base:
                continue
            patch = self._merged(steps)
            if patch is not None:
                yield self._commit(span, patch)
            elif self._has_path_to(_start(span)):
                yield self._commit_from_view(span, steps)
            else:
                self.skipped += 1
            self._reader.trim(_CACHE_BYTES)

    def _steps(self, span: Span) -> list[Step]:
        """A way along a span with as few deltas as there are."""
        steps: list[Step] = []
        remaining = list(span)
        while remaining:
            ends = {delta.position: count for count, delta in enumerate(remaining, 1)}
            known = [merged for merged in self._from.get(_start(remaining), ()) if merged.position in ends]
            longest = max(known, key=lambda merged: merged.version, default=remaining[0])
            steps.append(Step(longest))
            del remaining[: ends[longest.position]]
        return steps

    def _merged(self, steps: Sequence[Step]) -> Patch | None:
        """The steps as one patch, without weights; None if they are needed."""
        known = {step.end: self._patches.get(step.end) for step in steps if step.manifest.kind == "delta"}
        if any(step.manifest.encoding.needs_base and known[step.end] is None for step in steps):
            return None
        patch: Patch = {}
        for step in steps:
            delta = known.get(step.end)
            patch = compose(patch, self._reader.patch(step.manifest) if delta is None else delta)
        return patch

    def _commit_from_view(self, span: Span, steps: Sequence[Step]) -> Manifest:
        """As `_commit`, for deltas that are coded against weights; compared with the digest before it is committed."""
        view = self._view_at(_start(span))
        patch = self._reader.merged(steps, view.bits)
        view.apply(patch, Step(self._manifest(span, (), changed(patch))))
        return self._commit(span, patch)

    def _has_path_to(self, position: Position) -> bool:
        """Whether weights can be had there: those before the oldest delta may be gone."""
        if self._base is None:
            return False
        try:
            self._reader.plan(None, position.version, base_available=True)
        except NoPath:
            return False
        return True

    def _view_at(self, position: Position) -> View:
        reader = self._reader
        if self._view is None or self._view.position.version > position.version:
            self._view = replay(reader, reader.plan(None, position.version, base_available=True), self._base)
        elif self._view.position != position:
            plan = reader.plan(self._view.position, position.version, base_available=True)
            if plan.start is None:
                self._view = replay(reader, plan, self._base)
            else:
                for step in plan.steps:
                    self._view.apply(reader.patch(step.manifest, self._view.bits), step)
        return self._view

    def _commit(self, span: Span, patch: Patch) -> Manifest:
        run = self._reader.run()
        data = write_delta(run.table, patch, run_id=run.run_id, parent=_start(span), position=span[-1].position)
        manifest = self._manifest(span, (Part(len(data), hashlib.sha256(data).hexdigest()),), changed(patch))
        document = manifest.dumps()
        Manifest.loads(document)  # what no reader would accept is not written
        self._bucket.put([Upload(Layout.part(manifest, manifest.parts[0]), data)])
        self._bucket.commit(Layout.manifest(manifest), document)
        self._remember(manifest)
        return manifest

    def _manifest(self, span: Span, parts: tuple[Part, ...], count: int) -> Manifest:
        run, first, last = self._reader.run(), span[0], span[-1]
        return Manifest(
            kind="merged",
            run_id=run.run_id,
            table_hash=run.table.hash,
            epoch=self._place,
            position=last.position,
            parent=first.parent,
            parent_epoch=first.parent_epoch,
            parts=parts,
            changed=count,
            created=time.time(),
            step=last.step,
            name=last.name,
        )

    def _exists(self, span: Span) -> bool:
        return any(merged.position == span[-1].position for merged in self._from.get(_start(span), ()))

    def _remember(self, merged: Manifest) -> None:
        assert merged.parent is not None  # the parser guarantees it
        self._from[merged.parent].append(merged)


def due(chain: Sequence[Manifest], max_span: int) -> Iterator[Span]:
    """Spans of a chain that should have a merged delta, shortest first: those that are there from end to end.

    A compact delta that is alone in its span of two is one too: as a fast delta it can be merged on. Where versions
    were left out, the span is what there is of it.
    """
    if not chain:
        return
    versions = [delta.version for delta in chain]
    oldest, newest = _start(chain).version, versions[-1]
    size = 2
    while size <= min(max_span, newest):
        for start in _starts(size, oldest, newest):
            deltas = chain[bisect_right(versions, start) : bisect_right(versions, start + size)]
            if not deltas or _start(deltas).version > start:
                continue
            if len(deltas) > 1 or (size == 2 and deltas[0].encoding.needs_base):
                yield tuple(deltas)
        size *= 2


def _starts(size: int, oldest: int, newest: int) -> Iterator[int]:
    """Where spans of one size start: at its multiples, and those that end near the newest version also in between.

    What was tried, with bytes, is in benchmarks/README.md.
    """
    step = 1 if 2 < size <= _SHORT else max(2, size // 4)
    for start in range(-(-oldest // step) * step, newest - size + 1, step):
        near = newest - (start + size) <= size
        if near or start % size == 0:
            yield start


def chain_of(manifests: Sequence[Manifest], merged: Sequence[Manifest]) -> list[Manifest]:
    """The deltas that lead to the newest version from as far back as possible, oldest first.

    Of several paths the one in most steps: merged deltas only where those that they merge are gone.
    """
    deltas = [manifest for manifest in (*manifests, *merged) if manifest.kind != "anchor"]
    paths: dict[Position, tuple[int, int, Manifest]] = {}  # where a path begins, minus its steps, its last delta
    for delta in sorted(deltas, key=lambda delta: delta.version):
        start = _start([delta])
        first, steps, _ = paths.get(start, (start.version, 0, None))
        path = first, steps - 1, delta
        if delta.position not in paths or path[:2] < paths[delta.position][:2]:
            paths[delta.position] = path
    chain = []
    position = manifests[-1].position if manifests else None
    while position in paths:
        chain.append(paths[position][2])
        position = chain[-1].parent
    return chain[::-1]


def _start(deltas: Sequence[Manifest]) -> Position:
    return Step(deltas[0]).start
