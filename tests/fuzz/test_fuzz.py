"""A few thousand executions of each fuzz target; `make fuzz` runs more, with bounds checks and guided by coverage."""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from tests.fuzz import deltas, documents
from tests.fuzz.session import Session


@pytest.mark.parametrize(("target", "runs"), [(deltas, 2000), (documents, 4000)])
def test_mutated_input_is_rejected_or_sound(target: ModuleType, runs: int, tmp_path: Path) -> None:
    session = Session(target.read, target.REJECTIONS, tmp_path)
    session.run(target.make, seed=1, first=0, runs=runs, seconds=60.0)
    assert session.failures == 0
    assert session.accepted > runs / 50, "most mutations are of documents that would be read"
    assert sum(session.rejected.values()) > runs / 4


def test_what_is_not_documented_is_a_failure_and_its_input_is_kept(tmp_path: Path) -> None:
    session = Session(lambda data: 1 // len(data), documents.REJECTIONS, tmp_path)  # type: ignore[arg-type, func-returns-value]
    session.one(b"1")
    session.one(b"", "empty")
    assert (session.executions, session.accepted, session.failures) == (2, 1, 1)
    assert (tmp_path / "failure-empty").read_bytes() == b""


def test_an_execution_can_be_repeated() -> None:
    assert deltas.make(Random("1 17")) == deltas.make(Random("1 17"))
    assert documents.make(Random("1 17")) == documents.make(Random("1 17"))
