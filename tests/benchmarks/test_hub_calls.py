"""docs/cost.md states the requests that are made."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from benchmarks.hub_calls import measure

PAGE = Path(__file__).parents[2] / "docs/cost.md"


def test_the_page_states_what_operations_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_XET_CACHE", "HUBSYNC_CACHE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # `measure` sets them; this restores them
    rows = {row.operation: row for row in measure(repeats=1, delay=0, care=False)}
    stated = {name.strip(): int(calls) for name, calls in re.findall(r"^\| ([^|]+)\| (\d+) \|", PAGE.read_text(), re.M)}
    for name in (
        "publish a version",
        "poll, nothing new (`follow`)",
        "poll, a new version",
        "fetch a version (server)",
    ):
        assert rows[name].api == stated[name], name
