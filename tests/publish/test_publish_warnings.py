"""Warnings about training set-ups that lose updates or publish the wrong model."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from tests.support.tiny import Tiny, train


def test_low_precision_training_warns_once_and_is_measured_once(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), DeltaWeightTransferEngine(Tiny(), None, SyncConfig(bucket=address)):
        assert not caplog.records
    coarse = Tiny(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(coarse.parameters(), lr=1e-3)
    with DeltaWeightTransferEngine(coarse, optimizer, SyncConfig(bucket=str(tmp_path / "other"))):
        train(coarse, optimizer, steps=3)
    told, measured = (record.message for record in caplog.records)
    assert "torch.bfloat16" in told
    assert re.search(r"left \d+\.\d % of the parameters with a gradient unchanged", measured)


def test_trained_parameters_outside_of_the_model_are_warned_about(
    model: Tiny, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    value_head = torch.nn.Linear(6, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *value_head.parameters()])
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)):
        [warning] = [record.message for record in caplog.records]
    assert "trains 2 tensors (7 elements) that are not in the model" in warning


def test_masters_of_deepspeed_are_not_warned_about(model: Tiny, address: str, caplog: pytest.LogCaptureFixture) -> None:
    """Stands in for DeepSpeed's optimizer: all that is asked is where its class is from, and what it steps with."""
    stands_in = type("ZeROOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    stands_in.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(9))])
    with DeltaWeightTransferEngine(model, stands_in, SyncConfig(bucket=address)) as engine:
        stands_in.optimizer.step()
        assert engine.steps == 1
    assert "not in the model" not in caplog.text
