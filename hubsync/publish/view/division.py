"""What the ranks find out together when an engine is made: that they train one model, and who owns what of it."""

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
    """Rank -> what it owns of each tensor. Rounds of `ranks`.

    Args:
        tensors: this rank's live tensors.
        dtype: of the published view.

    Raises:
        ConfigError: the ranks do not hold shards or equal replicas of one model.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    told = ranks.gather(lambda: (list(tensors), [held_box(name, tensor) for name, tensor in tensors.items()]))
    for rank, (names, _) in enumerate(told):
        for expected, name in zip_longest(told[0][0], names):
            if name != expected:
                raise ConfigError(
                    f"rank {rank} holds {name} where rank 0 holds {expected}: the ranks must train one model, sharded "
                    "or replicated (pipeline stages are not supported)"
                )
    held = [boxes for _, boxes in told]
    owned = divide(list(tensors), shapes, held)
    _require_equal_replicas(ranks, tensors, dtype, held)
    return owned


def holds_all(ranks: Ranks, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether this process trains alone and holds every tensor whole."""
    return ranks.size == 1 and not any(hasattr(whole_of(tensor), "to_local") for tensor in tensors.values())


def _require_equal_replicas(
    ranks: Ranks, tensors: dict[str, torch.Tensor], dtype: torch.dtype, held: Sequence[Sequence[Box]]
) -> None:
    """ConfigError unless ranks that hold the same box hold the same weights in it, as what is published is of both."""
    replicated = {
        name: [boxes[index] for boxes in held]
        for index, name in enumerate(tensors)
        if len({boxes[index] for boxes in held}) < len(held)
    }
    told = ranks.gather(lambda: {name: _digest_of_held(tensors[name], dtype) for name in replicated})
    for name, boxes in replicated.items():
        first: dict[Box, int] = {}
        for rank, box in enumerate(boxes):
            other = first.setdefault(box, rank)
            if told[other][name] != told[rank][name]:
                raise ConfigError(
                    f"{name} differs between ranks {other} and {rank}, which both hold it: give all ranks the same "
                    "weights (DistributedDataParallel does) before the engine is made"
                )


def _digest_of_held(tensor: torch.Tensor, dtype: torch.dtype) -> Digest:
    return digest_torch(0, integers(cast(tensor, dtype)))
