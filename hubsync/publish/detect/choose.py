"""Choosing the detector: the sliced one wherever it is exact, otherwise a snapshot."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch

from hubsync import kernels
from hubsync.errors import ConfigError
from hubsync.format.encoding import Encoding
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import TORCH_DTYPES
from hubsync.publish.config import SyncConfig
from hubsync.publish.view.shards import Shard, local_part
from hubsync.publish.view.strided import StridedView, whole_of

from .base import Detector
from .sliced import Sliced
from .snapshot import Snapshot
from .stepping import unwrapped, why_not

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


def choose_detector(
    tensors: Tensors,
    table: TensorTable,
    optimizer: Any,
    config: SyncConfig,
    *,
    shards: Sequence[Shard] | None = None,
    has_adapter: bool = False,
) -> Detector:
    """The detector that `config.detector` asks for. With "auto", the sliced one wherever it is exact.

    Args:
        tensors: the live tensors.
        table: their table.
        optimizer: the optimizer or accelerate's wrapper of it, or None.
        config: its `detector`, `encoding` and `snapshot_device`.
        shards: table index -> the elements of the tensor that this process owns. None if it holds all tensors whole.
        has_adapter: the tensors are those of an adapter. They are small, and a snapshot is exact whatever writes them.

    Raises:
        ConfigError: `config.detector` is "sliced", and that cannot be exact.
    """
    if shards is not None and config.detector == "sliced":
        raise ConfigError(
            "detector='sliced' needs one process that holds the whole model, and here each rank holds a part: "
            "use detector='auto'"
        )
    keeps_old = has_adapter or Encoding(config.encoding).needs_base
    if shards is not None or config.detector == "snapshot" or (config.detector == "auto" and keeps_old):
        return _snapshot(tensors, table, config.snapshot_device, shards)
    reason = why_not_sliced(tensors, optimizer) or _mixed_dtypes(tensors, table)
    if reason is None:
        return _sliced(tensors, table, unwrapped(optimizer))
    if config.detector == "sliced":
        raise ConfigError(f"detector='sliced' cannot be exact here: {reason}. Use detector='snapshot'")
    if optimizer is not None:
        logger.info("keeping a copy of the published weights to detect changes: %s", reason)
    return _snapshot(tensors, table, config.snapshot_device)


def _sliced(tensors: Tensors, table: TensorTable, optimizer: torch.optim.Optimizer) -> Sliced:
    """The sliced detector, with a list of changes on the GPU if most weights are there."""
    # Buffers are compared with a copy in any case.
    buffers = {i for i, spec in enumerate(table) if not isinstance(whole_of(tensors[spec.name]), torch.nn.Parameter)}
    unlisted = _unlisted(tensors, table, buffers)
    if unlisted is None:
        return Sliced(tensors, table, optimizer)
    recorder = import_module("hubsync.publish.detect.device_recorder").DeviceRecorder(table, optimizer)
    return Sliced(tensors, table, optimizer, recorder, unlisted)


def _snapshot(tensors: Tensors, table: TensorTable, device: str, shards: Sequence[Shard] | None = None) -> Detector:
    """The snapshot detector, with the copy in one piece if most weights are on a GPU and the copy is too."""
    unlisted = None if device == "cpu" else _unlisted(tensors, table, set(), shards)
    if unlisted is None:
        return Snapshot(tensors, table, device, shards)
    made: Detector = import_module("hubsync.publish.detect.device_snapshot").DeviceSnapshot(
        tensors, table, unlisted, shards
    )
    return made


def _unlisted(
    tensors: Tensors, table: TensorTable, others: set[int], shards: Sequence[Shard] | None = None
) -> frozenset[int] | None:
    """Table indices of tensors whose changes cannot be listed on the GPU; None if the GPU should not be used."""
    live = {index: tensors[spec.name] for index, spec in enumerate(table) if index not in others}
    held = {index: local_part(whole_of(tensor)) for index, tensor in live.items()}
    if len({tensor.device for tensor in held.values()}) != 1 or not kernels.on_gpu(next(iter(held.values()))):
        return None
    why_not_listed = import_module("hubsync.publish.detect.device_live").why_not_listed  # imports Triton
    reasons = {}
    for index, tensor in live.items():
        shard = None if shards is None else shards[index]
        if (reason := why_not_listed(tensor, TORCH_DTYPES[table[index].dtype], shard)) is not None:
            reasons[index] = reason
    dtypes: dict[int, str] = {}
    for index, tensor in live.items():
        if dtypes.setdefault(id(whole_of(tensor)), table[index].dtype) != table[index].dtype:
            reasons[index] = "other parts of its parameter are published in another dtype"
    if 2 * sum(table[index].numel for index in reasons) > sum(table[index].numel for index in live):
        logger.info("not listing changes on the GPU: %s: %s", *_first(table, reasons))
        return None
    if reasons:
        logger.info("comparing %d tensors one by one: %s: %s", len(reasons), *_first(table, reasons))
    return frozenset(reasons)


def _first(table: TensorTable, reasons: dict[int, str]) -> tuple[str, str]:
    index = next(iter(reasons))
    return table[index].name, reasons[index]


def why_not_sliced(tensors: Tensors, optimizer: Any) -> str | None:
    """Why changes of these live tensors cannot be detected in the steps of this optimizer; None if they can."""
    if optimizer is None:
        return "there is no optimizer whose steps could be observed"
    reason = why_not(optimizer)
    if reason is not None:
        return reason
    held = {id(parameter) for group in unwrapped(optimizer).param_groups for parameter in group["params"]}
    if not any(id(whole_of(tensor)) in held for tensor in tensors.values()):
        return "the optimizer holds none of the model's parameters"
    for name, tensor in tensors.items():
        if isinstance(tensor, StridedView) and not tensor.place.is_contiguous:
            return f"{name} is scattered in the parameter that the optimizer updates"
        if tensor.requires_grad and id(whole_of(tensor)) not in held:
            return f"the optimizer does not hold {name}, which is trained: another optimizer may step it"
    return _overlap(tensors)


def _mixed_dtypes(tensors: Tensors, table: TensorTable) -> str | None:
    """A reason if the published parts of one parameter have several dtypes."""
    first: dict[int, TensorSpec] = {}
    for spec in table:
        known = first.setdefault(id(whole_of(tensors[spec.name])), spec)
        if known.dtype != spec.dtype:
            return f"{known.name} and {spec.name} are parts of one parameter and are published in two dtypes"
    return None


def _overlap(tensors: Tensors) -> str | None:
    """A reason if two tensors share memory: the update of one would be recorded for that tensor only."""
    extents = sorted(_extents(tensors.items()))
    for (_, end, name), (start, _, other) in itertools.pairwise(extents):
        if start < end:
            return f"{name} and {other} share memory without being one parameter"
    return None


def _extents(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[int, int, str]]:
    for name, held in tensors:
        tensor = local_part(held)
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            yield start, start + (last + 1) * tensor.element_size(), name
