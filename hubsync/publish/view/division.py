"""Dividing the view among ranks when an engine is made, and checking that all ranks train one model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch

from hubsync.errors import ConfigError
from hubsync.format.digest import Digest, digest_torch
from hubsync.publish.ranks import Ranks

from .cast import cast, integers
from .shards import Box, Shard, divide, held_box
from .strided import whole_of


def divided(ranks: Ranks, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> list[list[Shard]]:
    """Rank -> the elements of each tensor that it owns. Rounds of `ranks`.

    Args:
        tensors: this rank's live tensors.
        dtype: dtype of the published view.

    Raises:
        ConfigError: the ranks do not hold shards or equal replicas of one model.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    gathered = ranks.gather(lambda: (list(tensors), [held_box(name, tensor) for name, tensor in tensors.items()]))
    for rank, (names, _) in enumerate(gathered):
        for expected, name in zip_longest(gathered[0][0], names):
            if name != expected:
                raise ConfigError(
                    f"rank {rank} holds {name} where rank 0 holds {expected}: the ranks must train one model, sharded "
                    "or replicated (pipeline stages are not supported)"
                )
    held = [boxes for _, boxes in gathered]
    owned = divide(list(tensors), shapes, held)
    _require_equal_replicas(ranks, tensors, dtype, held)
    return owned


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


def _require_equal_replicas(
    ranks: Ranks, tensors: dict[str, torch.Tensor], dtype: torch.dtype, held: Sequence[Sequence[Box]]
) -> None:
    """ConfigError unless ranks that hold the same box hold the same weights: each publishes a part of it."""
    replicated = {
        name: [boxes[index] for boxes in held]
        for index, name in enumerate(tensors)
        if len({boxes[index] for boxes in held}) < len(held)
    }
    digests = ranks.gather(lambda: {name: _digest_of_held(tensors[name], dtype) for name in replicated})
    for name, boxes in replicated.items():
        first: dict[Box, int] = {}
        for rank, box in enumerate(boxes):
            other = first.setdefault(box, rank)
            if digests[other][name] != digests[rank][name]:
                raise ConfigError(
                    f"{name} differs between ranks {other} and {rank}, which both hold it: give all ranks the same "
                    "weights (DistributedDataParallel does) before the engine is made"
                )


def _digest_of_held(tensor: torch.Tensor, dtype: torch.dtype) -> Digest:
    return digest_torch(0, integers(cast(tensor, dtype)))
