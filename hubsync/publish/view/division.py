"""Dividing the view among ranks, and checking that all ranks train one model, then and at every publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest

import torch

from hubsync import kernels
from hubsync.errors import ConfigError
from hubsync.format.digest import Digest, digest_torch, tensor_seed
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import TORCH_DTYPES
from hubsync.publish.ranks import Ranks

from .boxes import Boxes
from .cast import cast, integers
from .deepspeed import Partition, is_partitioned
from .pieces import is_buffer
from .shards import Shard, divide, held_boxes, local_part
from .strided import whole_of

GroupDigests = dict[tuple[int, ...], Digest]
"""Ranks that hold the same elements -> digest of them."""


@dataclass(frozen=True)
class Division:
    """Which rank publishes what.

    Attributes:
        owned: rank -> the elements of each tensor that it owns.
        replicas: the parameters that several ranks hold.
    """

    owned: list[list[Shard]]
    replicas: Replicas


class Replicas:
    """The parameters that several ranks hold. Each publishes a part of them, so they must stay equal.

    Buffers may differ, as statistics do that each rank computes from its own data: the lowest rank publishes its own.

    Args:
        names: of the tensors.
        held: rank -> the boxes of each tensor that it holds.
        rank: this one.
    """

    def __init__(self, names: Sequence[str], held: Sequence[Sequence[Boxes]], rank: int):
        self._groups: dict[tuple[int, ...], list[str]] = {}  # ranks with equal boxes, this one among them -> names
        for index, name in enumerate(names):
            group = tuple(other for other, boxes in enumerate(held) if boxes[index] == held[rank][index])
            if len(group) > 1 and held[rank][index]:
                self._groups.setdefault(group, []).append(name)

    def digests(self, tensors: Mapping[str, torch.Tensor], served: TensorTable | torch.dtype) -> GroupDigests:
        """Digests of what this rank holds now, as it is served. Reads all of it."""
        found = self._by_name(tensors, served)
        return {group: sum((found[name] for name in names), Digest()) for group, names in self._groups.items()}

    def require_equal(
        self,
        ranks: Ranks,
        found: Sequence[GroupDigests],
        tensors: Callable[[], Mapping[str, torch.Tensor]],
        served: TensorTable | torch.dtype,
    ) -> None:
        """ConfigError, on all ranks, unless the digests that all of them have found agree. A round only if not.

        Args:
            found: rank -> its `digests`.
        """
        groups = {group for digests in found for group in digests}
        if all(len({found[rank][group] for rank in group}) == 1 for group in groups):
            return
        groups_of = {name: group for group, names in self._groups.items() for name in names}
        named = ranks.gather(
            lambda: {name: (groups_of[name], digest) for name, digest in self._by_name(tensors(), served).items()}
        )
        for rank, digests in enumerate(named):
            for name, (group, digest) in digests.items():
                other = next((other for other in group if named[other][name][1] != digest), None)
                if other is not None:
                    raise ConfigError(
                        f"{name} differs between ranks {rank} and {other}, which both hold it, so nothing is "
                        "published: give all ranks the same weights (DistributedDataParallel does, or broadcast those "
                        "of rank 0)"
                    )

    def _by_name(self, tensors: Mapping[str, torch.Tensor], served: TensorTable | torch.dtype) -> dict[str, Digest]:
        names = [name for names in self._groups.values() for name in names]
        found = _digests_on_gpus(names, tensors, served)
        return {name: found[name] if name in found else _digest_of_held(name, tensors[name], served) for name in names}


def divided(ranks: Ranks, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Division:
    """Which rank owns which elements of each tensor. Rounds of `ranks`.

    Args:
        tensors: this rank's live tensors.
        dtype: dtype of the published view.

    Raises:
        ConfigError: the ranks do not hold shards or equal replicas of one model.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    gathered = ranks.gather(lambda: (list(tensors), [held_boxes(name, tensor) for name, tensor in tensors.items()]))
    for rank, (names, _) in enumerate(gathered):
        for expected, name in zip_longest(gathered[0][0], names):
            if name != expected:
                raise ConfigError(
                    f"rank {rank} holds {name} where rank 0 holds {expected}: the ranks must train one model, sharded "
                    "or replicated. For pipeline stages give the engine a layout (docs/trainers.md)"
                )
    held = [boxes for _, boxes in gathered]
    buffers = {index for index, tensor in enumerate(tensors.values()) if _is_buffer(tensor)}
    owned = divide(list(tensors), shapes, held, whole=buffers)
    parameters = [index for index in range(len(shapes)) if index not in buffers]
    names = list(tensors)
    replicas = Replicas(
        [names[index] for index in parameters], [[boxes[index] for index in parameters] for boxes in held], ranks.rank
    )
    found = ranks.gather(lambda: replicas.digests(tensors, dtype))
    replicas.require_equal(ranks, found, lambda: tensors, dtype)
    return Division(owned, replicas)


def _is_buffer(tensor: torch.Tensor) -> bool:
    whole = whole_of(tensor)
    return is_buffer(whole) and not (is_partitioned(whole) or isinstance(whole, Partition))


def holds_all(ranks: Ranks, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether this process trains alone and holds every tensor whole."""
    return ranks.size == 1 and not any(hasattr(whole_of(tensor), "to_local") for tensor in tensors.values())


def assembled(
    ranks: Ranks, division: Sequence[Sequence[Shard]], index: int, mine: torch.Tensor, to: int
) -> torch.Tensor | None:
    """All elements of a tensor, flat, on the CPU of rank `to`; None on the other ranks. A round of `ranks`.

    Args:
        division: rank -> the elements of each tensor that it owns.
        index: of the tensor.
        mine: the elements that this rank owns, flat.
    """
    width = mine.element_size()
    owned = [shards[index] for shards in division]
    parts = ranks.collect(mine.cpu().view(torch.uint8), [shard.numel * width for shard in owned], to)
    if parts is None:
        return None
    whole = torch.empty(sum(shard.numel for shard in owned), dtype=mine.dtype, device="cpu")
    into = whole.view(torch.uint8).view(-1, width)
    for part, shard in zip(parts, owned, strict=True):
        elements = part.view(-1, width)
        for first, last, indices in shard.pieces():
            into[torch.from_numpy(indices)] = elements[first:last]
    return whole


def _digests_on_gpus(
    names: Sequence[str], tensors: Mapping[str, torch.Tensor], served: TensorTable | torch.dtype
) -> dict[str, Digest]:
    """As `_digest_of_held`, in one launch for each GPU, of the tensors that its kernels can read."""
    together: dict[torch.device, list[str]] = {}
    for name in names:
        if kernels.on_gpu(held := local_part(whole_of(tensors[name]))):
            together.setdefault(held.device, []).append(name)
    if not together:
        return {}
    device_live = import_module("hubsync.publish.detect.device_live")  # imports Triton
    found: dict[str, Digest] = {}
    for there in together.values():
        dtypes = {name: _dtype_of(name, served) for name in there}
        listed = [name for name in there if device_live.why_not_listed(tensors[name], dtypes[name]) is None]
        if listed:
            found |= device_live.digests_held(
                listed, [tensors[name] for name in listed], [dtypes[name] for name in listed]
            )
    return found


def _digest_of_held(name: str, tensor: torch.Tensor, served: TensorTable | torch.dtype) -> Digest:
    return digest_torch(tensor_seed(name), integers(cast(tensor, _dtype_of(name, served))))


def _dtype_of(name: str, served: TensorTable | torch.dtype) -> torch.dtype:
    return served if isinstance(served, torch.dtype) else TORCH_DTYPES[served[served.index_of(name)].dtype]
