"""What a sliced detector records in optimizer steps on a GPU: a list of changes on the device.

All tensors of a bucket are saved, compared and listed by one launch each, and nothing in a step waits for the device.
torch's fused Adam and AdamW update all parameters by one operator. It is intercepted and called for slices of the
parameters instead. Where our kernel gives torch's bits, it updates and compares in one pass.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hubsync.format.digest import DigestList
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import TORCH_DTYPES
from hubsync.kernels.gpu import adamw
from hubsync.kernels.gpu.listing import ChangeList, Listed
from hubsync.kernels.gpu.numbering import Numbering
from hubsync.publish.view.cast import cast, integers

from .device_live import DeviceLive, Memory, memory_of
from .device_warmup import compile_in_background
from .lost_updates import LostUpdates
from .recorder import Recorded

logger = logging.getLogger(__name__)

_BUCKETS = 16  # of a model, but of bounded size: elements that are updated together need 2.125 bytes each
_LEAST, _MOST = 1 << 24, 1 << 28

_KINDS = 8  # of steps, by the parameters that have gradients, whose buckets are kept

_FUSED = {torch.ops.aten._fused_adamw_.default, torch.ops.aten._fused_adamw_.tensor_lr}
_FUSED |= {torch.ops.aten._fused_adam_.default, torch.ops.aten._fused_adam_.tensor_lr}
_LISTS = 6  # of the operator's arguments: parameters, gradients, moments, largest second moments, steps


Lists = Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True)
class _Bucket:
    """Parts of parameters that are updated together.

    Attributes:
        ranges: their tiles.
        parts: entry of the operator's lists, first and last element; in the order of the ranges.
    """

    ranges: list[tuple[int, int]]
    parts: list[tuple[int, int, int]]

    def add(self, tiles: tuple[int, int], part: tuple[int, int, int]) -> None:
        if self.ranges and self.ranges[-1][1] == tiles[0]:
            self.ranges[-1] = (self.ranges[-1][0], tiles[1])
        else:
            self.ranges.append(tiles)
        self.parts.append(part)


class DeviceRecorder:
    """Changes as one list on a GPU.

    Args:
        table: the tensor table.
        optimizer: the one whose steps are observed.
        bucket: elements that are updated together; by default a sixteenth of the model.
        fuses: whether the kernel that updates and compares in one pass may be used, where it gives torch's bits.
    """

    def __init__(
        self,
        table: TensorTable,
        optimizer: torch.optim.Optimizer,
        bucket: int | None = None,
        fuses: bool = True,
    ):
        self._table = table
        self._splits = _is_fused(optimizer)
        self._elements = bucket or max(_LEAST, min(table.numel // _BUCKETS, _MOST))
        self.bucket = sys.maxsize if self._splits else self._elements
        self._fuses = fuses
        self.outgrown: set[int] = set()  # a list holds each element once: at most 8 bytes for it
        self._lost = LostUpdates()
        self._expected: list[torch.Tensor] = []  # elements of 16-bit parameters with a gradient, until it is reported
        self._submitted: Listed | None = None  # collected last
        self._order = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        self._buckets: dict[tuple[int, ...], list[_Bucket]] = {}
        self._usable: dict[Memory, int] = {}  # memory -> number of a live tensor, in this step
        self._live: DeviceLive | None = None

    def follow(self, live: Sequence[torch.Tensor], left_out: set[int]) -> None:
        """As in `Recorder`. `why_not_listed` must return None for all tensors that are not left out."""
        self._tensors = live
        if self._live is None:
            indices = [index for index in range(len(self._table)) if index not in left_out]
            self._live = DeviceLive(self._table, live, indices, self._order)
            self._list = ChangeList(self._live.numbering)
            held = self._live.wholes[0]
            fused = self._splits and self._fuses
            compile_in_background(held.device, held.dtype, self._live.dtypes[0], fused=fused)
        self._live.follow(live)
        self._live.leave_out(left_out)

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        return self._followed.spans[:, 0], self._followed.lanes()

    # --- steps --------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._followed.begin()

    @contextmanager
    def step(self) -> Iterator[None]:
        self._followed.forget()
        self._usable = self._followed.usable()
        self._list.begin()
        try:
            yield
        finally:
            self._list.end()
            self._report_lost()

    @contextmanager
    def update(self, parameters: list[torch.Tensor]) -> Iterator[None]:
        """List the changes of these parameters by their update."""
        watched = [p for p in parameters if p.grad is not None and memory_of(p) in self._usable]
        self._expect(watched)
        if self._splits:
            with _Intercepted(self._update_by_buckets):
                yield
            return
        with self._listed(self._numbering.ranges([self._usable[memory_of(p)] for p in watched])):
            yield

    def _update_by_buckets(self, operator: Callable[..., None], lists: Lists, options: dict[str, Any]) -> None:
        """Call torch's fused operator for some elements at a time."""
        numbers = [self._usable.get(memory_of(parameter), -1) for parameter in lists[0]]
        numbers = [n if n >= 0 and _is_row(lists, at) else -1 for at, n in enumerate(numbers)]
        whole = [_must_stay_whole(lists, at) for at in range(len(numbers))]
        others = [at for at, number in enumerate(numbers) if number < 0]
        if others:
            self._update_others(operator, lists, others, options)
        if len(others) == len(numbers):
            return
        fused = self._fused(operator, lists, numbers, options)
        key = (*numbers, *whole)
        if key not in self._buckets:
            if len(self._buckets) == _KINDS:
                self._buckets.clear()
            self._buckets[key] = _cut(self._numbering, numbers, whole, self._elements)
        for bucket in self._buckets[key]:
            if fused is not None:
                old, marks = self._list.room(bucket.ranges)
                fused.update(bucket.ranges, old, marks)
                self._list.append(bucket.ranges, old, marks)
            else:
                with self._listed(bucket.ranges):
                    operator(*_sliced(lists, bucket.parts), **options)

    def _update_others(
        self,
        operator: Callable[..., None],
        lists: Lists,
        others: list[int],
        options: dict[str, Any],
    ) -> None:
        """Parameters that are not followed, or whose gradient or state has another form: whole.

        They come first. What torch refuses is among them, and it refuses before it updates any of them.
        """
        known = [self._usable.get(memory_of(lists[0][at])) for at in others]
        watched = [number for number in known if number is not None]
        with self._listed(self._numbering.ranges(watched)):
            operator(*[[column[at] for at in others] if column else [] for column in lists], **options)

    @contextmanager
    def _listed(self, ranges: list[tuple[int, int]]) -> Iterator[None]:
        """List what changes in these tiles, also if the update fails half-way."""
        old = self._list.save(ranges)
        try:
            yield
        finally:
            self._list.compare(ranges, old)

    def _fused(self, operator: Any, lists: Lists, numbers: list[int], options: dict[str, Any]) -> adamw.AdamW | None:
        """The kernel that updates and compares in one pass, if it can do what the operator is asked to."""
        if not self._fuses or operator is not torch.ops.aten._fused_adamw_.default or lists[4]:
            return None
        if options.get("amsgrad") or options.get("maximize"):
            return None
        if options.get("grad_scale") is not None or options.get("found_inf") is not None:
            return None
        known = [at for at, number in enumerate(numbers) if number >= 0]
        columns = [[column[at] for at in known] for column in lists[:4]]
        if any(tensor.dtype != torch.float32 for column in columns for tensor in column):
            return None
        if not adamw.gives_torchs_bits(self._numbering.device):
            return None
        given = adamw.Options(
            options["lr"], options["beta1"], options["beta2"], options["weight_decay"], options["eps"]
        )
        steps = [lists[5][at] for at in known]
        return adamw.AdamW(self._numbering, [numbers[at] for at in known], columns[1:], steps, given)

    # --- publishing ---------------------------------------------------------------------------------

    def collect(self, before: DigestList) -> Recorded:
        if self._submitted is not None:  # it did not become durable
            self._list.insert(self._submitted)
        with self._followed.readable():
            found, after, added = self._followed.proved(self._list.collect)
        # In this order an interrupt loses nothing: what is in both is inserted again.
        self._submitted = Listed(found.numbers, found.old, found.new)
        self._list.clear()
        indices = found.spans[:, 0]
        return Recorded({}, found, indices, after, before.lanes[indices] + added)

    def advance(self) -> None:
        self._submitted = None

    def restorer(self) -> Callable[[int], torch.Tensor]:
        entries = self._list.entries()
        numbers, old = entries >> 16, entries.to(torch.int16)
        if self._submitted is not None:
            later = ~torch.isin(numbers, self._submitted.numbers)
            numbers = torch.cat([self._submitted.numbers, numbers[later]])
            old = torch.cat([self._submitted.old, old[later]])
        numbers, order = numbers.sort()
        old = old[order]
        spans = self._followed.spans
        firsts, sizes = torch.from_numpy(spans[:, 1:3].T.copy()).to(numbers.device)
        begins = torch.searchsorted(numbers, firsts).tolist()
        ends = torch.searchsorted(numbers, firsts + sizes).tolist()
        row_at = {index: row for row, index in enumerate(spans[:, 0].tolist())}

        def restored(index: int) -> torch.Tensor:
            row = row_at[index]
            tensor = cast(self._tensors[index], TORCH_DTYPES[self._table[index].dtype]).clone()
            own = slice(begins[row], ends[row])
            at = (numbers[own] - int(spans[row, 1])).to(tensor.device)
            integers(tensor)[at] = old[own].to(tensor.device)
            return tensor

        return restored

    @property
    def _followed(self) -> DeviceLive:
        assert self._live is not None, "nothing is followed yet"
        return self._live

    @property
    def _numbering(self) -> Numbering:
        return self._followed.numbering

    # --- lost updates ---------------------------------------------------------------------------------

    def _expect(self, watched: list[torch.Tensor]) -> None:
        if not self._lost.is_reported:
            small = [p.grad for p in watched if p.element_size() == 2 and p.grad is not None and not p.grad.is_sparse]
            self._expected += [torch.count_nonzero(grad) for grad in small]

    def _report_lost(self) -> None:
        if self._lost.is_reported or not self._expected:
            return
        self._lost.count(int(torch.stack(self._expected).sum()), self._list.length())
        self._expected = []
        self._lost.report()


class _Intercepted(TorchDispatchMode):
    """Hands calls of torch's fused Adam operators to a function: (operator, lists, options)."""

    def __init__(self, call: Callable[[Any, Sequence[Sequence[torch.Tensor]], dict[str, Any]], None]):
        super().__init__()
        self._call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _FUSED:
            return func(*args, **(kwargs or {}))
        return self._call(func, args[:_LISTS], kwargs or {})


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps of this optimizer are calls of a fused operator."""
    kind = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return kind and all(group.get("fused") for group in optimizer.param_groups)


def _is_row(lists: Lists, at: int) -> bool:
    """Whether parameter, gradient and state are flat runs of the same elements, of one dtype on one device."""
    parameter, *others = [column[at] for column in lists[:-1] if column]
    form = parameter.shape, parameter.dtype, parameter.device, torch.strided
    return parameter.is_contiguous() and all(
        (tensor.shape, tensor.dtype, tensor.device, tensor.layout) == form and tensor.is_contiguous()
        for tensor in others
    )


def _must_stay_whole(lists: Lists, at: int) -> bool:
    """Whether torch's operator would update slices of a parameter by other code than the whole of it.

    It has one form for vectors of 4 elements, and one for what is not aligned or not a multiple of 4. The compiler may
    contract them differently. Slices begin and end at multiples of 4 elements, so of an aligned tensor they take the
    same form.
    """
    columns = [column[at] for column in lists[:-1] if column]
    return columns[0].numel() % 4 != 0 or any(tensor.data_ptr() % 16 for tensor in columns)


def _cut(numbered: Numbering, numbers: Sequence[int], whole: Sequence[bool], elements: int) -> list[_Bucket]:
    """Parameters, given by their numbers (-1 for none), in buckets of `elements` or a little less.

    Args:
        whole: of each parameter, whether it must not be cut.
    """
    most = max(1, elements // numbered.tile)
    buckets: list[_Bucket] = []
    left = 0
    for at, number in sorted(enumerate(numbers), key=lambda pair: pair[1]):
        if number < 0:
            continue
        first, end = (int(bound) // numbered.tile for bound in numbered.first[number : number + 2])
        size, done = numbered.size_of(number), first
        while done < end:
            if left <= 0 or (whole[at] and end - first > left and buckets[-1].parts):
                buckets.append(_Bucket([], []))
                left = most
            stop = end if whole[at] else min(end, done + left)
            buckets[-1].add(
                (done, stop), (at, (done - first) * numbered.tile, min(size, (stop - first) * numbered.tile))
            )
            left -= stop - done
            done = stop
    return buckets


def _sliced(lists: Lists, parts: list[tuple[int, int, int]]) -> list[list[torch.Tensor]]:
    """The operator's lists for parts of the tensors. Steps are counted up already, once for each tensor."""

    def part(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return tensor if stop - start == tensor.numel() else tensor.detach().view(-1)[start:stop]

    columns = [[part(column[at], start, stop) for at, start, stop in parts] if column else [] for column in lists[:-1]]
    return [*columns, [lists[-1][at] for at, _, _ in parts]]
