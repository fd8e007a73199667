"""Fixtures of the publishing tests: a small model, its optimizer, and buckets that fail on command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hubsync.bucket import LocalBucket
from hubsync.publish import engine as engine_module
from tests.support.faults import FaultyBucket
from tests.support.tiny import Tiny


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "bucket")


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def optimizer(model: Tiny) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> list[FaultyBucket]:
    """The buckets that engines of this test open, each able to fail on command."""
    opened: list[FaultyBucket] = []

    def open_faulty(address: str, **_: object) -> FaultyBucket:
        opened.append(FaultyBucket(LocalBucket(address, create=True)))
        return opened[-1]

    monkeypatch.setattr(engine_module, "open_bucket", open_faulty)
    return opened
