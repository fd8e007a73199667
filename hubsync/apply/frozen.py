"""Frozen memory: digests of memory that is no version of a run, to tell later whether it is still the same.

Used for adapters: their base model is frozen, and engines store adapters in their own layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from hubsync.format.digest import Digest, digest_torch, tensor_seed

from .live import find_addresses, find_storages, first_moved, flat_bits

Bits = Mapping[str, torch.Tensor]
"""Flat patterns by name."""


class MemoryDigests:
    """Digests of some memory."""

    def __init__(self, bits: Bits):
        self._digests = {name: digest_torch(tensor_seed(name), flat) for name, flat in bits.items()}

    def differing(self, bits: Bits) -> list[str]:
        """Names of tensors whose values have changed. Missing and new tensors are ignored."""
        known = {name: flat for name, flat in bits.items() if name in self._digests}
        return [name for name, flat in known.items() if digest_torch(tensor_seed(name), flat) != self._digests[name]]

    def sweep(self, bits: Bits, elements: int) -> Iterator[bool]:
        """The same, some `elements` at each step: whether all values read in it are as they were."""
        left = elements
        for name, flat in bits.items():
            found = Digest()
            for first in range(0, len(flat), elements):
                piece = flat[first : first + elements]
                found += digest_torch(tensor_seed(name), piece, first)
                left -= len(piece)
                if left <= 0:
                    yield True
                    left = elements
            if found != self._digests.get(name, found):
                yield False


class FrozenModel:
    """The parameters of modules that nothing may change from now on."""

    def __init__(self, models: Sequence[torch.nn.Module]):
        storages = [storage for storage in find_storages(models) if storage.parameter]
        names = {storage.name for storage in storages}
        self.bits: Bits = {storage.name: storage.bits for storage in storages}
        self.digests = MemoryDigests(self.bits)
        self._addresses = [address for address in find_addresses(models) if address.name in names]

    def differing(self) -> list[str]:
        """Names of parameters that have changed, or are elsewhere."""
        moved = first_moved(self._addresses)
        return self.digests.differing(self.bits) if moved is None else [moved]


def bits_by_name(tensors: Mapping[str, torch.Tensor]) -> Bits:
    """The patterns of tensors. Those that are not contiguous are copied."""
    return {name: flat_bits(tensor.detach().contiguous()) for name, tensor in tensors.items()}
