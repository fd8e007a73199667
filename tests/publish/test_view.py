"""The published view: which tensors of a model are published, and under which names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.errors import (
    ConfigError,
)
from hubsync.publish.view.live import published_tensors
from tests.support.tiny import Tiny, follow, same_bits, view_of


def test_the_view_holds_each_weight_once_under_its_checkpoint_name(model: Tiny) -> None:
    names = ["embed.weight", "scale", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "bias"]
    assert sorted(published_tensors(model)) == sorted(names)


def test_names_are_those_without_wrappers(model: Tiny) -> None:
    compiled = torch.compile(model)
    wrapped = torch.nn.Module()
    wrapped.add_module("module", compiled)  # type: ignore[arg-type]
    assert published_tensors(wrapped).keys() == published_tensors(model).keys()


def test_a_model_that_cannot_be_published_is_refused(model: Tiny, address: str) -> None:
    with pytest.raises(ConfigError, match="meta device"):
        DeltaWeightTransferEngine(model.to("meta"), None, SyncConfig(bucket=address))
    setattr(model, "peft_config", {})  # noqa: B010
    with pytest.raises(ConfigError, match="PEFT"):
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address))
    with pytest.raises(ConfigError, match="no parameters"):
        DeltaWeightTransferEngine(torch.nn.ReLU(), None, SyncConfig(bucket=address))
    with pytest.raises(ConfigError, match=r"weight is complex"):
        DeltaWeightTransferEngine(torch.nn.Linear(2, 2, dtype=torch.complex64), None, SyncConfig(bucket=address))


def test_replaced_parameters_and_buffers_are_published(model: Tiny, address: str, tmp_path: Path) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        model.layers[0].weight = torch.nn.Parameter(torch.randn(6, 6))
        model.layers[1].weight.data = torch.randn(6, 6, dtype=torch.bfloat16)
        model.double()  # makes other buffers
        model.get_buffer("bias").add_(1)
        engine.publish(1).result()
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (torch.nn.Linear(6, 5), r"layers.0.weight now has shape \[5, 6\]"),
        (torch.nn.ReLU(), "no longer has layers.0.bias"),
    ],
)
def test_a_model_with_other_tensors_than_before_is_refused(
    model: Tiny, address: str, tmp_path: Path, layer: torch.nn.Module, says: str
) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        before, model.layers[0] = model.layers[0], layer
        with pytest.raises(ConfigError, match=says):
            engine.publish(1)
        model.layers[0] = before
        torch.nn.init.zeros_(before.weight)  # type: ignore[arg-type]
        assert engine.publish(2).result().version == 1
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_a_model_of_buffers_only_is_published(address: str, tmp_path: Path) -> None:
    statistics = torch.nn.BatchNorm1d(4, affine=False)
    with DeltaWeightTransferEngine(statistics, None, SyncConfig(bucket=address)) as engine:
        statistics(torch.randn(3, 4))
        assert engine.publish(1).result().changed > 0
    assert same_bits(follow(address, tmp_path).tensors, view_of(statistics))
