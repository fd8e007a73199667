"""Models that their trainer has cut itself: it says which rectangles of which published tensors each rank holds.

The published view is then not found in the model, but given as cuts. Nothing is gathered: each rank gives the memory
that it holds, and a tensor that no cut of a rank belongs to is one of other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hubsync.errors import ConfigError

from .adapters import is_adapted
from .boxes import Box
from .pieces import Pieces


@dataclass(frozen=True, eq=False)
class Cut:
    """A rectangle of a published tensor, and the memory of this process that holds it.

    A tensor that is fused in the trainer is given as cuts of several published tensors; one that lies scattered, as
    several cuts of one. Ranks that hold the same rectangles of a tensor are replicas, and must hold the same values.

    Args:
        name: of the published tensor, as in the checkpoint that servers load.
        local: the rectangle: a view of a parameter, with any strides. Floating point, and no DTensor.
        shape: of the whole published tensor; default is that of `local`.
        offset: of the rectangle in the published tensor, in each dimension; default is 0.
    """

    name: str
    local: torch.Tensor
    shape: Sequence[int] | None = None
    offset: Sequence[int] | None = None

    @property
    def full(self) -> tuple[int, ...]:
        """Shape of the whole published tensor."""
        return tuple(map(int, self.local.shape if self.shape is None else self.shape))

    @property
    def box(self) -> Box:
        """The rectangle."""
        offset = (0,) * self.local.ndim if self.offset is None else self.offset
        return Box(tuple(map(int, offset)), tuple(self.local.shape))


NOT_ALL = "some ranks have a layout, and others have none: give all ranks one"

Layout = Callable[[Any], Iterable[Cut]]
"""Returns what this rank holds of a model. Called at every publish, because a model may replace its tensors."""

Described = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Published name -> shape and dtype of the trained tensor."""


class CutView:
    """The published tensors of a model, as its trainer gives them: a `PublishedView`.

    Args:
        layout: gives the cuts of this rank.
        model: its argument.

    Raises:
        ConfigError: the model is a PEFT model.
    """

    def __init__(self, layout: Layout, model: torch.nn.Module):
        if is_adapted(model):
            raise ConfigError("a layout describes whole weights, and this is a PEFT model: leave layout out")
        self._layout = layout
        self._model = model
        self._known: Described | None = None

    def described(self) -> Described:
        """What this rank gives."""
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._own().items()}

    def complete(self, described: Sequence[Described | None]) -> None:
        """Take over the names and shapes that all ranks give. Equal arguments give equal results.

        Args:
            described: rank -> its `described`.

        Raises:
            ConfigError: the ranks give one tensor different shapes, a rank has no layout, or no rank has tensors.
        """
        known: Described = {}
        for rank, own in enumerate(described):
            if own is None:
                raise ConfigError(NOT_ALL)
            for name, (shape, dtype) in own.items():
                if known.setdefault(name, (shape, dtype))[0] != shape:
                    raise ConfigError(
                        f"rank {rank} gives {name} the shape {list(shape)}, and another rank {list(known[name][0])}: "
                        "the shape of a cut is that of the whole published tensor"
                    )
        if not known:
            raise ConfigError("the layout gives no tensors to publish")
        self._known = known

    def lay_out(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """False: the names and shapes are those that the trainer gives."""
        return False

    def tensors(self) -> dict[str, torch.Tensor]:
        """Published name -> what this rank holds of the tensor now: possibly nothing."""
        own: dict[str, torch.Tensor] = dict(self._own())
        device = next((tensor.device for tensor in own.values()), torch.device("cpu"))
        absent = {
            name: Pieces(shape, [], torch.empty(0, dtype=dtype, device=device))
            for name, (shape, dtype) in (self._known or {}).items()
            if name not in own
        }
        found = own | absent
        ordered = {name: found.pop(name) for name in self._known or ()}
        return ordered | found  # also names that are new, which detectors refuse

    def require_frozen(self) -> None:
        """Nothing: there is no adapter."""

    def _own(self) -> dict[str, Pieces]:
        cuts: dict[str, list[Cut]] = {}
        with torch.no_grad():
            for cut in self._layout(self._model):
                _require_valid(cut)
                cuts.setdefault(cut.name, []).append(cut)
        return {name: _pieces(name, of_name) for name, of_name in cuts.items()}


def _pieces(name: str, cuts: list[Cut]) -> Pieces:
    first = cuts[0]
    for cut in cuts[1:]:
        if cut.full != first.full:
            raise ConfigError(
                f"two cuts of {name} give it the shapes {list(first.full)} and {list(cut.full)}: the shape of a cut is "
                "that of the whole published tensor"
            )
        if (cut.local.dtype, cut.local.device) != (first.local.dtype, first.local.device):
            raise ConfigError(f"cuts of {name} have several dtypes or devices: give them in one")
    return Pieces(first.full, [(cut.box, cut.local) for cut in cuts], first.local)


def _require_valid(cut: Cut) -> None:
    """ConfigError unless a cut is a rectangle of real numbers inside of its tensor."""
    if not isinstance(cut, Cut):
        raise ConfigError(f"a layout gives hubsync.Cut, not {type(cut).__name__}")
    local, box, full = cut.local, cut.box, cut.full
    if hasattr(local, "to_local"):
        raise ConfigError(f"the cut of {cut.name} is a {type(local).__name__}: give its local part, to_local()")
    if local.is_meta or not local.is_floating_point():
        raise ConfigError(f"the cut of {cut.name} is {local.dtype} on {local.device}: only real weights are published")
    is_inside = len(box.offset) == len(box.shape) == len(full) and all(
        at >= 0 and at + size <= whole for at, size, whole in zip(box.offset, box.shape, full, strict=True)
    )
    if not is_inside and box.numel:
        raise ConfigError(
            f"the cut {list(box.shape)} at {list(box.offset)} of {cut.name} is not inside of its shape {list(full)}"
        )
