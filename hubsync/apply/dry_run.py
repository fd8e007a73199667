"""Dry run of a model's own `load_weights`, on probes instead of tensors: every write is recorded and none is made.

Probes are meta tensors with the names, shapes and dtypes of the run's tensor table and no data. Slicing a meta tensor
only moves its offset and strides. So when the loader finally copies a probe into a parameter, (offset, sizes, strides)
on both sides tell exactly which elements would have gone where. A dispatch mode intercepts that copy, records it, and
writes nothing into the model. It also blocks any other write to memory that existed before, so a model in service can
be mapped.

Anything but a bit-exact move of elements makes its tensor *refused*, with the reason, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hubsync.format.table import TensorTable
from hubsync.kernels.bits import TORCH_DTYPES

from .live import LiveStorage, places_of
from .regions import Region, Scatter, block

aten = torch.ops.aten

# Operations that only move elements. On probes they run on element numbers instead of elements.
_MOVES = frozenset(
    {
        aten.cat.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.flip.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.repeat.default,
        aten.roll.default,
        aten.stack.default,
    }
)
_FILLS = frozenset({aten.zero_.default, aten.fill_.Scalar})
_NOTHING = -1  # element number of padding that a loader adds


class DryRun(TorchDispatchMode):
    """Intercepts tensor operations of this thread; records copies of probes into live memory instead of making them.

    Attributes:
        regions: by table index, where the loader would have put each element.
        filled: elements of each storage that the loader sets to a constant.
        widened: numbers of the float32 storages that take bfloat16 elements. A bfloat16 pattern is the upper half of
            the float32 with the same value. Their regions are in halves of elements: element i is half 2 i + 1.
        exact: numbers of the storages that take elements in their own dtype.
        refused: table index -> why that tensor cannot be mapped; its entry in `regions` is meaningless.
        last: name of the tensor that the loader took last.
    """

    def __init__(self, table: TensorTable, storages: Sequence[LiveStorage]):
        super().__init__()
        self.regions: list[list[Region]] = [[] for _ in table]
        self.filled = [0] * len(storages)
        self.refused: dict[int, str] = {}
        self.widened: set[int] = set()
        self.exact: set[int] = set()
        self.last: str | None = None
        self._table = table
        self._storages = storages
        self._by_address = {
            storage.bits.untyped_storage().data_ptr(): number for number, storage in enumerate(storages)
        }
        self._origins: dict[int, _Origin] = {}
        self._own: dict[int, torch.Tensor] = {}  # made by the loader itself, which may write to them
        # One numbering for all elements of all tensors, so that a loader may also concatenate tensors.
        self._starts = np.cumsum([0, *(spec.numel for spec in table)])

    def probes(self, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, probe) of every tensor of the table but those named."""
        for index, spec in enumerate(self._table):
            if spec.name in without:
                continue
            self.last = spec.name
            probe = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")
            self._remember(_Origin(probe, (index,)))
            yield spec.name, probe

    def refuse_last(self, reason: str) -> None:
        """The tensor that the loader took last cannot be mapped."""
        if self.last is not None:
            self.refused.setdefault(self._table.index_of(self.last), reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        probes = [leaf for leaf in tree_leaves((args, kwargs)) if self._origin(leaf) is not None]
        for tensor in written:
            if self._live(tensor) is not None:
                self._write(func, args, tensor)
                return tensor
        if probes and written:
            return self._write_elsewhere(func, probes, written)
        if any(tensor.numel() and _identity(tensor) not in self._own for tensor in written):
            self.refuse_last(f"its loader writes to a tensor that is no parameter of the model ({func})")
            return written[0]
        if probes:
            return self._derive(func, args, kwargs, probes)
        out = func(*args, **kwargs)
        self._adopt(out, (args, kwargs))
        return out

    # --- writes to live memory

    def _write(self, func: Any, args: tuple, target: torch.Tensor) -> None:
        number = self._live(target)
        assert number is not None
        if func is aten.copy_.default and self._origin(args[1]) is not None:
            self._record(number, target, args[1])
        elif func in _FILLS:
            self._fill(number, target, "its loader overwrites part of it with a constant")
        elif target.numel():
            reason = f"its loader computes its values ({func}) instead of copying them"
            self.refuse_last(reason)
            self._refuse_overwritten(number, target, reason)

    def _record(self, number: int, target: torch.Tensor, probe: torch.Tensor) -> None:
        origin, storage = self._origin(probe), self._storages[number]
        assert origin is not None
        if origin.discarded:
            self._fill(number, target, "its loader overwrites part of it with a constant")
            return
        published = torch.bfloat16 if origin.widened else probe.dtype
        widens = published == torch.bfloat16 and target.dtype == storage.dtype == torch.float32
        if not widens and not published == target.dtype == storage.dtype:
            self._refuse([probe], f"it is {published} in the run and {storage.dtype} in {storage.name}")
            return
        if target.numel() == 0 or origin.spoilt:
            return
        if number in (self.exact if widens else self.widened):
            self._refuse([probe], f"{storage.name} also takes tensors that are published in another dtype")
            return
        (self.widened if widens else self.exact).add(number)
        probe = probe.expand(target.shape)
        region: Region | None = None
        if origin.elements is None:
            source, place, strides = int(probe.storage_offset()), int(target.storage_offset()), target.stride()
            if widens:
                place, strides = 2 * place + 1, tuple(2 * stride for stride in strides)
            region = block(number, target.shape, source, probe.stride(), place, strides)
        if region is not None:
            self.regions[origin.tensors[0]].append(region)
        else:
            self._scatter(number, target, self._numbers(probe), probe)

    def _places_of(self, number: int, target: torch.Tensor) -> np.ndarray:
        """Offsets of a live tensor's elements, as regions of its storage count them."""
        places = places_of(target)
        return 2 * places + 1 if number in self.widened else places

    def _scatter(self, number: int, target: torch.Tensor, numbers: torch.Tensor, probe: torch.Tensor) -> None:
        sources, targets = numbers.reshape(-1).numpy(), self._places_of(number, target)
        real = sources != _NOTHING
        self.filled[number] += int(np.count_nonzero(~real))
        order = np.argsort(sources[real], kind="stable")
        sources, targets = sources[real][order], targets[real][order]
        if len(np.unique(targets)) < len(targets):
            self._refuse([probe], f"two elements land in one place of {self._storages[number].name}")
            return
        bounds = np.searchsorted(sources, self._starts)
        for index in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[index], bounds[index + 1])
            if (np.diff(sources[part]) == 0).any():
                self.refused.setdefault(int(index), "the model keeps elements of it in more than one place")
                continue
            self.regions[index].append(Scatter(number, sources[part] - self._starts[index], targets[part]))

    def _fill(self, number: int, target: torch.Tensor, reason: str) -> None:
        """A constant: padding, unless it overwrites what was loaded before."""
        if target.numel() and not self._refuse_overwritten(number, target, reason):
            self.filled[number] += target.numel()

    def _refuse_overwritten(self, number: int, target: torch.Tensor, reason: str) -> bool:
        """Refuse every tensor that was loaded into `target`. Returns whether there was one."""
        places = self._places_of(number, target)
        extent, found = (int(places.min()), int(places.max()) + 1), False
        for index, regions in enumerate(self.regions):
            for region in regions:
                if region.storage != number or not _intersect(region.target_extent, extent):
                    continue
                if np.intersect1d(region.offsets(np.arange(region.numel)), places).size:
                    self.refused.setdefault(index, reason)
                    found = True
        return found

    # --- operations on probes

    def _write_elsewhere(self, func: Any, probes: list[torch.Tensor], written: list[torch.Tensor]) -> torch.Tensor:
        """A write that involves probes and no live memory."""
        origin = self._origin(written[0])
        if func in _FILLS and origin is not None and written[0].numel() == origin.tensor.numel():
            # This rank does not load it: the bias of a row-parallel layer belongs to rank 0 alone.
            self._remember(_Origin(origin.tensor, origin.tensors, origin.elements, discarded=True))
        else:
            self._refuse(probes, f"the loader stores it in a tensor that is no parameter of the model ({func})")
        return written[0]

    def _derive(self, func: Any, args: tuple, kwargs: dict, probes: list[torch.Tensor]) -> Any:
        if func is aten._to_copy.default and (kwargs.get("dtype") or probes[0].dtype) == probes[0].dtype:
            return probes[0].detach()  # to another device
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            self._refuse(probes, f"the loader needs its values ({func}: {error})")
            raise
        results = tree_leaves(out)
        if results and all(self._origin(leaf) and leaf.dtype == probes[0].dtype for leaf in results):
            return out  # a view
        if func in _MOVES:
            return self._moved(func, args, kwargs, probes, out)
        if func is aten._to_copy.default and (probes[0].dtype, kwargs["dtype"]) == (torch.bfloat16, torch.float32):
            return self._widen(probes[0])
        if func is aten._to_copy.default:
            reason = f"the loader converts it from {probes[0].dtype} to {kwargs['dtype']}"
        else:
            reason = f"the loader computes with it ({func})"
        self._refuse(probes, reason)
        self._spoil(out, probes)
        return out

    def _widen(self, probe: torch.Tensor) -> torch.Tensor:
        """A bfloat16 probe as float32: the same numbers."""
        origin = self._origin(probe)
        assert origin is not None
        out = torch.empty(probe.shape, dtype=torch.float32, device="meta")
        if origin.spoilt or origin.discarded:
            self._spoil(out, [probe])
        else:
            numbers = self._numbers(probe).contiguous().reshape(-1)
            self._remember(_Origin(out, origin.tensors, numbers, widened=True))
        return out

    def _moved(self, func: Any, args: tuple, kwargs: dict, probes: list[torch.Tensor], out: Any) -> torch.Tensor:
        """The result of an operation of `_MOVES`: the same operation on element numbers."""
        if out.stride() == probes[0].stride() and out.shape == probes[0].shape and func is aten.clone.default:
            return probes[0].detach()  # same layout: probes are never written, so the copy can be the original
        origins = [origin for origin in map(self._origin, probes) if origin]
        if any(origin.spoilt or origin.discarded for origin in origins) or len({o.widened for o in origins}) > 1:
            self._spoil(out, probes)
            return out

        def numbers(leaf: Any) -> Any:
            return self._numbers(leaf) if self._origin(leaf) is not None else leaf

        args, kwargs = tree_map(numbers, args), tree_map(numbers, kwargs)
        kwargs.pop("memory_format", None)
        if func is aten.constant_pad_nd.default:
            args, kwargs = (*args[:2], _NOTHING), {}
        moved = func(*args, **kwargs).contiguous()
        self._remember(_Origin(out, self._tensors_of(probes), moved.reshape(-1), widened=origins[0].widened))
        return out

    def _numbers(self, probe: torch.Tensor) -> torch.Tensor:
        """Element numbers of a probe, int64 in its shape."""
        origin = self._origin(probe)
        assert origin is not None
        elements = origin.elements
        if elements is None:
            first = origin.tensors[0]
            elements = torch.arange(self._starts[first], self._starts[first + 1])
        return elements.as_strided(probe.shape, probe.stride(), probe.storage_offset())

    # --- bookkeeping

    def _remember(self, origin: _Origin) -> None:
        self._origins[_identity(origin.tensor)] = origin

    def _spoil(self, out: Any, probes: list[torch.Tensor]) -> None:
        """Mark results computed from refused tensors: the loader may handle them, and they are not mapped."""
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._remember(_Origin(leaf, self._tensors_of(probes), spoilt=True))

    def _adopt(self, out: Any, inputs: Any) -> None:
        """New memory that an operation returns is the loader's own."""
        known = {_identity(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and _identity(leaf) not in known:
                self._own[_identity(leaf)] = leaf

    def _origin(self, leaf: Any) -> _Origin | None:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_meta:
            return None
        return self._origins.get(_identity(leaf))

    def _live(self, tensor: torch.Tensor) -> int | None:
        if tensor.is_meta or tensor.layout != torch.strided:
            return None
        return self._by_address.get(tensor.untyped_storage().data_ptr())

    def _tensors_of(self, probes: list[torch.Tensor]) -> tuple[int, ...]:
        """Table indices of the tensors that these probes hold elements of."""
        origins = [origin for origin in map(self._origin, probes) if origin is not None]
        return tuple(dict.fromkeys(index for origin in origins for index in origin.tensors))

    def _refuse(self, probes: list[torch.Tensor], reason: str) -> None:
        for index in self._tensors_of(probes):
            self.refused.setdefault(index, reason)


@dataclass(frozen=True)
class _Origin:
    """The elements that a meta tensor's storage stands for.

    Attributes:
        tensor: keeps the storage alive, so that its identity stays unique.
        tensors: table indices of the tensors whose elements it holds.
        elements: element number (over all tensors) of every element of the storage; None for a table tensor itself,
            whose element p is element p of the storage.
        discarded: the loader set it to a constant, because its values are not for this rank.
        spoilt: its values were computed: wherever it goes, it is not mapped.
        widened: it is the float32 form of a bfloat16 tensor.
    """

    tensor: torch.Tensor
    tensors: tuple[int, ...]
    elements: torch.Tensor | None = None
    discarded: bool = False
    spoilt: bool = False
    widened: bool = False


def _intersect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _identity(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, also for meta tensors, which have no address."""
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Tensors that an operation writes to, by its schema."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return written
