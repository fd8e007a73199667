"""Merged deltas: one delta that spans several versions, so that a reader far behind downloads few, small deltas.

`hubsync.chain.spans` states which spans are due. Merged deltas are made from the deltas' files alone and are always in
the *fast* encoding, so they can be merged further, and undone.

A compactor writes under a separate prefix, which is not an epoch: it fences no writer and cannot be mistaken for a
publisher. Its merged deltas stay correct however late they are committed, because each one names the digests of both
its ends. So several compactors may run at once; they only repeat work.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from hubsync.bucket.base import Bucket, Upload
from hubsync.errors import NoPath
from hubsync.format.manifest import Manifest, Part, Position
from hubsync.format.parts import Transition, write_delta
from hubsync.format.patch import Patch, absolute, changed, compose

from .layout import Layout
from .planner import Step
from .reader import ChainReader
from .replay import View, replay
from .spans import MAX_SPAN, Span, chain_of, due, start_of

_CACHE_BYTES = 4 << 30  # downloads kept while merging


class Compactor:
    """Makes the merged deltas that a run lacks.

    Args:
        bucket: the run's prefix.
        reader: a reader of the same run. Its cache holds the deltas to merge.
        base: the tensors of version 0, name -> tensor in checkpoint shape. With them, *compact* deltas are merged too.
            These are encoded against the weights before them, so a view of the whole model is held and moved along.
        max_span: the most versions that one merged delta spans. Memory is O(changes) of that many versions.
        patches: patches of single deltas that the caller made itself, by the position after them. Read in each
            `run`. With them, compact deltas are merged without weights.

    Attributes:
        skipped: spans that the last `run` could not make: they hold compact deltas, and there is no `base`, or no path
            to the weights that they begin with.
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
        """Make the merged deltas that are due on the current chain, shortest spans first. Yields each once durable."""
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
            elif self._has_path_to(start_of(span)):
                yield self._commit_from_view(span, steps)
            else:
                self.skipped += 1
            self._reader.trim(_CACHE_BYTES)

    def _steps(self, span: Span) -> list[Step]:
        """The fewest deltas that lead along a span."""
        steps: list[Step] = []
        remaining = list(span)
        while remaining:
            ends = {delta.position: count for count, delta in enumerate(remaining, 1)}
            known = [merged for merged in self._from.get(start_of(remaining), ()) if merged.position in ends]
            longest = max(known, key=lambda merged: merged.version, default=remaining[0])
            steps.append(Step(longest))
            del remaining[: ends[longest.position]]
        return steps

    def _merged(self, steps: Sequence[Step]) -> Patch | None:
        """The steps as one patch, without weights; None if weights are needed."""
        known = {step.end: self._patches.get(step.end) for step in steps if step.manifest.kind == "delta"}
        if any(step.manifest.encoding.needs_base and known[step.end] is None for step in steps):
            return None
        patch: Patch = {}
        for step in steps:
            delta = known.get(step.end)
            patch = compose(patch, self._reader.patch(step.manifest) if delta is None else delta)
        return patch

    def _commit_from_view(self, span: Span, steps: Sequence[Step]) -> Manifest:
        """`_commit` for deltas that are encoded against weights. The digest is checked before the commit."""
        view = self._view_at(start_of(span))
        patch = self._reader.merged(steps, view.bits)
        view.apply(patch, Step(self._manifest(span, (), patch)))
        return self._commit(span, patch)

    def _has_path_to(self, position: Position) -> bool:
        """Whether the weights at a position can be rebuilt. Those before the oldest delta may be gone."""
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
        data = write_delta(run.table, patch, Transition(run.run_id, start_of(span), span[-1].position))
        manifest = self._manifest(span, (Part(len(data), hashlib.sha256(data).hexdigest()),), patch)
        document = manifest.dumps()
        Manifest.loads(document)  # raises if readers would reject it
        self._bucket.put([Upload(Layout.part(manifest, manifest.parts[0]), data)])
        self._bucket.commit(Layout.manifest(manifest), document)
        self._remember(manifest)
        return manifest

    def _manifest(self, span: Span, parts: tuple[Part, ...], patch: Patch) -> Manifest:
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
            changed=changed(patch),
            absolute=absolute(patch),
            created=time.time(),
            step=last.step,
            name=last.name,
        )

    def _exists(self, span: Span) -> bool:
        return any(merged.position == span[-1].position for merged in self._from.get(start_of(span), ()))

    def _remember(self, merged: Manifest) -> None:
        assert merged.parent is not None  # the parser guarantees it
        self._from[merged.parent].append(merged)
