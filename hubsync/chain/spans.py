"""Spans of versions that should have a merged delta.

Spans are powers of two, aligned, over versions: (32, 34], (32, 36], (32, 40] and so on. Any k consecutive versions are
then at most 2 log2(k) spans, and an element that changed twice within one span is downloaded once. A path that begins
or ends between two large spans would still take many small ones. So spans overlap near the newest version, where most
paths go: a span that ends at most its own length before it also starts at each quarter of its length, and one of 4 or 8
versions anywhere. Further back, overlaps would save little of a long path, and retention deletes them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from hubsync.format.manifest import Manifest, Position

from .planner import Step

MAX_SPAN = 256  # versions; most that one merged delta spans by default
_SHORT = 8  # versions; spans of 4 up to these may start anywhere

Span = tuple[Manifest, ...]  # consecutive deltas


def due(chain: Sequence[Manifest], max_span: int) -> Iterator[Span]:
    """Spans of a chain that should have a merged delta, shortest first. Every delta of a span exists.

    A single compact delta in a span of two counts too: as a fast delta it can be merged further. Where version numbers
    were left out, the span holds the versions that exist.
    """
    if not chain:
        return
    versions = [delta.version for delta in chain]
    oldest, newest = start_of(chain).version, versions[-1]
    size = 2
    while size <= min(max_span, newest):
        for start in _starts(size, oldest, newest):
            deltas = chain[bisect_right(versions, start) : bisect_right(versions, start + size)]
            if not deltas or start_of(deltas).version > start:
                continue
            if len(deltas) > 1 or (size == 2 and deltas[0].encoding.needs_base):
                yield tuple(deltas)
        size *= 2


def step_of(size: int) -> int:
    """Starts of spans of one size are multiples of this, in versions."""
    return 1 if 2 < size <= _SHORT else max(2, size // 4)


def _starts(size: int, oldest: int, newest: int) -> Iterator[int]:
    """Starts of spans of one size: its multiples, and points between them for spans that end near the newest version.

    benchmarks/README.md compares alternatives, in bytes.
    """
    step = step_of(size)
    for start in range(-(-oldest // step) * step, newest - size + 1, step):
        near = newest - (start + size) <= size
        if near or start % size == 0:
            yield start


def chain_of(manifests: Sequence[Manifest], merged: Sequence[Manifest]) -> list[Manifest]:
    """The deltas that lead to the newest version from as far back as possible, oldest first.

    Of several paths, the one with the most steps: it uses merged deltas only where the deltas they merge are gone.
    """
    deltas = [manifest for manifest in (*manifests, *merged) if manifest.kind != "anchor"]
    paths: dict[Position, tuple[int, int, Manifest]] = {}  # first version of a path, minus its steps, its last delta
    for delta in sorted(deltas, key=lambda delta: delta.version):
        start = start_of([delta])
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


def start_of(deltas: Sequence[Manifest]) -> Position:
    """The position that the first of some deltas applies to."""
    return Step(deltas[0]).start
