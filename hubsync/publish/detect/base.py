"""The interface of detectors."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from hubsync.format.digest import Digest
from hubsync.format.table import TensorTable

from .changes import Detected


@runtime_checkable
class PartHolder(Protocol):
    """A detector with a copy of the view: of all, or of this process's part of it."""

    table: TensorTable

    def part(self, index: int) -> torch.Tensor:
        """The elements of one tensor that this process owns, flat."""


class Detector(Protocol):
    """Finds the changes since the last durable version, and proves them.

    Attributes:
        table: the tensor table.
        digest: digest of the view, or of this process's part of it, that changes are counted from.
        holds_old: whether `tensors` costs nothing, so that compact deltas can be encoded against them.
    """

    table: TensorTable
    holds_old: bool

    @property
    def digest(self) -> Digest: ...

    def begin(self) -> None:
        """Start to read the weights that were followed last, while the caller looks for those of the model now."""

    def follow(self, tensors: dict[str, torch.Tensor]) -> None:
        """Watch these live tensors from now on: a module may replace its parameters and buffers."""

    def detect(self) -> Detected:
        """All changes since the view of `digest`. Reads every live weight: its digest proves the changes."""

    def advance(self, detected: Detected) -> None:
        """Count changes from the view after `detected`: it is durable."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The view of `digest` by name, in checkpoint shapes."""

    def close(self) -> None:
        """Remove hooks."""
