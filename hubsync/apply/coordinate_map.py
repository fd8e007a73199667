"""The coordinate map: where every checkpoint element lives in the memory of a loaded model.

Only a model's own `load_weights` knows how its checkpoint is laid out at run time: which projections are fused, how
the vocabulary is padded, what is tied, which rows, columns and experts a rank holds. So the map is built by a dry run
of it (`dry_run`) that writes nothing. A dry run cannot see a layout that was changed *after* loading. Where the engine
names the function that changed it (`LayoutHints`), the function is applied to element numbers, and the map follows.
Other changes are found by reading the weights back through the map: their digest is no version of the run.

One rank's map covers the elements that this rank holds, some perhaps twice (a draft model with its own embedding).
`vote.join` checks that all ranks together hold every element.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hubsync.errors import ReplicaRefused
from hubsync.format.table import TensorTable

from .copies import find_copies
from .dry_run import DryRun
from .live import (
    Address,
    LayoutHints,
    LiveStorage,
    Relayout,
    class_of,
    find_addresses,
    find_relayout,
    find_storages,
    first_moved,
    named_tensors,
)
from .regions import Region, overlap
from .vote import RELOAD

logger = logging.getLogger("vllm.hubsync")

_ATTEMPTS = 8  # tensors that may stop a loader before the whole model is refused


@dataclass
class CoordinateMap:
    """For every tensor of the table, the regions of this process's memory that hold elements of it.

    Attributes:
        table: the run's tensor table.
        storages: live memory, by `Region.storage`.
        regions: by table index; empty where this rank holds nothing of a tensor.
        refused: table index -> why the tensor's elements cannot be followed in place; it has no regions.
        unloadable: those of them that the model's loader no longer takes, as the model is now.
        refreshers: storage number -> derived parameters to compute again after a write to it (keys of `hints.derived`).
        hints: as given to `build_map`.
        static: numbers of the storages of parts that the run does not have (`LayoutHints.apart`), such as towers where
            only the text model is trained. They stay as they were loaded.
    """

    table: TensorTable
    storages: list[LiveStorage]
    regions: list[tuple[Region, ...]]
    refused: dict[int, str]
    unloadable: frozenset[int]
    refreshers: dict[int, tuple[str, ...]]
    hints: LayoutHints
    addresses: list[Address] = field(repr=False)
    static: frozenset[int] = frozenset()

    def moved(self) -> str | None:
        """Name of a mapped parameter that is no longer where it was when the map was built, or None."""
        return first_moved(self.addresses)

    def layout(self) -> dict[str, dict[str, object]]:
        """For every tensor that this rank holds: its `class` (affine, table, relayout or refused), `elements` here and,
        for a refused one, the `reason`."""
        answer: dict[str, dict[str, object]] = {}
        for index, (spec, regions) in enumerate(zip(self.table, self.regions, strict=True)):
            if index in self.refused:
                answer[spec.name] = {"class": "refused", "elements": 0, "reason": self.refused[index]}
            elif regions:
                elements = sum(region.numel for region in regions)
                answer[spec.name] = {"class": class_of(regions, self.storages), "elements": elements, "reason": None}
        return answer


@torch.no_grad()
def build_map(models: Sequence[torch.nn.Module], table: TensorTable, hints: LayoutHints | None = None) -> CoordinateMap:
    """Map every element of `table` that lives in `models` (the served one, and a draft) by dry runs of `load_weights`.

    Writes nothing, and may run while another thread runs forward passes. Tensors that cannot be followed exactly are
    in `refused`.

    Raises:
        ReplicaRefused: the models as a whole cannot be followed: a loader that fails or writes unseen, a parameter that
            no tensor of the run feeds, elements that share a place.
    """
    hints = hints or LayoutHints()
    addresses, storages = find_addresses(models), find_storages(models)
    samples = [storage.sample() for storage in storages]
    run, unloadable = DryRun(table, storages), set()
    for model in models:
        run, skipped = _load(model, run, table, storages)
        unloadable |= skipped
    if (name := first_moved(addresses)) is not None:
        raise ReplicaRefused(
            f"{name}: the model's load_weights replaces this parameter instead of filling it. {RELOAD}"
        )
    for storage, sample in zip(storages, samples, strict=True):
        if not torch.equal(storage.sample(), sample):
            raise ReplicaRefused(
                f"{storage.name}: the dry run of load_weights changed live weights; restart this server"
            )
    for number in run.widened:
        storages[number].widen()
    regions = [() if index in run.refused else _distinct(found) for index, found in enumerate(run.regions)]
    _relay(storages, models, hints)
    # Buffers that the run does not feed are the model's own: it may replace them (a rotary cache in another dtype).
    fed = {name for found in regions for region in found for name in storages[region.storage].names}
    coordinates = CoordinateMap(
        table,
        storages,
        regions,
        run.refused,
        frozenset(unloadable),
        _refreshers(storages, hints),
        hints,
        [address for address in addresses if address.name in fed],
    )
    if not run.refused:  # else the refusal is the better explanation
        coordinates.static = _static(coordinates, _check_targets(coordinates, run.filled))
    _refuse_copies(coordinates, models)
    return coordinates


def _load(
    model: torch.nn.Module, before: DryRun, table: TensorTable, storages: list[LiveStorage]
) -> tuple[DryRun, set[int]]:
    """Run the loader of one more model. A tensor that stops it is refused, and the others are tried without it.

    Returns:
        (the dry run of all models so far, the tensors that stopped the loader).
    """
    skipped: dict[str, str] = {}
    for _ in range(_ATTEMPTS):
        run = DryRun(table, storages)
        run.regions = [list(found) for found in before.regions]
        run.filled, run.refused = list(before.filled), dict(before.refused)
        run.widened, run.exact = set(before.widened), set(before.exact)
        try:
            with run:
                model.load_weights(run.probes(frozenset(skipped)))  # type: ignore[operator]
        except Exception as error:
            # A loader may buffer tensors: the one it took last is not always the one that stopped it.
            if run.last is None or run.last in skipped:
                raise ReplicaRefused(f"the model's load_weights took no tensor: {_explain(error)}") from error
            known = run.refused.get(table.index_of(run.last))
            skipped[run.last] = known or f"the model's load_weights stopped after taking it: {_explain(error)}"
            continue
        for name, reason in skipped.items():
            run.refused.setdefault(table.index_of(name), reason)
        return run, {table.index_of(name) for name in skipped}
    name, reason = next(iter(skipped.items()))
    raise ReplicaRefused(f"{name}: {reason}")


def _explain(error: Exception) -> str:
    cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return (
        f"{cause} (another model than the run's: start the server from the run's base model; or a layout that was "
        "changed after loading: choose other kernels, such as --moe-backend triton on GPUs)"
    )


def _distinct(regions: Sequence[Region]) -> tuple[Region, ...]:
    """Drop repeats: a draft model that shares a parameter with its target loads it once more to the same place."""
    return tuple({(region.storage, region.source_key, region.target_extent): region for region in regions}.values())


def _relay(storages: Sequence[LiveStorage], models: Sequence[torch.nn.Module], hints: LayoutHints) -> None:
    """Find the permutation of every parameter that was relaid after loading; equal ones are shared."""
    parameters = {name: tensor for model in models for name, tensor in model.named_parameters(remove_duplicate=False)}
    found: dict[object, Relayout] = {}
    for storage in storages:
        transform = next((hints.relayouts[name] for name in storage.names if name in hints.relayouts), None)
        if transform is None:
            continue
        parameter = parameters[storage.name]
        key = transform, tuple(parameter.shape), parameter.dtype, storage.widened
        try:
            relayout = found.get(key) or find_relayout(transform, parameter)
        except ReplicaRefused as error:
            raise ReplicaRefused(f"{storage.name}: {error}") from None
        if storage.widened and key not in found:
            relayout = relayout.in_halves()
        found[key] = storage.relayout = relayout


def _refreshers(storages: Sequence[LiveStorage], hints: LayoutHints) -> dict[int, tuple[str, ...]]:
    """Storage number -> derived parameters that depend on it. One that only views its source needs no refreshing."""
    by_name = {name: number for number, storage in enumerate(storages) for name in storage.names}
    refreshers: dict[int, tuple[str, ...]] = {}
    for name, derived in hints.derived.items():
        for source in derived.sources:
            number = by_name.get(source)
            if number is not None and by_name.get(name, number) != number:
                refreshers[number] = (*refreshers.get(number, ()), name)
    return refreshers


# --- checks -----------------------------------------------------------------------------------------


def _check_targets(coordinates: CoordinateMap, filled: Sequence[int]) -> list[int]:
    """No live element is fed twice, and every element of a parameter that is fed at all is fed, derived, or is padding.

    Returns:
        numbers of the storages with parameters that nothing feeds.
    """
    unfed = []
    landed: list[list[tuple[str, Region]]] = [[] for _ in coordinates.storages]
    for spec, regions in zip(coordinates.table, coordinates.regions, strict=True):
        for region in regions:
            landed[region.storage].append((spec.name, region))
    for number, (storage, pairs, padding) in enumerate(zip(coordinates.storages, landed, filled, strict=True)):
        targets = [region for _, region in pairs]
        if overlap(targets, "target", len(storage.bits)):
            names = ", ".join(dict.fromkeys(name for name, _ in pairs))
            raise ReplicaRefused(f"{names}: two elements land in one place of {storage.name}. {RELOAD}")
        fed = padding + sum(region.numel for region in targets)
        if (
            not storage.parameter
            or fed >= storage.used
            or not coordinates.hints.derived.keys().isdisjoint(storage.names)
        ):
            continue
        if targets and storage.holds_zero_outside(targets):  # padding that was added after loading
            continue
        if fed:
            raise _not_fed(storage, f"only {fed} of {storage.used} elements")
        unfed.append(number)
    return unfed


def _not_fed(storage: LiveStorage, part: str) -> ReplicaRefused:
    return ReplicaRefused(
        f"{storage.name}: the tensors of the run feed {part} of this parameter of the served model. "
        "Start the server from the run's base model or one of its anchors, without options that add weights"
    )


def _static(coordinates: CoordinateMap, unfed: Sequence[int]) -> frozenset[int]:
    """Storages that stay as they were loaded. ReplicaRefused if the run should feed one of them."""
    fed = {
        name for found in coordinates.regions for region in found for name in coordinates.storages[region.storage].names
    }
    parts = [names for names in coordinates.hints.apart if names.isdisjoint(fed)]
    for number in unfed:
        storage = coordinates.storages[number]
        if not any(names.issuperset(storage.names) for names in parts):
            raise _not_fed(storage, "no element")
    if unfed:
        first = coordinates.storages[unfed[0]].name
        logger.info("hubsync: %d parameters are not in the run, and stay as they are: %s, ...", len(unfed), first)
    return frozenset(unfed)


def _refuse_copies(coordinates: CoordinateMap, models: Sequence[torch.nn.Module]) -> None:
    """Nothing that forward passes may read holds values of a followed parameter in memory that no commit writes."""
    fed = {region.storage for regions in coordinates.regions for region in regions}
    refreshed = {name for names in coordinates.refreshers.values() for name in names}
    followed, written = set(), []
    for number, storage in enumerate(coordinates.storages):
        is_derived = not refreshed.isdisjoint(storage.names)
        if is_derived or number in fed or (storage.parameter and number not in coordinates.static):
            written.append(storage.bits)
            followed |= set() if is_derived else set(storage.names)
    named = {name: tensor for name, tensor in named_tensors(models).items() if name in followed}
    copies = find_copies(coordinates.hints.reachable(), named, written)
    if copies:
        first, others = copies[0], f" (and {len(copies) - 1} more)" if len(copies) > 1 else ""
        raise ReplicaRefused(
            f"{first.path}: this server computes with a copy of {first.source} there{others}, which a commit would not "
            "change. Start it with another kernel (--attention-backend, --moe-backend, --linear-backend), or write "
            "versions with `hubsync pull` and restart servers from them"
        )
