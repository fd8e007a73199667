"""The versions between two positions, found by their names: a replica that is some versions behind lists no long run.

Deltas name their parents, so they can be read without a listing. Anchors and merged deltas can only lie where their
names say, so they are asked for by name.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from hubsync.bucket.base import Bucket
from hubsync.format.manifest import Manifest, Position

from .index import ChainIndex
from .layout import Layout
from .spans import MAX_SPAN, step_of

MAX_NAMES = 2000  # asked for in two calls; a listing of the run answers for more


def index_between(bucket: Bucket, index: ChainIndex, have: Position, target: Manifest) -> ChainIndex | None:
    """An index of the deltas, anchors and merged deltas after `have`, up to `target`.

    Args:
        index: of the whole run; may have read some of the manifests, and keeps those that are read here.

    Returns None if only a listing of the run can tell: a delta between the two is missing, `have` is not an earlier
    version of the same chain, or there are too many names.
    """
    if not 0 < target.version - have.version <= MAX_NAMES:
        return None
    deltas = _deltas(index, have, target)
    if deltas is None:
        return None
    versions = [have.version, *(delta.version for delta in reversed(deltas))]
    epochs = sorted({delta.epoch for delta in deltas} | {target.epoch})
    names = [Layout.anchor(epoch, version) for epoch in epochs for version in versions[1:]]
    names += [
        Layout.merged(compactor, first, last)
        for compactor in _compactors(bucket)
        for first, last in _likely_spans(versions)
    ]
    if len(names) > MAX_NAMES:
        return None
    return index.extract(deltas, names)


def _deltas(index: ChainIndex, have: Position, target: Manifest) -> list[Manifest] | None:
    """The deltas from `have` to `target`, newest first; None if they are not all there."""
    deltas: list[Manifest] = []
    for link in index.walk(target, floor=have.version):
        if link.position == have:
            return deltas
        if link.delta is None or link.position.version <= have.version:
            return None
        deltas.append(link.delta)
    return None


def _compactors(bucket: Bucket) -> list[str]:
    names = (stat.path.rstrip("/").rpartition("/")[2] for stat in bucket.list(Layout.EPOCHS, recursive=False))
    return [name for name in names if name.startswith("compact-")]


def _likely_spans(versions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last versions of the merged deltas that a compactor has made between the versions of a chain."""
    low, high = versions[0], versions[-1]
    spans = set()
    size = 2
    while size <= min(MAX_SPAN, high - low):
        step = step_of(size)
        for start in range(-(-low // step) * step, high - size + 1, step):
            first, last = (versions[bisect_right(versions, version) - 1] for version in (start, start + size))
            if first < last:
                spans.add((first, last))
        size *= 2
    yield from sorted(spans)
