"""Decoding takes no more memory than docs/FORMAT.md says: a number of bytes for each byte of the part."""

from __future__ import annotations

import tracemalloc

import pytest

from hubsync.format.parts import read_delta
from hubsync.format.patch import check
from hubsync.format.table import TensorTable
from tests.support.worst_parts import made, stated_bound

SIZE = 24_000  # bytes of a part


class Unread:
    """Old weights that a part must not need."""

    def rectangle(self, index: int, rows: slice, cols: slice) -> None:
        raise AssertionError("read the old weights")


@pytest.mark.parametrize(("name", "table", "part"), [(name, *part) for name, part in made(SIZE).items()])
def test_the_worst_parts_stay_within_the_stated_bound(name: str, table: TensorTable, part: bytes) -> None:
    read_delta(part, table, None, Unread())  # compiles
    tracemalloc.start()
    patch = read_delta(part, table, None, Unread())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    check(table, patch)
    assert peak / len(part) < stated_bound(), f"{peak / len(part):.0f} bytes for a byte"
