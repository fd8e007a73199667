"""Names that readers see late: what was just written is invisible, and what was replaced or deleted is still shown."""

from __future__ import annotations

import re
import threading
import time

from .store import FileRow


class Lag:
    """The delay between a write and the moment at which readers see it. Thread-safe.

    Writes become visible in the order in which they were made, as on a replica of a database that is behind. Only names
    that match are delayed, so a test can also break that order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._match = re.compile("")
        # (bucket, path) -> the rows that readers see from a time on, oldest first; None: no such name.
        self._seen: dict[tuple[str, str], list[tuple[float, FileRow | None]]] = {}

    def set(self, seconds: float, match: str) -> None:
        """Delay writes from now on to paths that contain the regular expression `match`. 0: none."""
        with self._lock:
            self._seconds, self._match = seconds, re.compile(match)

    def clear(self) -> None:
        """Show everything at once, also what was written before."""
        with self._lock:
            self._seconds = 0.0
            self._seen.clear()

    def wrote(self, bucket: str, path: str, before: FileRow | None, after: FileRow | None) -> None:
        """Note that a write has replaced a row (None: no such name)."""
        with self._lock:
            if self._seconds and self._match.search(path):
                rows = self._seen.setdefault((bucket, path), [(0.0, before)])
                rows.append((time.monotonic() + self._seconds, after))

    def seen(self, bucket: str, path: str, row: FileRow | None) -> FileRow | None:
        """What a reader sees instead of a row."""
        with self._lock:
            return self._latest((bucket, path), row)

    def listed(self, bucket: str, prefix: str, after: str, rows: list[FileRow]) -> list[FileRow]:
        """What a reader sees instead of a listing of the names that begin with `prefix` and follow `after`."""
        found: dict[str, FileRow | None] = {row.path: row for row in rows}
        with self._lock:
            for place, path in list(self._seen):
                if place == bucket and path.startswith(prefix) and path > after:
                    found[path] = self._latest((place, path), found.get(path))
        return [row for _, row in sorted(found.items()) if row is not None]

    def _latest(self, key: tuple[str, str], row: FileRow | None) -> FileRow | None:
        rows = self._seen.get(key)
        if rows is None:
            return row
        now = time.monotonic()
        if rows[-1][0] <= now:
            del self._seen[key]
            return row
        return next(old for since, old in reversed(rows) if since <= now)
