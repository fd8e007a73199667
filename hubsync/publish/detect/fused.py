"""A step of torch's fused Adam or AdamW on a CPU, watched where the weights are written.

The optimizer's own step runs as it is, for all of its parameters: state, step counters and options are its business.
Only the one operator at its end, which gets lists of tensors, is caught. What `kernels.adamw` can update is updated
there, and compared in the same pass; everything else by the operator itself, a few tensors at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from hubsync.kernels import adamw
from hubsync.kernels.adamw import LANES, Found, Room, Scalars
from hubsync.kernels.bits import bits_of
from hubsync.kernels.parallel import each

_OPERATORS = (torch._fused_adam_, torch._fused_adamw_)
_SETTINGS = ("lr", "beta1", "beta2", "weight_decay", "eps")
_LEAST = 1 << 16  # elements that are worth another thread

Tensors = list[torch.Tensor]
Operator = Callable[..., Any]
Part = tuple[list[np.ndarray], Scalars, int, int]


class Looker(Protocol):
    """Whoever looks at parameters before and after their update."""

    def update(self, parameters: Tensors) -> AbstractContextManager[None]:
        """Entered around the update of these parameters, which is the only one they get in this step."""

    def wants(self, parameter: torch.Tensor) -> bool:
        """Whether `found` is to be told how the bfloat16 view of this float32 parameter changes."""

    def found(self, parameter: torch.Tensor, found: Found) -> None:
        """A part of the parameter was updated."""


class FusedOperators(TorchFunctionMode):
    """While entered, has someone look at what fused operators do.

    Attributes:
        updated: ids of the parameters that operators were called for.
    """

    def __init__(self, looker: Looker, bucket: int):
        super().__init__()
        self.updated: set[int] = set()
        self._looker = looker
        self._bucket = bucket

    @staticmethod
    def run(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
        """Whether a step of this group of parameters comes down to such an operator."""
        on_cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
        return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and bool(group["fused"]) and on_cpu

    def __torch_function__(
        self, func: Operator, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _OPERATORS:
            return func(*args, **(kwargs or {}))
        return self._update(func, args, kwargs or {})

    def _update(self, operator: Operator, lists: Sequence[Any], options: dict[str, Any]) -> None:
        parameters = lists[0]
        self.updated.update(map(id, parameters))
        settings = _settings(operator, options)
        rows: list[tuple[int, Scalars]] = []
        rest: list[int] = []
        for number, parameter in enumerate(parameters):
            scalars = None
            if settings is not None and self._looker.wants(parameter) and _are_plain(_row(lists, number)):
                scalars = Scalars.of(lists[5][number].item(), **settings)
            if scalars is None:
                rest.append(number)
            else:
                rows.append((number, scalars))
        for bucket in buckets(rest, lambda number: parameters[number].numel(), self._bucket):
            with self._looker.update([parameters[number] for number in bucket]):
                operator(*[[column[number] for number in bucket] if column else column for column in lists], **options)
        parts = [(number, part) for number, scalars in rows for part in _parts(_row(lists, number), scalars)]
        for (number, _), found in zip(parts, _stepped([part for _, part in parts]), strict=True):
            self._looker.found(parameters[number], found)
        for number, _ in rows:
            if parameters[number].numel() % LANES == 0:
                continue
            found = _tail_stepped(operator, _row(lists, number), lists[5][number], options)
            self._looker.found(parameters[number], found)


def buckets(items: list[Any], size_of: Callable[[Any], int], most: int) -> Iterator[list[Any]]:
    """Cut a list where the sizes would add up to more than `most`; a larger item is a bucket of its own."""
    bucket: list[Any] = []
    held = 0
    for item in items:
        if bucket and held + size_of(item) > most:
            yield bucket
            bucket, held = [], 0
        bucket.append(item)
        held += size_of(item)
    if bucket:
        yield bucket


def _settings(operator: Operator, options: dict[str, Any]) -> dict[str, float] | None:
    """Those of the optimizer as numbers; None where it does other arithmetic than our kernel."""
    settings = {name: options.get(name) for name in _SETTINGS}
    others = [value for name, value in options.items() if name not in settings]
    if any(other is not None and other is not False for other in others):
        return None  # amsgrad, maximize, or a gradient scaler
    if operator is torch._fused_adam_ and settings["weight_decay"] != 0:
        return None
    if not all(isinstance(value, int | float) for value in settings.values()):
        return None
    if not adamw.is_torchs(operator) or (torch.get_num_threads() > 1 and _flushes_denormals()):
        return None
    return settings  # type: ignore[return-value]


def _flushes_denormals() -> bool:
    """Whether this thread takes the smallest numbers for zero: torch's threads and ours need not do as it does."""
    return bool(torch.tensor(1e-40, device="cpu") * 1 == 0)


def _row(lists: Sequence[Any], number: int) -> Tensors:
    """A parameter, its gradient and its two moments."""
    return [column[number] for column in lists[:4]]


def _are_plain(row: Tensors) -> bool:
    return all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
        and tensor.numel() == row[0].numel() >= LANES
        for tensor in row
    )


def _parts(row: Tensors, scalars: Scalars) -> Iterator[Part]:
    """Those that threads may update at the same time, but for the last elements that are too few for the kernel."""
    stop = row[0].numel() // LANES * LANES
    threads = min(torch.get_num_threads(), max(1, stop // _LEAST))
    size = -(-stop // (threads * LANES)) * LANES
    arrays = [tensor.detach().view(-1).numpy() for tensor in row]
    for start in range(0, stop, size):
        yield arrays, scalars, start, min(start + size, stop)


def _stepped(parts: list[Part]) -> list[Found]:
    """All of them, before anybody looks at a whole tensor."""
    room = Room()

    def stepped(part: Part) -> Found:
        (param, grad, mean, square), scalars, start, stop = part
        return adamw.step(param, grad, mean, square, scalars, start, stop, room)

    return each(stepped, parts)


def _tail_stepped(operator: Operator, row: Tensors, step: torch.Tensor, options: dict[str, Any]) -> Found:
    """The last elements, updated by torch: its code for what does not fill a vector rounds otherwise."""
    start = row[0].numel() // LANES * LANES
    param, grad, mean, square = (tensor.detach().view(-1)[start:] for tensor in row)
    before = param.bfloat16()
    operator([param], [grad], [mean], [square], [], [step], **options)
    old, new = bits_of(before), bits_of(param.bfloat16())
    if before.isnan().any() or param.isnan().any():
        return Found(np.empty(0, np.int64), old[:0], new[:0], [(start, old)])
    (at,) = (old != new).nonzero()
    return Found(start + at, old[at], new[at], [])
