"""Casting a live tensor to the dtype that is served, as torch casts it, and reading its bits."""

from __future__ import annotations

import torch

from .shards import local_part

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes; torch lacks wider unsigned ones


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The published view of what this process holds of a live tensor, flat. It may share the live tensor's memory."""
    return local_part(tensor).to(dtype).contiguous().view(-1)


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor as integers of its width, without a copy."""
    return tensor.view(_INTEGERS[tensor.element_size()])
