"""Passes over whole weights, on the device of the weights: numba (`cpu`) in main memory, Triton (`triton`) on a GPU.

Weights never leave their device; results have the size of the changes. Both backends give the same values.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from hubsync.errors import ConfigError

from . import cpu
from .classes import ClassMap

Bits = np.ndarray | torch.Tensor
"""Patterns: an unsigned array, or an integer tensor (uint8, int16, int32) on a device."""


@dataclass(frozen=True, eq=False)
class Counted:
    """Number of elements of each class in a rectangle. Valid until the same thread counts or ranks another rectangle.

    Attributes:
        sizes: int64[CLASSES].
    """

    sizes: np.ndarray
    _bits: Any
    _blocks: Any
    _classes: ClassMap

    def place(self, ranks: np.ndarray, diffs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (int32, ascending) of elements given by class and rank, and their differences in that order.

        Args:
            ranks: int32[n] in class order, ascending in each class and below its size.
            diffs: signed[n].
            counts: int64[CLASSES], number of elements of each class.
        """
        bounds = np.concatenate([[0], np.cumsum(counts)])
        return _backend(self._bits).place(self._bits, self._blocks, ranks, diffs, bounds, self._classes)


def count(bits: Bits, classes: ClassMap) -> Counted:
    """Count the classes of a rectangle's elements, in row-major order."""
    flat = _flat(bits)
    sizes, blocks = _backend(flat).count(flat, classes)
    return Counted(sizes, flat, blocks, classes)


def rank(bits: Bits, positions: np.ndarray, classes: ClassMap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes and ranks of the elements at `positions` (int32, ascending). A rank counts elements of the same class.

    Returns:
        (sizes, class_of, ranks): int64[CLASSES] elements of each class, uint8[n] and int32[n].
    """
    flat = _flat(bits)
    return _backend(flat).rank(flat, positions, classes)


def gather(bits: Bits, positions: np.ndarray) -> np.ndarray:
    """Patterns at row-major `positions` of a rectangle, unsigned[n]."""
    if isinstance(bits, np.ndarray):
        if bits.flags.c_contiguous:
            return bits.reshape(-1)[positions]
        return bits[np.divmod(positions, bits.shape[1])]
    at = torch.from_numpy(positions.astype(np.int64)).to(bits.device)
    found = bits.reshape(-1)[at].cpu().numpy()
    return found.view(f"u{found.itemsize}")


def _flat(bits: Bits) -> Any:
    """The elements in row-major order. A tile is copied to a buffer that the next call of this thread overwrites.

    Allocating memory for every tile would cost as much as reading it, and threads would wait for each other.
    """
    if not isinstance(bits, np.ndarray):
        return bits.contiguous().view(-1)
    if bits.flags.c_contiguous:
        return bits.reshape(-1)
    held = getattr(_scratch, "bytes", None)
    if held is None or len(held) < bits.nbytes:
        held = _scratch.bytes = np.empty(bits.nbytes, np.uint8)
    flat = held[: bits.nbytes].view(bits.dtype)
    np.copyto(flat.reshape(bits.shape), bits)
    return flat


_scratch = threading.local()


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels can be used for this tensor."""
    return tensor.device.type == "cuda" and find_spec("triton") is not None


def gpu_kernels() -> Any:
    """The module of Triton kernels. It needs a package that only machines with a GPU have."""
    return import_module("hubsync.kernels.triton")


def _backend(bits: Bits) -> Any:
    if isinstance(bits, np.ndarray):
        return cpu
    if not on_gpu(bits):
        raise ConfigError(
            f"compact deltas of weights on {bits.device} need CUDA (or ROCm) and triton: use encoding='fast'"
        )
    return gpu_kernels()
