"""A view in main memory: a step leads to the digest of its manifest, or changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hubsync.chain import Step
from hubsync.chain.replay import View
from hubsync.errors import WrongParent
from hubsync.format.manifest import Manifest
from hubsync.format.patch import Patch
from tests.support.history import History


@pytest.fixture
def delta(history: History) -> Manifest:
    return history.publish()


@pytest.fixture
def patch(history: History, delta: Manifest, tmp_path: Path) -> Patch:
    return history.reader(tmp_path / "cache").patch(delta)


def test_a_step_is_applied_and_undone(history: History, delta: Manifest, patch: Patch) -> None:
    view = View(history.table, history.base, history.writer.run.origin)
    view.apply(patch, Step(delta))
    view.verify()
    assert view.position == delta.position
    view.apply(patch, Step(delta, inverse=True))
    view.verify()
    assert all(torch.equal(view.tensors[name], tensor) for name, tensor in history.base.items())


def test_a_step_to_another_digest_changes_nothing(history: History, delta: Manifest, patch: Patch) -> None:
    origin = history.writer.run.origin
    view = View(history.table, history.base, origin)
    first = min(patch)
    damaged = {**patch, first: replace(patch[first], diffs=patch[first].diffs + 1)}
    with pytest.raises(WrongParent, match="the weights have digest"):
        view.apply(damaged, Step(delta))
    assert view.position == origin
    view.verify()
    view.apply(patch, Step(delta))
    view.verify()


def test_a_step_from_another_position_is_refused(history: History, patch: Patch) -> None:
    view = View(history.table, history.base, history.writer.run.origin)
    later = history.publish()
    with pytest.raises(WrongParent, match="applies to"):
        view.apply(patch, Step(later))


def test_a_view_rejects_weights_with_another_digest(history: History) -> None:
    other = {name: tensor + 1 for name, tensor in history.base.items()}
    with pytest.raises(WrongParent, match="the weights have digest"):
        View(history.table, other, history.writer.run.origin)
