"""Optimizer steps in slices, so that parameters can be compared just before and after their update.

An optimizer that updates each parameter only from that parameter's gradient and state computes the same bits when it
steps its parameters in slices, one after the other. Everything around the update (hooks, profiler ranges, the closure,
the call counter of LR schedulers) still happens once. The optimizers of bitsandbytes identify parameters by their
position in the group, so their steps are not sliced: the method that updates one parameter is observed instead.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import wraps
from types import MethodType
from typing import Any, Protocol

import torch

BUCKET = 1 << 22  # elements stepped together, unless one parameter has more: few calls, and a small copy

# Classes whose `step` was reviewed: it updates each parameter by itself. A subclass may do anything, so none is known.
_KNOWN = {"Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD"}
_KNOWN |= {"Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
_KNOWN_BY_NAME = {"transformers.optimization.Adafactor", "lion_pytorch.lion_pytorch.Lion"}


class StepObserver(Protocol):
    """Compares parameters before and after their update."""

    def step(self) -> AbstractContextManager[None]:
        """Entered around each whole step."""

    def update(self, parameters: list[torch.Tensor]) -> AbstractContextManager[None]:
        """Entered around the update of these parameters, the only one in this step."""


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def why_not(optimizer: Any) -> str | None:
    """Why this optimizer, or wrapper of one, cannot be stepped in slices; None if it can."""
    while hasattr(optimizer, "optimizer"):
        if getattr(optimizer, "scaler", None) is not None:
            return "accelerate's wrapper for float16 gradients calls the original step"
        optimizer = optimizer.optimizer
    kind = type(optimizer)
    if not _is_known(kind):
        return f"{kind.__name__} is not known to update each parameter by itself"
    if not getattr(kind.step, "hooked", False):
        return f"the step of {kind.__name__} has been replaced"
    own = vars(optimizer).get("step")
    if (slices := getattr(own, "_slices", None)) is not None and slices.active:
        return "another engine already observes its steps"
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        return "the optimizer's step has been replaced"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "a differentiable step keeps the tensors that it computes from"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(set(map(id, parameters))) < len(parameters):
        return "the optimizer holds a parameter twice"
    if len({parameter.device.type for parameter in parameters}) > 1:
        return "the optimizer's parameters are on several kinds of devices, which affects how they are updated"
    return None


class SlicedSteps:
    """Makes every `optimizer.step()` a sliced one, until `undo`.

    Args:
        optimizer: a torch optimizer for which `why_not` returns None.
        observer: entered around each step and each update.
        bucket: elements stepped together; a larger parameter is stepped by itself.

    Attributes:
        active: whether steps are still sliced.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, observer: StepObserver, bucket: int = BUCKET):
        self._observer = observer
        self._bucket = bucket
        self._optimizer = weakref.ref(optimizer)
        self._own = vars(optimizer).get("step")  # installed by an LR scheduler, which counts calls
        self.active = True
        update = type(optimizer).step.__wrapped__  # type: ignore[attr-defined]  # without hooks and profiler range

        @wraps(type(optimizer).step)
        def step(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
            if self._own is not None:
                optimizer._opt_called = True  # type: ignore[attr-defined]
            if not self.active:
                return update(optimizer, closure, **options)
            return self._step(optimizer, update, closure, options)

        hooked = torch.optim.Optimizer.profile_hook_step(step)
        hooked._slices = self  # type: ignore[attr-defined]  # the wrapper of an LR scheduler copies this attribute
        if self._own is not None:
            hooked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        self._installed = MethodType(hooked, optimizer)
        optimizer.step = self._installed  # type: ignore[method-assign]

    def undo(self) -> None:
        """Restore the optimizer's own step. Wrappers that others put around ours stay, and have no effect."""
        self.active = False
        optimizer = self._optimizer()
        if optimizer is None or vars(optimizer).get("step") is not self._installed:
            return
        if self._own is None:
            del optimizer.step
        else:
            optimizer.step = self._own  # type: ignore[method-assign]

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        update: Callable[..., Any],
        closure: Callable[[], Any] | None,
        options: dict[str, Any],
    ) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if _is_bitsandbytes(type(optimizer)):
            with _Untraced(self._observer.step()):
                self._update_of_each(optimizer, update, options)
            return loss
        groups = optimizer.param_groups
        with _Untraced(self._observer.step()):
            for group in groups:
                whole = group["params"]
                try:
                    optimizer.param_groups = [group]
                    most = sys.maxsize if _is_indivisible(optimizer, group) else self._bucket
                    for bucket in _buckets(whole, most):
                        group["params"] = bucket
                        with _Untraced(self._observer.update(bucket)):
                            update(optimizer, **options)
                finally:
                    group["params"] = whole
                    optimizer.param_groups = groups
        return loss

    def _update_of_each(self, optimizer: Any, update: Callable[..., Any], options: dict[str, Any]) -> None:
        update_one = optimizer.update_step

        def observed(group: dict[str, Any], parameter: torch.Tensor, *place: int) -> None:
            with _Untraced(self._observer.update([parameter])):
                update_one(group, parameter, *place)

        optimizer.update_step = observed
        try:
            update(optimizer, **options)
        finally:
            del optimizer.update_step


class _Untraced:
    """A context that `torch.compile` leaves alone: it would take arrays of the observer for tensors of the step."""

    def __init__(self, context: AbstractContextManager[None]):
        self._context = context

    @torch.compiler.disable
    def __enter__(self) -> None:
        self._context.__enter__()

    @torch.compiler.disable
    def __exit__(self, *error: Any) -> bool | None:
        return self._context.__exit__(*error)


def _buckets(parameters: list[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Split a list into buckets of at most `most` elements; a larger parameter has a bucket for itself."""
    bucket: list[torch.Tensor] = []
    held = 0
    for parameter in parameters:
        if bucket and held + parameter.numel() > most:
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += parameter.numel()
    if bucket:
        yield bucket


def _is_indivisible(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the state of some parameters of a group decides how the others are updated, in this step.

    SGD uses other operators for a whole group while a part of it has no momentum yet, and Adagrad while a part of it
    has sparse gradients. Those operators round bfloat16 differently.
    """
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adagrad):
        return False
    stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
    begun = {optimizer.state.get(parameter, {}).get("momentum_buffer") is not None for parameter in stepped}
    return len(begun) > 1 or len({parameter.grad.is_sparse for parameter in stepped}) > 1


def _is_known(kind: type) -> bool:
    by_name = f"{kind.__module__}.{kind.__qualname__}" in _KNOWN_BY_NAME
    return by_name or _is_bitsandbytes(kind) or kind in [getattr(torch.optim, name, None) for name in _KNOWN]


def _is_bitsandbytes(kind: type) -> bool:
    return kind.__module__.startswith("bitsandbytes.optim.") and hasattr(kind, "update_step")
