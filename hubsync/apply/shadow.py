"""Shadow loading: a model's own `load_weights`, with its writes to live memory redirected to copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .live import LiveStorage


class ShadowLoad(TorchDispatchMode):
    """Gives operations of this thread a copy of each live tensor instead of the tensor. Copies are made at first use.

    Args:
        storages: live memory.
    """

    def __init__(self, storages: Sequence[LiveStorage]):
        super().__init__()
        self._storages = {storage.bits.untyped_storage().data_ptr(): storage for storage in storages}
        self._copies: dict[int, torch.Tensor] = {}  # by address of the live storage, in bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*tree_map(self._shadowed, args), **tree_map(self._shadowed, kwargs or {}))

    def differing(self) -> list[str]:
        """Names of the storages whose copies have other bits than the storages."""
        return [
            self._storages[address].name
            for address, copy in self._copies.items()
            if not torch.equal(copy, self._storages[address].bits.view(torch.uint8))
        ]

    def _shadowed(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_meta or leaf.layout != torch.strided:
            return leaf
        address = leaf.untyped_storage().data_ptr()
        storage = self._storages.get(address)
        if storage is None:
            return leaf
        if address not in self._copies:
            self._copies[address] = storage.bits.view(torch.uint8).clone()
        copy = self._copies[address].view(leaf.dtype)
        return copy.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
