"""Digests of the tensors of a view, one each, so that a deviation has a name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hubsync.format.digest import Digest, digest_change, digest_torch, tensor_seed
from hubsync.format.table import TensorTable
from hubsync.publish.view.cast import integers
from hubsync.publish.view.shards import Shard

from .changes import Change, globally


class TensorDigests:
    """Computes the digests of the elements that this process owns.

    Args:
        table: the tensor table.
        shards: table index -> the elements of the tensor that this process owns; default is all.
    """

    def __init__(self, table: TensorTable, shards: Sequence[Shard] | None = None):
        self._shards = shards
        self._seeds = [tensor_seed(spec.name) for spec in table]

    def of(self, index: int, owned: torch.Tensor) -> Digest:
        """Digest of the owned elements of a tensor, flat, in its served dtype. Reads all of them."""
        seed, bits = self._seeds[index], integers(owned)
        shard = None if self._shards is None else self._shards[index]
        if shard is None or shard.first is not None:
            return digest_torch(seed, bits, 0 if shard is None or shard.first is None else shard.first)
        digest = Digest()
        for first, last, indices in shard.pieces():
            digest += digest_torch(seed, bits[first:last], indices=torch.from_numpy(indices).to(bits.device))
        return digest

    def after(self, index: int, before: Digest, change: Change | None) -> Digest:
        """Digest of a tensor after a change. O(changes)."""
        if change is None:
            return before
        indices = globally(self._shards, index, change.indices)
        return before + digest_change(self._seeds[index], indices, change.old, change.new)
