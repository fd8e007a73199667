"""Comparing two flat tensors of one dtype bit by bit, on the CPU or on a device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hubsync import kernels
from hubsync.kernels.bits import UNSIGNED, bits_of, find_changes
from hubsync.publish.view.cast import integers

from .base import Change

_CHUNK = 1 << 26  # elements compared at a time on a device: bounds the mask, and `nonzero` has a limit


def compare(old: torch.Tensor, new: torch.Tensor) -> Change:
    """The elements whose bits differ. Only these are copied from a device."""
    if old.device.type != "cpu":
        return compare_on_device(old, new)
    old_bits, new_bits = bits_of(old), bits_of(new)
    indices, _ = find_changes(old_bits, new_bits)
    return Change(indices, old_bits[indices], new_bits[indices])


def compare_on_device(old: torch.Tensor, new: torch.Tensor) -> Change:
    """`compare` on any device: with Triton on a GPU, with torch operations elsewhere."""
    if kernels.on_gpu(old):
        indices, before, after = kernels.gpu().changes(integers(old), integers(new))
        return Change(indices.cpu().numpy(), _unsigned(before), _unsigned(after))
    at = torch.cat(list(_unequal(integers(old), integers(new))))
    return Change(at.cpu().numpy(), _unsigned(integers(old)[at]), _unsigned(integers(new)[at]))


def _unequal(old: torch.Tensor, new: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, max(1, old.numel()), _CHUNK):
        stop = start + _CHUNK
        yield (old[start:stop] != new[start:stop]).nonzero().view(-1) + start


def _unsigned(bits: torch.Tensor) -> np.ndarray:
    return bits.cpu().numpy().view(UNSIGNED[8 * bits.element_size()])
