"""The positions of checkpoint tensors in a model that holds them fused or under other names.

transformers loads some checkpoints into parameters of another shape (all experts of a layer as one) or name, and
reverts that when it saves. This module runs that reversal once, on meta tensors without memory: each resulting view
shows which elements of which parameter a checkpoint tensor consists of. A tensor that the reversal computes has no such
position, so it cannot be published.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hubsync.errors import ConfigError

from .shards import local_part
from .strided import Place, part_of

Tensors = dict[str, torch.Tensor]
Places = dict[str, dict[str, Place | None]]
"""Live tensor -> the published tensors in it with their positions; None for one that is the whole live tensor."""

_COPIES = (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone)


def places_in(model: Any, tensors: Tensors, prefix: str = "") -> Places:
    """The positions of the tensors that a transformers model saves, in its live tensors.

    Args:
        tensors: checkpoint name -> live tensor of `model`.
        prefix: name prefix of the model's own tensors.

    Raises:
        ConfigError: a saved tensor is no view of a live one.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 there was nothing to revert
        return {}

    def saved(held: Tensors) -> Tensors:
        found: Tensors = revert_weight_conversion(model, held)
        return found

    places = _traced(type(model).__name__, saved, tensors, prefix)
    _require_as_saved(saved, tensors, places, prefix)
    return places


def published(tensors: Tensors, places: Places) -> Tensors:
    """Published name -> live tensor or a part of one, in the order of live tensors and positions in them."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        for tensor_name, place in places.get(name, {name: None}).items():
            found[tensor_name] = tensor if place is None else part_of(tensor_name, tensor, place)
    return found


def transposed_as(tensor: torch.Tensor, place: Place | None, shape: tuple[int, ...] | None) -> Place | None:
    """The position of a published tensor with two dimensions exchanged, if that gives it `shape`; else `place`.

    Args:
        tensor: the live tensor.
        place: position in it; None for the whole tensor.
    """
    if place is None:
        whole = _stand_in(tensor)
        found = Place(tuple(whole.shape), whole.stride(), 0)
    else:
        found = place
    if shape is None or len(shape) != len(found.shape) or shape == found.shape:
        return place
    for first, second in itertools.combinations(range(len(shape)), 2):
        order = list(range(len(shape)))
        order[first], order[second] = second, first
        if tuple(found.shape[dim] for dim in order) == shape:
            return Place(shape, tuple(found.stride[dim] for dim in order), found.offset)
    return place


def _traced(kind: str, saved: Callable[[Tensors], Tensors], tensors: Tensors, prefix: str) -> Places:
    stand_ins = {name: _stand_in(tensor) for name, tensor in tensors.items() if name.startswith(prefix)}
    names = {id(stand_in): name for name, stand_in in stand_ins.items()}
    places: Places = {name: {} if name in stand_ins else {name: None} for name in tensors}
    try:
        with _WithoutCopies(), _WithoutWrites():
            outcome = saved({name.removeprefix(prefix): stand_in for name, stand_in in stand_ins.items()})
    except Exception as error:
        raise ConfigError(
            f"transformers cannot revert its conversion of {kind}: {type(error).__name__}: {error}"
        ) from error
    for short, tensor in outcome.items():
        stand_in = tensor if tensor._base is None else tensor._base
        live = names.get(id(stand_in))
        if live is None or tensor.dtype != stand_in.dtype:
            raise ConfigError(
                f"the checkpoint of {kind} has {prefix}{short} with shape {list(tensor.shape)}, which is computed from "
                "the model's parameters and is no part of one of them: such a model cannot be published"
            )
        whole = tensor.shape == stand_in.shape and tensor.is_contiguous()
        place = Place(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        places[live][prefix + short] = None if whole else place
    for name, parts in places.items():
        if not parts:
            raise ConfigError(f"{kind} holds {name} but does not save it: such a model cannot be published")
    return {name: dict(sorted(parts.items(), key=_start)) for name, parts in places.items()}


def _start(part: tuple[str, Place | None]) -> int:
    _, place = part
    return 0 if place is None else place.offset


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _WithoutCopies(TorchFunctionMode):
    """While entered, copying a tensor returns the original, so that the result remains a view of it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func in _COPIES else func(*args, **(kwargs or {}))


class _WithoutWrites(TorchDispatchMode):
    """While entered, writing to a tensor raises: a view that is written to does not keep its elements."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise TypeError(f"{func} writes to a tensor")
        return func(*args, **(kwargs or {}))


def _require_as_saved(saved: Callable[[Tensors], Tensors], tensors: Tensors, places: Places, prefix: str) -> None:
    """ConfigError unless strided views have the bits that are really saved. Checks one parameter of each kind.

    Sharded parameters are not checked: their positions are those of whole parameters.
    """
    seen = set()
    for name, parts in places.items():
        kind = (tuple(tensors[name].shape), *parts.values())
        if None in kind or kind in seen or hasattr(tensors[name], "to_local"):
            continue
        seen.add(kind)
        with torch.no_grad():
            real = saved({name.removeprefix(prefix): tensors[name]})
        for tensor_name, part in published({name: tensors[name]}, {name: parts}).items():
            expected = real.get(tensor_name.removeprefix(prefix))
            if expected is None or not _same_bits(expected, local_part(part)):
                raise ConfigError(
                    f"{tensor_name} is saved with other elements than those at its position in {name}: such a model "
                    "cannot be published"
                )


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right)))
