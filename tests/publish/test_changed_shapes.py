"""A model whose tensors change after the engine was made: refused by publish and anchor, and close ends as usual."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.errors import ConfigError
from tests.support.tiny import Tiny, follow, same_bits, train, view_of

WIDER = 13


def resize(model: Tiny) -> None:
    """As `resize_token_embeddings` of transformers: the same parameter gets other data."""
    model.embed.weight.data = torch.zeros(WIDER, 6)


def replace(model: Tiny) -> None:
    model.embed.weight = torch.nn.Parameter(torch.zeros(WIDER, 6))
    model.head.weight = model.embed.weight


def untie(model: Tiny) -> None:
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())


@pytest.mark.parametrize("change", [resize, replace, untie])
@pytest.mark.parametrize("detector", ["sliced", "snapshot"])
def test_changed_tensors_are_refused_by_name_and_nothing_is_uploaded(
    change, detector: str, model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    engine = DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, detector=detector))
    train(model, optimizer)
    engine.publish(1).result()
    published, files = view_of(model), sorted(Path(address).rglob("*"))
    change(model)
    named = "head.weight" if change is untie else "embed.weight now has shape"
    for call in (lambda: engine.publish(2), engine.anchor):
        with pytest.raises(ConfigError, match=rf"{named}.*make a new engine"):
            call()
    engine.close()
    assert sorted(Path(address).rglob("*")) == files
    assert same_bits(follow(address, tmp_path).tensors, published)
