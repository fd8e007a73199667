"""The coordinate map: where every checkpoint element lives in the memory of a loaded model.

Only a model's own `load_weights` knows how its checkpoint is laid out at run time: which projections are fused, how
the vocabulary is padded, what is tied. So we ask it. `build_map` runs `load_weights` once on *probes*: meta tensors
with the names, shapes and dtypes of the run's tensor table and no data. Slicing a meta tensor only moves its offset and
strides, so when the loader finally copies a probe into a parameter, (offset, sizes, strides) on both sides say exactly
which elements would have gone where. A dispatch mode sees that copy, writes it down, and writes nothing into the model;
any other write to memory that existed before is stopped as well, so a model in service can be mapped.

What cannot be expressed as "this element goes there, bit for bit" is refused here, before anything depends on it:
arithmetic in a loader, a change of dtype, tensors the loader skips, parameters no tensor feeds, overlaps.
A layout changed *after* loading (packed or swizzled weights of the same shape) is invisible to a dry run. It is found
by reading the weights back through the map and comparing their digest with the run's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hubsync.bits import TORCH_DTYPES
from hubsync.errors import ReplicaRefused
from hubsync.table import TensorTable

from .regions import Region, Scatter, block, span

aten = torch.ops.aten

# Element size -> the dtype that bit patterns are viewed as.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

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
_SAMPLE = 1024  # elements per storage compared before and after the dry run
_NOTHING = -1  # element number of padding that a loader adds


class LiveStorage:
    """One piece of memory that holds parameters of the model.

    Attributes:
        names: every parameter and buffer name that lives in it; the first one is used in messages.
        bits: the whole storage as a flat integer tensor of the element's width, on the model's device. Writing to it
            writes to the model.
        dtype: dtype of the parameters in it.
        parameter: False if only buffers live in it.
    """

    def __init__(self, tensor: torch.Tensor):
        self.names: list[str] = []
        self.dtype = tensor.dtype
        self.parameter = False
        self._tenants: dict[tuple[int, int], int] = {}
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = tensor.detach().as_strided((length,), (1,), 0)
        self.bits = flat.view(INTEGERS[tensor.element_size()])

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """One more parameter or buffer that lives here; an alias of another adds only its name."""
        self.names.append(name)
        self.parameter |= isinstance(tensor, torch.nn.Parameter)
        self._tenants[tensor.data_ptr(), tensor.numel()] = tensor.numel()

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def used(self) -> int:
        """Elements that belong to a parameter or buffer; the storage may be longer."""
        return sum(self._tenants.values())

    def sample(self) -> torch.Tensor:
        """A few hundred bit patterns spread over the storage."""
        bits = self.bits
        return bits[:: max(1, len(bits) // _SAMPLE)].clone()


@dataclass
class CoordinateMap:
    """For every tensor of the table the regions of live memory that hold it.

    Attributes:
        table: the run's tensor table.
        storages: live memory, by `Region.storage`.
        regions: by table index; together the regions of a tensor hold each of its elements exactly once.
        addresses: of the parameters that are mapped.
    """

    table: TensorTable
    storages: list[LiveStorage]
    regions: list[tuple[Region, ...]]
    addresses: list[_Address] = field(repr=False)

    def moved(self) -> str | None:
        """Name of a mapped parameter that is no longer where it was when the map was built, or None."""
        return _moved(self.addresses)


@torch.no_grad()
def build_map(model: torch.nn.Module, table: TensorTable) -> CoordinateMap:
    """Map every element of `table` to live memory of `model`, by a dry run of `model.load_weights`.

    Writes nothing, and may run while another thread runs forward passes. ReplicaRefused, naming the tensor and the
    reason, if any tensor of the table cannot be mapped exactly or any parameter of the model would not be fed.
    """
    addresses = _addresses(model)
    storages = _storages(model)
    samples = [storage.sample() for storage in storages]
    run = _DryRun(table, storages)
    with run:
        _load(model, run)
    if (name := _moved(addresses)) is not None:
        raise ReplicaRefused(f"{name}: the model's load_weights replaces this parameter instead of filling it")
    for storage, sample in zip(storages, samples, strict=True):
        if not torch.equal(storage.sample(), sample):
            raise ReplicaRefused(
                f"{storage.name}: the dry run of load_weights changed live weights; restart this server"
            )
    regions = [tuple(found) for found in run.regions]
    # Buffers that the run does not feed are the model's own: it may replace them (a rotary cache in another dtype).
    fed = {name for found in regions for region in found for name in storages[region.storage].names}
    coordinates = CoordinateMap(table, storages, regions, [address for address in addresses if address.name in fed])
    _check_sources(coordinates)
    _check_targets(coordinates, run.filled)
    return coordinates


def _load(model: torch.nn.Module, run: _DryRun) -> None:
    try:
        model.load_weights(run.probes())  # type: ignore[operator]
    except ReplicaRefused:
        raise
    except Exception as error:
        # A loader may buffer tensors: the one it took last is where it stopped, not always what it disliked.
        where = f"stopped after taking {run.last}" if run.last else "took no tensor"
        raise run.refusal or ReplicaRefused(
            f"the model's load_weights {where}: {type(error).__name__}: {error}; "
            "is this the model that the run was trained on?"
        ) from error
    if run.refusal is not None:  # a loader may swallow what we raised
        raise run.refusal


class _DryRun(TorchDispatchMode):
    """Sees every tensor operation of this thread; records copies of probes into live memory instead of making them."""

    def __init__(self, table: TensorTable, storages: Sequence[LiveStorage]):
        super().__init__()
        self.regions: list[list[Region]] = [[] for _ in table]
        self.filled = [0] * len(storages)  # elements the loader sets to a constant, by storage
        self.last: str | None = None
        self.refusal: ReplicaRefused | None = None
        self._table = table
        self._storages = storages
        self._by_address = {
            storage.bits.untyped_storage().data_ptr(): number for number, storage in enumerate(storages)
        }
        self._origins: dict[int, _Origin] = {}
        self._own: dict[int, torch.Tensor] = {}  # what the loader made for itself; it may write to that
        # One numbering for all elements of all tensors, so that a loader may also concatenate tensors.
        self._starts = np.cumsum([0, *(spec.numel for spec in table)])

    def probes(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, spec in enumerate(self._table):
            self.last = spec.name
            probe = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")
            self._remember(_Origin(probe, index, None))
            yield spec.name, probe

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        probes = [leaf for leaf in tree_leaves((args, kwargs)) if self._origin(leaf) is not None]
        for tensor in written:
            if self._live(tensor) is not None:
                self._write(func, args, tensor)
                return tensor
        foreign = f"a tensor that is no parameter of the model ({func})"
        if probes and written:
            self._refuse(probes, f"the loader stores it in {foreign}")
        if any(tensor.numel() and _identity(tensor) not in self._own for tensor in written):
            self._refuse_text(f"{self.last}: its loader writes to {foreign}")
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
            self._fill(number, target)
        elif target.numel():
            self._refuse_text(
                f"{self._storages[number].name}: its loader computes its values ({func}) instead of copying"
            )

    def _record(self, number: int, target: torch.Tensor, probe: torch.Tensor) -> None:
        origin = self._origin(probe)
        assert origin is not None
        storage = self._storages[number]
        if probe.dtype != target.dtype or target.dtype != storage.dtype:
            self._refuse(
                [probe],
                f"it is {probe.dtype} in the run and {storage.dtype} in {storage.name}; serve it with the run's dtype",
            )
        if target.numel() == 0:
            return
        probe = probe.expand(target.shape)
        region = None
        if origin.elements is None:
            source, place = int(probe.storage_offset()), int(target.storage_offset())
            region = block(number, target.shape, source, probe.stride(), place, target.stride())
        if region is not None:
            self.regions[origin.index].append(region)
        else:
            self._scatter(number, target, self._numbers(probe))

    def _scatter(self, number: int, target: torch.Tensor, numbers: torch.Tensor) -> None:
        sources, targets = numbers.reshape(-1).numpy(), _places(target)
        real = sources != _NOTHING
        self.filled[number] += int(np.count_nonzero(~real))
        order = np.argsort(sources[real], kind="stable")
        sources, targets = sources[real][order], targets[real][order]
        if len(np.unique(targets)) < len(targets):
            self._refuse_text(f"{self.last}: two elements land in one place of {self._storages[number].name}")
        bounds = np.searchsorted(sources, self._starts)
        for index in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[index], bounds[index + 1])
            if (np.diff(sources[part]) == 0).any():
                self._refuse_text(f"{self._table[index].name}: the model keeps elements of it in more than one place")
            self.regions[index].append(Scatter(number, sources[part] - self._starts[index], targets[part]))

    def _fill(self, number: int, target: torch.Tensor) -> None:
        """A constant: padding, unless it overwrites what was loaded before."""
        if target.numel() == 0:
            return
        low = int(target.storage_offset())
        extent = low, low + span(target.shape, target.stride())
        for spec, regions in zip(self._table, self.regions, strict=True):
            for region in regions:
                if region.storage != number or not _intersect(region.target_extent, extent):
                    continue
                if np.intersect1d(region.offsets(np.arange(region.numel)), _places(target)).size:
                    self._refuse_text(f"{spec.name}: its loader overwrites part of it with a constant")
        self.filled[number] += target.numel()

    # --- operations on probes

    def _derive(self, func: Any, args: tuple, kwargs: dict, probes: list[torch.Tensor]) -> Any:
        if func is aten._to_copy.default:
            return self._converted(kwargs, probes[0])
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            self._refuse(probes, f"the loader needs its values ({func}: {error})")
        results = tree_leaves(out)
        if results and all(self._origin(leaf) and leaf.dtype == probes[0].dtype for leaf in results):
            return out  # a view
        if func not in _MOVES:
            self._refuse(probes, f"the loader computes with it ({func})")
        if out.stride() == probes[0].stride() and out.shape == probes[0].shape and func is aten.clone.default:
            return probes[0].detach()  # same layout: nobody writes to a probe, so the copy can be the original
        self._remember(_Origin(out, _NOTHING, self._moved(func, args, kwargs).reshape(-1)))
        return out

    def _converted(self, kwargs: dict, probe: torch.Tensor) -> torch.Tensor:
        """`.to(...)`: another device is fine, another dtype is arithmetic."""
        dtype = kwargs.get("dtype") or probe.dtype
        if dtype != probe.dtype:
            self._refuse(
                [probe], f"the loader converts it from {probe.dtype} to {dtype}; serve it with the run's dtype"
            )
        return probe.detach()

    def _moved(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        """Apply an operation of `_MOVES` to element numbers. Returns int64, contiguous."""

        def numbers(leaf: Any) -> Any:
            return self._numbers(leaf) if self._origin(leaf) is not None else leaf

        args, kwargs = tree_map(numbers, args), tree_map(numbers, kwargs)
        kwargs.pop("memory_format", None)
        if func is aten.constant_pad_nd.default:
            args, kwargs = (*args[:2], _NOTHING), {}
        return func(*args, **kwargs).contiguous()

    def _numbers(self, probe: torch.Tensor) -> torch.Tensor:
        """Element numbers of a probe, int64 in its shape."""
        origin = self._origin(probe)
        assert origin is not None
        elements = origin.elements
        if elements is None:
            elements = torch.arange(self._starts[origin.index], self._starts[origin.index + 1])
        return elements.as_strided(probe.shape, probe.stride(), probe.storage_offset())

    # --- bookkeeping

    def _remember(self, origin: _Origin) -> None:
        self._origins[_identity(origin.tensor)] = origin

    def _adopt(self, out: Any, inputs: Any) -> None:
        """New memory that came out of an operation is the loader's own."""
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

    def _refuse(self, probes: list[torch.Tensor], reason: str) -> NoReturn:
        names = []
        for probe in probes:
            origin = self._origin(probe)
            if origin is not None and origin.index != _NOTHING:
                names.append(self._table[origin.index].name)
        self._refuse_text(f"{', '.join(dict.fromkeys(names)) or self.last}: {reason}")

    def _refuse_text(self, message: str) -> NoReturn:
        self.refusal = self.refusal or ReplicaRefused(message)
        raise self.refusal


@dataclass(frozen=True)
class _Origin:
    """What a meta tensor's storage stands for.

    Attributes:
        tensor: keeps the storage alive, so that its identity stays unique.
        index: the table tensor whose element p is element p of the storage; `_NOTHING` if `elements` says it instead.
        elements: element number (over all tensors) of every element of the storage; None for a table tensor itself.
    """

    tensor: torch.Tensor
    index: int
    elements: torch.Tensor | None


# --- live memory ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Address:
    """Where a parameter or buffer is registered, and where its data was when the map was built."""

    owner: dict[str, Any]
    key: str
    name: str
    pointer: int


def _tensors(model: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, str, torch.Tensor]]:
    """(owner dictionary, key, full name, tensor) of every parameter and buffer, aliases included."""
    for prefix, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield owner, key, f"{prefix}.{key}" if prefix else key, tensor


def _addresses(model: torch.nn.Module) -> list[_Address]:
    return [
        _Address(owner, key, name, tensor.data_ptr())
        for owner, key, name, tensor in _tensors(model)
        if not tensor.is_meta
    ]


def _moved(addresses: list[_Address]) -> str | None:
    for address in addresses:
        tensor = address.owner.get(address.key)
        if tensor is None or tensor.data_ptr() != address.pointer:
            return address.name
    return None


def _storages(model: torch.nn.Module) -> list[LiveStorage]:
    """Distinct memory of all parameters and buffers."""
    found: dict[int, LiveStorage] = {}
    for _owner, _key, name, tensor in _tensors(model):
        if tensor.numel() == 0 or tensor.is_meta or tensor.element_size() not in INTEGERS:
            continue
        found.setdefault(tensor.untyped_storage().data_ptr(), LiveStorage(tensor)).add(name, tensor)
    return list(found.values())


# --- checks -----------------------------------------------------------------------------------------


def _check_sources(coordinates: CoordinateMap) -> None:
    """Every element of every tensor lands somewhere, exactly once."""
    for spec, regions in zip(coordinates.table, coordinates.regions, strict=True):
        mapped = sum(region.numel for region in regions)
        if mapped == 0 and spec.numel:
            raise ReplicaRefused(
                f"{spec.name}: the model's load_weights ignores it; it is tied to another tensor, "
                "or not part of the served model"
            )
        if mapped < spec.numel:
            raise ReplicaRefused(f"{spec.name}: the model's load_weights uses only {mapped} of {spec.numel} elements")
        extents = [region.source_extent for region in regions]
        if mapped > spec.numel or _overlap(extents, (r.indices(np.arange(r.numel)) for r in regions), spec.numel):
            raise ReplicaRefused(f"{spec.name}: the model keeps elements of it in more than one place")


def _check_targets(coordinates: CoordinateMap, filled: Sequence[int]) -> None:
    """No live element is fed twice, and every element of every parameter is fed, or is padding."""
    landed: list[list[tuple[str, Region]]] = [[] for _ in coordinates.storages]
    for spec, regions in zip(coordinates.table, coordinates.regions, strict=True):
        for region in regions:
            landed[region.storage].append((spec.name, region))
    for storage, pairs, padding in zip(coordinates.storages, landed, filled, strict=True):
        names = ", ".join(dict.fromkeys(name for name, _ in pairs))
        extents = [region.target_extent for _, region in pairs]
        targets = (region.offsets(np.arange(region.numel)) for _, region in pairs)
        if _overlap(extents, targets, len(storage.bits)):
            raise ReplicaRefused(f"{names}: two elements land in one place of {storage.name}")
        fed = padding + sum(region.numel for _, region in pairs)
        if storage.parameter and fed < storage.used:
            what = f"only {fed} of {storage.used} elements" if fed else "no element"
            raise ReplicaRefused(
                f"{storage.name}: the tensors of the run feed {what} of this parameter of the served model"
            )


def _overlap(extents: Sequence[tuple[int, int]], places: Iterable[np.ndarray], length: int) -> bool:
    """Do regions with these half-open extents share an element? Looks at the elements only if the extents overlap."""
    ordered = sorted(extents)
    if all(low >= high for (_, high), (low, _) in pairwise(ordered)):
        return False
    seen = np.zeros(length, dtype=bool)
    for elements in places:
        if seen[elements].any():
            return True
        seen[elements] = True
    return False


def _intersect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _identity(tensor: torch.Tensor) -> int:
    """Tells storages apart, also those of meta tensors, which have no address."""
    return int(tensor.untyped_storage()._cdata)


def _places(target: torch.Tensor) -> np.ndarray:
    """Offsets in its storage of every element of a view, int64, in row-major order."""
    first = target.storage_offset()
    offsets = torch.arange(int(first) + span(target.shape, target.stride()))
    return offsets.as_strided(target.shape, target.stride(), first).reshape(-1).numpy()


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Tensors that an operation writes to, by its schema."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return written
