"""Dense fallback: tensors that cannot be followed in place are loaded whole, by the model's own loader, at each commit.

A loader may compute with such a tensor (Mamba's `A` is `-exp(A_log)`), so its values cannot be read back from live
memory. They are kept here, as *masters*, and a delta is applied to those. That live memory holds what the loader makes
of the masters is found out by loading them once more into copies (`shadow`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from hubsync.format.digest import Digest, digest_change, digest_torch
from hubsync.format.patch import TensorDelta, TensorValues, changes_of
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import bits_of

from .live import LiveStorage, flat_bits
from .regions import block
from .shadow import ShadowLoad
from .vote import Holding

REMEDY = (
    ". Serve the model with the run's dtype (--dtype), or set HUBSYNC_DENSE_FALLBACK=1 to have such tensors loaded "
    "whole at each commit"
)


class DenseTensors:
    """The tensors of one rank that are loaded whole.

    Args:
        table: the run's tensor table.
        masters: their values, by table index, on the CPU.
        seeds: of every tensor's digest, by table index.
        models: the modules whose `load_weights` takes them.
        device: where the parameters are.
    """

    def __init__(
        self,
        table: TensorTable,
        masters: dict[int, torch.Tensor],
        seeds: Sequence[int],
        models: Sequence[torch.nn.Module],
        device: torch.device,
    ):
        self.masters = masters
        self.owned: dict[int, bool] = {}
        """By table index: does this rank count it? Known once the ranks have joined."""
        self._table = table
        self._seeds = seeds
        self._models = models
        self._device = device

    def __contains__(self, index: int) -> bool:
        return index in self.masters

    def layout(self) -> dict[str, dict[str, object]]:
        return {
            self._table[index].name: {"class": "dense", "elements": master.numel()}
            for index, master in self.masters.items()
        }

    def holdings(self) -> Iterator[Holding]:
        """One holding for each tensor, with the digest of its master."""
        for index, master in self.masters.items():
            whole = block(-1, (master.numel(),), 0, (1,), 0, (1,))
            assert whole is not None
            yield Holding(index, whole, digest_torch(self._seeds[index], flat_bits(master)))

    def advanced(self, index: int, delta: TensorDelta | TensorValues) -> tuple[torch.Tensor, Digest]:
        """A copy of a master with a delta applied, and the change of its digest."""
        new = self.masters[index].clone()
        bits = bits_of(new)
        indices, before, after = changes_of(delta, bits)
        bits[indices] = after
        return new, digest_change(self._seeds[index], indices, before, after)

    def load(self, tensors: Mapping[int, torch.Tensor]) -> None:
        """Load new values into the models, and keep them as masters."""
        with torch.no_grad():
            for model in self._models:
                named = [(self._table[index].name, tensor.to(self._device)) for index, tensor in tensors.items()]
                model.load_weights(iter(named))  # type: ignore[operator]
        self.masters |= tensors

    def differing(self, storages: Sequence[LiveStorage]) -> list[str]:
        """Names of the parameters that do not hold what the loaders make of the masters. Writes nothing to them."""
        if not self.masters:
            return []
        shadow = ShadowLoad(storages)
        with torch.no_grad(), shadow:
            for model in self._models:
                named = [(self._table[index].name, master.to(self._device)) for index, master in self.masters.items()]
                model.load_weights(iter(named))  # type: ignore[operator]
        return shadow.differing()

    def fingerprint(self, storages: Sequence[LiveStorage], fed: set[int], static: frozenset[int]) -> dict[str, Digest]:
        """Digests of the parameters that no region feeds, by name: what loaders computed, and what stays as it is.

        Args:
            fed: numbers of the storages that regions feed.
            static: see `CoordinateMap`.
        """
        return {
            storage.name: digest_torch(number, storage.bits)
            for number, storage in enumerate(storages)
            if number in static or (self.masters and storage.parameter and number not in fed)
        }


def masters_of(
    table: TensorTable, indices: Sequence[int], tensors: Mapping[str, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """The values of these tensors, asked for once each."""
    return {index: tensors[table[index].name].contiguous() for index in indices}
