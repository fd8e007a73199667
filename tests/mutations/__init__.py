"""Mutations: one small patch per way to break a promise of docs/DESIGN.md, and the test that must fail on it.

Each `.patch` file starts with the promise and the test, and ends with a diff:

    Promise: 4. The baseline follows durability.
    Breaks: the baseline moves before the version is durable.
    Test: tests/publish/test_publish.py::test_name

`make test` checks that every patch applies and names an existing test. `make test-mutations`, part of `make test-all`,
applies each to a copy of the project and requires its test to fail there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
PROMISES = range(1, 11)
_FIELD = r"^{}: (.+)$"


@dataclass(frozen=True)
class Mutation:
    """A patch of the product that breaks a promise.

    Attributes:
        path: the patch file.
        promise: number of the promise in docs/DESIGN.md.
        test: node id of the test that must fail.
    """

    path: Path
    promise: int
    test: str


def read(path: Path) -> Mutation:
    """Parse the head of a patch file. ValueError if a field is missing."""
    head = path.read_text().partition("\n---")[0]
    fields = {}
    for field in ("Promise", "Breaks", "Test"):
        match = re.search(_FIELD.format(field), head, re.MULTILINE)
        if match is None:
            raise ValueError(f"{path.name} lacks '{field}: ...'")
        fields[field] = match[1]
    return Mutation(path, int(fields["Promise"].partition(".")[0]), fields["Test"])


MUTATIONS = [read(path) for path in sorted(FOLDER.glob("*.patch"))]
