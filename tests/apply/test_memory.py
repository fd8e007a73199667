"""Live storages of one width as one array."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hubsync.apply.live import LiveStorage
from hubsync.apply.memory import HostMemory
from hubsync.errors import ReplicaRefused


def storage_of(name: str, tensor: torch.Tensor) -> LiveStorage:
    storage = LiveStorage(tensor)
    storage.add(name, tensor)
    return storage


def test_weights_on_another_device_are_refused_by_name() -> None:
    """`meta` stands in for a second device. Its addresses mean nothing here, so they must not be read."""
    storages = [storage_of("here", torch.arange(4.0)), storage_of("there", torch.empty(4, device="meta"))]
    memory = HostMemory(storages)
    places = memory.places(0, np.array([1, 3]))
    assert memory.read(0, places).tolist() == storages[0].bits[[1, 3]].tolist()
    with pytest.raises(ReplicaRefused, match="there is on meta, the other weights are not"):
        memory.places(1, np.array([0]))
