"""All tensors that a model can reach: not only parameters and buffers, but also what its layers keep in attributes."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

_CONTAINERS = (dict, list, tuple, set, frozenset)
_OF_MODULES = frozenset(vars(torch.nn.Module()))
_STATE = frozenset({"kv_cache"})  # of requests, not of weights


def reachable_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of every tensor that is reachable from a model, each tensor once.

    Follows submodules, attributes of objects that vLLM defines, containers, bound methods, partial functions and
    variables that vLLM's functions have captured. Caches of requests are left out. May run while forward passes do.
    """
    seen: set[int] = set()
    found: list[tuple[str, Any]] = [("", model)]
    while found:
        path, value = found.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield path, value
            continue
        found += reversed([(f"{path}.{name}" if path else name, held) for name, held in _held_by(value)])


def _held_by(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, torch.nn.Module):
        own = [pair for owner in (value._parameters, value._buffers, value._modules) for pair in owner.items()]
        rest = [(name, held) for name, held in _attributes(value) if name not in _OF_MODULES and _may_hold(name, held)]
        return own + rest
    if isinstance(value, Mapping):
        return [(str(key), held) for key, held in list(value.items()) if _may_hold(str(key), held)]
    if isinstance(value, _CONTAINERS):
        return [(str(number), held) for number, held in enumerate(list(value)) if _may_hold("", held)]
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, types.FunctionType):
        return [(name, held) for name, held in _captured(value) if _may_hold(name, held)]
    if hasattr(value, "__self__"):
        return [("__self__", value.__self__)]
    return [(name, held) for name, held in _attributes(value) if _may_hold(name, held)]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    found = list(getattr(value, "__dict__", {}).items())  # at once: another thread may add to it
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        found += [(name, getattr(value, name)) for name in names if name != "__dict__" and hasattr(value, name)]
    return found


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of enclosing functions that a function uses."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents


def _may_hold(name: str, value: Any) -> bool:
    if name in _STATE or isinstance(value, type):
        return False
    if isinstance(value, (torch.Tensor, torch.nn.Module, functools.partial, *_CONTAINERS)):
        return True
    if isinstance(value, types.FunctionType):
        return value.__closure__ is not None and str(value.__module__).startswith("vllm")
    owner = getattr(value, "__self__", None)
    kind = type(value if owner is None or isinstance(owner, type) else owner)
    return kind.__module__.startswith("vllm")
