"""Published tensors of which a process holds rectangles, each in a part of its memory, with any strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .boxes import Box, Boxes, joined, with_elements
from .placements import rectangles
from .shards import local_part


class Pieces(torch.Tensor):
    """A published tensor of which this process holds some rectangles, or none. It has no memory.

    `shards.local_part` returns the held elements: those of the only rectangle in the memory that holds it, or a flat
    copy of all of them, one rectangle after the other. All other operations raise TypeError.

    Attributes:
        pieces: each rectangle with the memory that holds it, in ascending order of their offsets.
        boxes: the same elements in as few boxes as possible.
        is_buffer: replicas may hold other values.
    """

    pieces: tuple[tuple[Box, torch.Tensor], ...]
    boxes: Boxes
    is_buffer: bool

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        pieces: Sequence[tuple[Box, torch.Tensor]],
        like: torch.Tensor,
        is_buffer: bool = False,
    ) -> Pieces:
        """Args: shape of the whole tensor; the pieces; a tensor with their dtype, device and `requires_grad`."""
        made: Pieces = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        kept = [(box, held.detach()) for box, held in pieces if box.numel]
        made.pieces = tuple(sorted(kept, key=lambda piece: piece[0].offset))
        made.boxes = joined(with_elements(box for box, _ in made.pieces))
        made.is_buffer = is_buffer
        return made

    def __init__(self, *_: Any, **__: Any):
        """`__new__` does everything: torch requires it for wrapper subclasses."""

    def to_local(self) -> torch.Tensor:
        """The elements that this process holds."""
        parts = [held for _, held in self.pieces]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([part.reshape(-1) for part in parts])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} on a tensor in pieces: take its local_part")


def in_pieces(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A live tensor, as `Pieces` if it is a DTensor of which this process holds several rectangles."""
    placements = getattr(tensor, "placements", ())
    if all(getattr(placement, "split_factor", 1) == 1 for placement in placements):
        return tensor
    held = pieces_of(name, tensor)
    return Pieces(tuple(tensor.shape), held, tensor, is_buffer(tensor)) if len(held) > 1 else tensor


def is_buffer(tensor: torch.Tensor) -> bool:
    """Whether a live tensor that is not a part of another one, and not partitioned by DeepSpeed, is no parameter."""
    return tensor.is_buffer if isinstance(tensor, Pieces) else not isinstance(tensor, torch.nn.Parameter)


def pieces_of(name: str, tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
    """The rectangles that this process holds of a live tensor, each with its memory."""
    if isinstance(tensor, Pieces):
        return list(tensor.pieces)
    local = local_part(tensor)
    if not hasattr(tensor, "to_local"):
        return [(Box.whole(tensor.shape), local)]
    return [(box, local[_slices(inside)]) for box, inside in rectangles(name, tensor)]


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))
