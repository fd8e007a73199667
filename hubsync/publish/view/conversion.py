"""How a checkpoint's tensors lie in a model that holds them otherwise: fused, or under other names.

transformers loads some checkpoints into parameters of another shape (all experts of a layer as one) or name, and
reverts that when it saves. That reversal is watched here once, on stand-ins without memory: what it does to a stand-in
tells for each tensor of the checkpoint which elements of which parameter it has. What it computes anew has no such
place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hubsync.errors import ConfigError

from .shards import local_part
from .strided import Place, StridedView

Tensors = dict[str, torch.Tensor]
Places = dict[str, dict[str, Place | None]]
"""Live tensor -> the published tensors that lie in it, and where; None for one that is all of it."""

_COPIES = (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone)


def places_in(model: Any, tensors: Tensors, prefix: str = "") -> Places:
    """Where the tensors that a transformers model saves lie in its live ones.

    Args:
        tensors: checkpoint name -> live tensor of `model`.
        prefix: of the names of the model's own tensors.

    Raises:
        ConfigError: a tensor that is saved is no view of a live one.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 there was nothing to revert
        return {}

    def saved(held: Tensors) -> Tensors:
        found: Tensors = revert_weight_conversion(model, held)
        return found

    places = _watched(type(model).__name__, saved, tensors, prefix)
    _require_as_saved(saved, tensors, places, prefix)
    return places


def published(tensors: Tensors, places: Places) -> Tensors:
    """Published name -> live tensor, or excerpt of one: in the order of the live tensors, and as they lie in these."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        for tensor_name, place in places.get(name, {name: None}).items():
            found[tensor_name] = tensor if place is None else StridedView(tensor_name, tensor, place)
    return found


def _watched(kind: str, saved: Callable[[Tensors], Tensors], tensors: Tensors, prefix: str) -> Places:
    stand_ins = {name: _stand_in(tensor) for name, tensor in tensors.items() if name.startswith(prefix)}
    names = {id(stand_in): name for name, stand_in in stand_ins.items()}
    places: Places = {name: {} if name in stand_ins else {name: None} for name in tensors}
    try:
        with _WithoutCopies(), _WithoutWrites():
            outcome = saved({name.removeprefix(prefix): stand_in for name, stand_in in stand_ins.items()})
    except Exception as error:
        raise ConfigError(f"transformers cannot say how {kind} is saved: {type(error).__name__}: {error}") from error
    for short, tensor in outcome.items():
        stand_in = tensor if tensor._base is None else tensor._base
        live = names.get(id(stand_in))
        if live is None or tensor.dtype != stand_in.dtype:
            raise ConfigError(
                f"{kind} holds its weights otherwise than its checkpoint, which has {prefix}{short} with shape "
                f"{list(tensor.shape)}: that is computed from the model's parameters, and no part of one of them, so "
                "it cannot be followed"
            )
        whole = tensor.shape == stand_in.shape and tensor.is_contiguous()
        place = Place(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        places[live][prefix + short] = None if whole else place
    for name, excerpts in places.items():
        if not excerpts:
            raise ConfigError(f"{kind} does not save {name}, which it holds: it cannot be published")
    return {name: dict(sorted(excerpts.items(), key=_start)) for name, excerpts in places.items()}


def _start(excerpt: tuple[str, Place | None]) -> int:
    _, place = excerpt
    return 0 if place is None else place.offset


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _WithoutCopies(TorchFunctionMode):
    """A copy has the elements of the original: while entered, the original stands for it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func in _COPIES else func(*args, **(kwargs or {}))


class _WithoutWrites(TorchDispatchMode):
    """While entered, nothing writes to a tensor: a view that was written to would not have the elements it had."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise TypeError(f"{func} writes to a tensor")
        return func(*args, **(kwargs or {}))


def _require_as_saved(saved: Callable[[Tensors], Tensors], tensors: Tensors, places: Places, prefix: str) -> None:
    """ConfigError unless excerpts have the bits that are really saved. Looks at one parameter of each kind.

    Of parameters that other processes hold parts of nothing is looked at: their places are those of whole ones.
    """
    seen = set()
    for name, excerpts in places.items():
        kind = (tuple(tensors[name].shape), *excerpts.values())
        if None in kind or kind in seen or hasattr(tensors[name], "to_local"):
            continue
        seen.add(kind)
        with torch.no_grad():
            real = saved({name.removeprefix(prefix): tensors[name]})
        for tensor_name, excerpt in published({name: tensors[name]}, {name: excerpts}).items():
            expected = real.get(tensor_name.removeprefix(prefix))
            if expected is None or not _same_bits(expected, local_part(excerpt)):
                raise ConfigError(f"{tensor_name} is saved with other elements than {name} was found to have there")


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right)))
