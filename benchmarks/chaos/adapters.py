"""A trainer of a LoRA adapter that merges it into the base model and takes it out again, which rounds.

Servers load the base once, so a trainer whose base is another one must not go on.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import replay
from hubsync.errors import HubsyncError
from hubsync.format.manifest import Position
from hubsync.kernels.bits import bits_of

from .actors import Setup


@dataclass(frozen=True)
class Merged:
    """What came of it.

    Attributes:
        drifted: number of elements of the base that have other bits than before.
        error, message: of the next publish; empty if it succeeded.
        before, newest: newest version of the run before the merge, and after that publish.
        exact: whether the run ends with the adapter, after the trainer has been started again from its checkpoint.
    """

    drifted: int
    error: str
    message: str
    before: Position
    newest: Position
    exact: bool


class _Base(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(16, 24, bias=False, dtype=torch.bfloat16)
        self.down = torch.nn.Linear(24, 16, bias=False, dtype=torch.bfloat16)


def merge_and_unmerge(pipe: Connection, setup: Setup, home: Path) -> None:
    """Play it in a run beside the history's; answer a `Merged`, and end."""
    address = f"{setup.address}-{home.name}"
    config = SyncConfig(bucket=address, view_dtype="bfloat16")
    model = _adapted()
    engine = DeltaWeightTransferEngine(model, None, config)
    for step in range(2):
        _train(model)
        engine.publish(step).result()
    before, checkpoint = engine.position, _adapter(model)
    old = bits_of(_first_weight(model)).copy()
    model.merge_adapter()
    model.unmerge_adapter()
    drifted = int((bits_of(_first_weight(model)) != old).sum())
    _train(model)
    error = message = ""
    try:
        engine.publish(2).result()
        engine.close()
    except HubsyncError as failure:
        error, message = type(failure).__name__, str(failure)
    reader = ChainReader(open_bucket(address), home / "cache")
    newest = reader.newest()
    exact = _continues(config, checkpoint, reader)
    if setup.hub_url is None:
        shutil.rmtree(address)
    pipe.send(Merged(drifted, error, message, before, newest, exact))


def _continues(config: SyncConfig, checkpoint: dict[str, torch.Tensor], reader: ChainReader) -> bool:
    """Start again from base and adapter; whether what is published then is exact."""
    from peft import set_peft_model_state_dict

    model = _adapted()
    set_peft_model_state_dict(model, checkpoint)
    with DeltaWeightTransferEngine(model, None, config) as engine:
        _train(model)
        position = engine.publish(3).result().position
    view = replay(reader, reader.plan(None))
    tensors = {name: tensor.bfloat16() for name, tensor in _adapter(model).items()}
    same = all(bool((bits_of(view.tensors[name]) == bits_of(tensor)).all()) for name, tensor in tensors.items())
    return same and view.position == position and view.tensors.keys() == tensors.keys()


def _adapted() -> Any:
    import peft  # seconds: only this event needs it

    return peft.get_peft_model(_Base(), peft.LoraConfig(r=4, target_modules=["up", "down"]))


def _train(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1


def _adapter(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def _first_weight(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.base_model.model.up.base_layer.weight.detach()
    return weight
