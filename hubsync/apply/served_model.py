"""A served model: whole weights of one rank, followed in place by an `Applier`.

The live weights are mapped and their digest is looked up in the run, so a worker finds its own position whatever it was
started from. A version is staged as one patch of the live weights, or, where no deltas lead to it, as the difference to
a whole view (an anchor or the base checkpoint, with the deltas after it).
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from hubsync.chain import ChainReader, Plan
from hubsync.errors import ConfigError, HubsyncError, NoPath, ReplicaPoisoned, ReplicaRefused, RunMismatch, WrongParent
from hubsync.format.checkpoint import Checkpoint, Patched
from hubsync.format.digest import Digest, digest_view
from hubsync.format.manifest import Position
from hubsync.format.parts import open_anchor
from hubsync.format.view_bits import ViewBits

from .applier import Applier
from .background import Background
from .engine import ModelHost
from .gpu_places import read_on_gpu
from .protocol import error_from_json, error_to_json
from .sweep import Sweeper
from .vote import Inventory, SingleWorker, WorkerGroup

logger = logging.getLogger("vllm.hubsync")

DENSE_SHARE = 0.02
"""Share of the view's bytes that may be loaded whole at each commit without being asked for."""

# Elements looked at at once in idle moments: about a millisecond of one thread, and of a GPU much less.
_SLICE, _DEVICE_SLICE = 1 << 21, 1 << 24

CACHE_BYTES = 4 << 30
"""Downloads kept for other workers of the host and for healing."""


@dataclass(frozen=True)
class _Mapped:
    """What exists once the live weights are mapped."""

    host: ModelHost
    reader: ChainReader
    applier: Applier
    inventory: Inventory

    @property
    def replaced(self) -> bool:
        """Does the engine compute with other modules than those that are mapped?"""
        now = None if self.host.serving is None else self.host.serving()
        return now is not None and list(map(id, now)) != list(map(id, self.host.models))

    @cached_property
    def sweeper(self) -> Sweeper:
        return Sweeper(self.applier)

    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint on this machine. Only its digest tells whether it is the run's base."""
        if self.host.checkpoint is None:
            return None
        return Checkpoint(self.host.checkpoint, self.applier.table)

    @cached_property
    def _holds_base(self) -> bool:
        """Is the checkpoint on this machine version 0? Not where the server was started from an anchor."""
        checkpoint = self.checkpoint()
        assert checkpoint is not None
        try:
            checkpoint.check()
        except ConfigError:  # a tensor is missing, or has another shape
            return False
        return digest_view(self.applier.table, checkpoint).hex == self.reader.run().digest

    def unrounded(self) -> tuple[Position, list[str]] | None:
        """The version that the checkpoint on this machine is, and the tensors that were loaded from it unrounded.

        Checkpoints keep some tensors in float32, and models serve them so. A run whose trainer held them in bfloat16
        publishes them rounded. None if the live weights are not what a load of the checkpoint gives.
        """
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return None
        try:
            checkpoint.check()
        except ConfigError:  # a tensor is missing, or has another shape
            return None
        different = self.applier.live.differing(checkpoint)
        if not all(self.applier.live.holds_unrounded(name, checkpoint.as_stored(name)) for name in different):
            return None
        position = self.reader.find(digest_view(self.applier.table, checkpoint).hex)
        return None if position is None else (position, different)

    def plan(self, have: Position | None, target: Position) -> Plan:
        """The path from `have` to exactly `target`."""
        plan = self.reader.plan(have, to=target.version, base_available=self.host.checkpoint is not None)
        if plan.base and not self._holds_base:
            try:
                plan = self.reader.plan(have, to=target.version)
            except NoPath:
                pass  # continue with the checkpoint: the error about its digest names the problem
        return exactly(plan, target)

    def view(self, plan: Plan) -> Mapping[str, torch.Tensor]:
        """The whole view at the end of a plan that starts at an anchor or the base checkpoint."""
        table = self.applier.table
        start: Mapping[str, torch.Tensor] | None = self.checkpoint()
        if plan.anchor is not None:
            start = open_anchor(self.reader.fetch(plan.anchor), table)
        if start is None:
            raise NoPath(f"{plan.target} can only be reached from the base checkpoint, which is not on this machine")
        return Patched(start, table, self.reader.merged(plan.steps, ViewBits(table, start)))

    def stage_along(self, plan: Plan, reading: AbstractContextManager[Any], metrics: dict[str, float]) -> Plan:
        """Have the applier stage the end of a plan. Compact deltas are decoded against what this rank holds.

        Downloads come first: whoever waits for `reading` does not wait for the network.

        Args:
            metrics: receives `fetch_s`, with hashing, `decode_s` and `place_s`, of a path of deltas.
        """
        if plan.start is None:
            view = self.view(plan)
            with reading:
                self.applier.stage_view(view, plan.target)
            return plan
        with _timed(metrics, "fetch_s"):
            files = [self.reader.fetch(step.manifest) for step in plan.steps]
        with reading:
            with _timed(metrics, "decode_s"):
                live, old = self.applier.live, self.applier.old_bits()
                on_device = None if live.places is None else read_on_gpu(live, plan.steps, files, old)
                patch = self.reader.merged(plan.steps, old) if on_device is None else on_device
            with _timed(metrics, "place_s"):
                self.applier.stage_patch(patch, plan.target)
        return plan


class ServedModel:
    """`session.Served` of a whole model.

    Args:
        find_host: asked when attaching; raises a HubsyncError if this process cannot be served.
        group: the workers of this engine.
    """

    remedy = "Restart this server, from an anchor of the run if it has one"

    def __init__(self, find_host: Callable[[], ModelHost], group: WorkerGroup | None = None):
        self.metrics: dict[str, float] = {}
        self._find_host = find_host
        self._group = group or SingleWorker()
        self._mapped: _Mapped | None = None  # set once this rank has mapped its weights
        self._joined: Digest | None = None  # all ranks know what all hold: the digest of the whole view
        self._layout: dict[str, Any] | None = None

    @property
    def applier(self) -> Applier | None:
        """None before the weights are mapped."""
        return None if self._mapped is None else self._mapped.applier

    @property
    def run_id(self) -> str | None:
        mapped = self._mapped
        return None if mapped is None or mapped.applier.position is None else mapped.reader.run().run_id

    @property
    def position(self) -> Position | None:
        return None if self._mapped is None else self._mapped.applier.position

    @property
    def staged(self) -> Position | None:
        staged = None if self._mapped is None else self._mapped.applier.staged
        return None if staged is None else staged.target

    @property
    def mapped(self) -> bool:
        return self._mapped is not None

    @property
    def joined(self) -> bool:
        return self._joined is not None

    @property
    def verified(self) -> bool:
        return self._mapped is not None and self._mapped.applier.verified

    @property
    def poisoned(self) -> str | None:
        return None if self._mapped is None else self._mapped.applier.poisoned

    def details(self) -> dict[str, Any]:
        return {}

    def layout(self) -> dict[str, Any] | None:
        return self._layout

    # --- attach -------------------------------------------------------------------------------------

    def attach(self) -> None:
        if self._joined is None:
            self._mapped = None
            self._map()
        if self._joined is not None:
            self._locate()

    def _map(self) -> None:
        """Find out what this rank holds. A single rank has joined with that."""
        started = time.perf_counter()
        host = self._find_host()
        reader = host.source.open()
        run = reader.run()
        if run.adapter is not None:
            raise ReplicaRefused(
                "this run publishes a LoRA adapter: start the server with --enable-lora, --max-lora-rank "
                f"{run.adapter.config['r']} or more, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        applier = Applier(
            host.models,
            run.table,
            host.device,
            group=self._group,
            hints=host.hints,
            masters=Checkpoint(host.checkpoint, run.table) if host.checkpoint else None,
            dense_share=1.0 if host.dense_fallback else DENSE_SHARE,
        )
        self.metrics["map_s"] = time.perf_counter() - started
        self._layout = {"tensors": applier.layout(), "derived": applier.derived}
        self._mapped = _Mapped(host, reader, applier, applier.inventory())
        self.metrics["attach_s"] = time.perf_counter() - started
        logger.info("hubsync: mapped the model: %s", _summary(applier))
        if self._group.size == 1:
            self._joined = applier.join([self._mapped.inventory])

    def join(self, obstacle: HubsyncError | None) -> HubsyncError | None:
        mapped = self._mapped
        own = None if obstacle is None else error_to_json(obstacle)
        reports = self._group.gather((own, mapped.inventory if mapped else None))
        for rank, (error, _) in enumerate(reports):
            if error is not None:
                raise error_from_json(error, "" if self._group.size == 1 else f"rank {rank}: ")
        assert mapped is not None, "an obstacle otherwise"
        try:
            self._joined = mapped.applier.join([inventory for _, inventory in reports])
        except HubsyncError as mismatch:
            return mismatch
        return None

    def _locate(self) -> None:
        """Find the version of the run that the live weights of all ranks are."""
        mapped, digest = self._mapped, self._joined
        assert mapped is not None
        assert digest is not None
        position, stale = mapped.reader.find(digest.hex), []
        if position is None:
            position, stale = mapped.unrounded() or (None, [])
        if position is None:
            mismatch = RunMismatch(_explain_mismatch(mapped, digest.hex))
            if self._group.size == 1:
                self._mapped = self._joined = None  # another try maps again
            raise mismatch
        mapped.applier.live.prepare()
        mapped.applier.adopt(position)
        stale += mapped.applier.stale_parameters()
        if stale:
            mapped.applier.poison(
                f"{', '.join(stale[:3])}: the server loaded values of another precision than the run's"
            )
        logger.info("hubsync: attached to run %s at %s", mapped.reader.run().run_id, position)

    # --- stage --------------------------------------------------------------------------------------

    def expect(self, target: Position) -> None:
        if self.poisoned is not None:
            raise ReplicaPoisoned(f"cannot stage {target}: {self.poisoned}; heal first")

    def stage(self, target: Position, reading: AbstractContextManager[Any]) -> int:
        self.expect(target)
        mapped = self._require_mapped()
        stage = functools.partial(mapped.stage_along, reading=reading, metrics=self.metrics)
        plan = mapped.reader.carry_out(lambda: mapped.plan(self.position, target), stage)
        mapped.reader.trim(CACHE_BYTES)
        return plan.nbytes

    def discard(self) -> None:
        self._require_mapped().applier.discard()

    # --- write --------------------------------------------------------------------------------------

    def commit(self, target: Position) -> int:
        return self._require_joined().commit(target)

    def undo(self) -> Position:
        return self._require_joined().undo()

    def doubt(self) -> None:
        self._require_mapped().applier.doubt()

    def verify(self) -> bool:
        mapped = self._require_mapped()
        if mapped.replaced:
            mapped.applier.poison("the server computes with other modules than those that hubsync has mapped")
        return mapped.applier.verify()

    def verify_slice(self) -> bool:
        mapped = self._require_mapped()
        if mapped.replaced:
            return self.verify()
        return mapped.sweeper.slice(_SLICE if mapped.host.device.type == "cpu" else _DEVICE_SLICE)

    def heal(self, background: Background) -> int:
        mapped, target = self._require_mapped(), self.position
        assert target is not None, "only weights with a position are healed"
        if mapped.replaced:
            host = self._find_host()
            mapped.applier.follow(host.models, host.hints)
            mapped = self._mapped = replace(mapped, host=host)
        with background.working:  # the reader serves one job, or healing, at a time
            view = mapped.reader.carry_out(lambda: mapped.plan(None, target), mapped.view)
            return mapped.applier.heal(view, target)

    def poison(self, reason: str) -> None:
        self._require_mapped().applier.poison(reason)

    # --- details ------------------------------------------------------------------------------------

    def _require_mapped(self) -> _Mapped:
        assert self._mapped is not None, "the session asks for the position first"
        return self._mapped

    def _require_joined(self) -> Applier:
        """The applier, for a collective. All ranks take the same branch here, or some would wait for the others."""
        if self._joined is None or self._mapped is None:
            raise ReplicaRefused("this worker has not attached; call hubsync_attach and wait until it is ready")
        return self._mapped.applier


def exactly(plan: Plan, target: Position) -> Plan:
    """The plan itself. WrongParent if the run's version of that number has another digest than `target`."""
    if plan.target != target:
        raise WrongParent(f"version {target.version} of the run has digest {plan.target.digest}, not {target.digest}")
    return plan


@contextmanager
def _timed(metrics: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    metrics[name] = time.perf_counter() - started


def _summary(applier: Applier) -> str:
    """Number of tensors of each class, for the log."""
    classes = Counter(str(row["class"]) for row in applier.layout().values())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(classes.items()))


def _explain_mismatch(mapped: _Mapped, digest: str) -> str:
    """Why the live weights are at no version of the run.

    They are never simply overwritten: a layout that was changed after loading would take checkpoint values without
    complaint, and the model would compute nonsense with them.
    """
    checkpoint = mapped.checkpoint()
    different = mapped.applier.live.differing(checkpoint) if checkpoint is not None else []
    if different:
        others = f" and {len(different) - 3} more" if len(different) > 3 else ""
        return (
            f"{', '.join(different[:3])}{others}: the live weights are not those of the checkpoint that was loaded; "
            "the server lays them out differently (packed, swizzled), or something has changed them"
        )
    base = mapped.reader.run().base
    origin = f"the run starts from {base.model}" if base.model else "the run starts from an anchor in the bucket"
    return (
        f"this server was not started from a version of the run in {mapped.host.source.bucket} (its weights have "
        f"digest {digest[:12]}); {origin}: start it from that, or from one of the run's anchors"
    )
