"""One worker's life with one run: attach, stage in the background, commit, verify, heal.

Two threads meet here. The worker's *main* thread runs forward passes and answers requests; it commits, undoes and
heals, so a write never meets a forward pass. One *background* thread attaches, downloads, stages and verifies, one job
after the other, and only reads weights. A verification queued by a commit therefore always ends before anything that is
staged after it, and what is staged is always based on verified weights.

With several ranks the main threads of all of them get the same requests in the same order. That is what the collectives
in `join`, `commit` and `undo` rest on: whether one is made depends only on requests that all ranks had (`_joined`),
never on how far this rank's background thread is.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, Plan
from hubsync.errors import (
    ConfigError,
    FormatError,
    HubsyncError,
    NoPath,
    ReplicaPoisoned,
    ReplicaRefused,
    RunMismatch,
    WrongParent,
)
from hubsync.format.checkpoint import Checkpoint, Patched
from hubsync.format.digest import Digest, digest_view
from hubsync.format.keys import PublicKey
from hubsync.format.manifest import Position
from hubsync.format.parts import open_anchor
from hubsync.format.patch import Patch
from hubsync.format.view_bits import ViewBits

from .applier import Applier
from .background import Background
from .live import LayoutHints
from .protocol import WorkerState, error_from_json, error_to_json
from .vote import Inventory, SingleWorker, WorkerGroup

logger = logging.getLogger("vllm.hubsync")

_CACHE_BYTES = 4 << 30  # downloads kept for other workers of the host and for healing


@dataclass(frozen=True)
class Host:
    """What a session needs of the process that serves the model.

    Attributes:
        models: the loaded module, and a draft module whose weights are part of the same checkpoint.
        device: where their parameters are.
        bucket: address of the run.
        cache: directory for downloads; several workers may share it.
        checkpoint: directory of the safetensors checkpoint that was loaded, if it is on this machine. Where it is the
            run's base model it can take an anchor's place.
        ranks: the workers of this engine.
        hints: what the server knows of its layout.
        dense_fallback: may tensors that cannot be followed in place be loaded whole?
        public_key: documents of the run that it has not signed are refused; None takes all.
        max_head_age: see `ChainReader`.
    """

    models: tuple[torch.nn.Module, ...]
    device: torch.device
    bucket: str
    cache: Path
    checkpoint: Path | None
    ranks: WorkerGroup = field(default_factory=SingleWorker)
    hints: LayoutHints = field(default_factory=LayoutHints)
    dense_fallback: bool = False
    public_key: PublicKey | None = None
    max_head_age: float | None = None


@dataclass
class CommitWindow:
    """A commit that some client is driving: it has paused the server, or is about to."""

    position: Position
    token: str
    committed: bool
    opened: float

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.position.version,
            "digest": self.position.digest,
            "token": self.token,
            "committed": self.committed,
            "age_s": time.monotonic() - self.opened,
        }


@dataclass(frozen=True)
class _Attached:
    """What exists once the live weights are mapped."""

    host: Host
    reader: ChainReader
    applier: Applier
    inventory: Inventory

    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint on this machine. Whether it is the run's base is for the digest to say."""
        if self.host.checkpoint is None:
            return None
        return Checkpoint(self.host.checkpoint, self.applier.table)

    @cached_property
    def _holds_base(self) -> bool:
        """Is the checkpoint on this machine version 0? It is another where the server was started from an anchor."""
        checkpoint = self.checkpoint()
        assert checkpoint is not None
        try:
            checkpoint.check()
        except ConfigError:  # a tensor is missing, or has another shape
            return False
        return digest_view(self.applier.table, checkpoint).hex == self.reader.run().digest

    def plan(self, have: Position | None, target: Position) -> Plan:
        """The way from `have` to exactly `target`."""
        plan = self.reader.plan(have, to=target.version, base_available=self.host.checkpoint is not None)
        if plan.base and not self._holds_base:
            try:
                plan = self.reader.plan(have, to=target.version)
            except NoPath:
                pass  # then the digest of what it leads to says what is wrong
        if plan.target != target:
            raise WrongParent(
                f"version {target.version} of the run has digest {plan.target.digest}, not {target.digest}"
            )
        return plan

    def patch(self, plan: Plan) -> Patch:
        """All steps of a plan from the live weights, as one patch; of compact deltas what this rank holds."""
        return self.reader.merged(plan.steps, self.applier.old_bits())

    def view(self, plan: Plan) -> Mapping[str, torch.Tensor]:
        """The whole view that a plan leads to, from its anchor or the base checkpoint."""
        table = self.applier.table
        start: Mapping[str, torch.Tensor] | None = self.checkpoint()
        if plan.anchor is not None:
            start = open_anchor(self.reader.fetch(plan.anchor), table)
        if start is None:
            raise NoPath(f"{plan.target} can only be reached from the base checkpoint, which is not on this machine")
        return Patched(start, table, self.reader.merged(plan.steps, ViewBits(table, start)))


class Session:
    """State of one worker.

    Args:
        find_host: asked when attaching; raises a HubsyncError if this process cannot be served.
        ranks: the workers of this engine.

    Methods raise HubsyncErrors. All but `status` must be called on the thread that runs the forward passes.
    """

    def __init__(self, find_host: Callable[[], Host], ranks: WorkerGroup | None = None):
        self._find_host = find_host
        self.ranks = ranks or SingleWorker()
        self._mapped: _Attached | None = None  # this rank knows what it holds
        self._joined: Digest | None = None  # all ranks know what all hold: the digest of the whole view
        self._attached: _Attached | None = None  # and the position of that
        self._attaching = False
        self._wanted: Position | None = None  # being staged, or queued for it
        self._window: CommitWindow | None = None
        self._error: HubsyncError | None = None
        self._layout: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}
        self._background = Background()

    # --- what the requests do -----------------------------------------------------------------------

    @property
    def state(self) -> str:
        """detached, attaching, mapped, refused, ready, staging, staged, applied or poisoned."""
        if self._attached is None:
            if self._attaching:
                return WorkerState.ATTACHING
            if self._error:
                return WorkerState.REFUSED
            return WorkerState.DETACHED if self._mapped is None else WorkerState.MAPPED
        applier = self._attached.applier
        if applier.poisoned is not None:
            return WorkerState.POISONED
        if not applier.verified:
            return WorkerState.APPLIED
        if self._wanted is not None:
            return WorkerState.STAGING
        return WorkerState.READY if applier.staged is None else WorkerState.STAGED

    def status(self) -> dict[str, Any]:
        """What `hubsync_status` answers, as far as the session knows it."""
        answer: dict[str, Any] = {"state": self.state, "run_id": None, "version": None, "digest": None, "staged": None}
        window, error = self._window, self._error
        if self._attached is not None:
            applier, staged = self._attached.applier, self._attached.applier.staged
            answer["run_id"] = self._attached.reader.run().run_id
            answer |= _position_json(applier.position)
            answer["staged"] = _position_json(staged.target) if staged else None
            if applier.poisoned is not None and not isinstance(error, ReplicaPoisoned):
                error = ReplicaPoisoned(f"the weights are not known to be right: {applier.poisoned}")
        answer["window"] = window.to_json() if window else None
        answer["error"] = error_to_json(error) if error else None
        answer["metrics"] = dict(self._metrics)
        return answer

    def start(self) -> None:
        """Start finding out what this rank holds, if nobody has asked for that yet."""
        if self.state == WorkerState.DETACHED:
            self._begin(self._map)

    def attach(self) -> None:
        """Start finding out where the live weights are, unless that is known or under way. A refusal is tried again.

        A rank of several stops at `mapped`; `join` goes on.
        """
        if self.state not in (WorkerState.DETACHED, WorkerState.REFUSED):
            return
        if self._joined is None:
            self._mapped = None
        self._begin(self._map if self._joined is None else self._find)

    def join(self) -> None:
        """Let all ranks, which have mapped what they hold, find out together where the whole is. A collective.

        ReplicaRefused, on all ranks, if one has not mapped its part, or if the parts are no whole.
        """
        if self._joined is not None:
            return
        error = None if self._attaching else self._error
        mapped = None if self._attaching else self._mapped
        if mapped is None and error is None:
            error = ReplicaRefused(f"this worker is {self.state}; call hubsync_attach and wait until it is mapped")
        words = self.ranks.gather((error_to_json(error) if error else None, mapped.inventory if mapped else None))
        for rank, (said, _) in enumerate(words):
            if said is not None:
                raise error_from_json(said, "" if self.ranks.size == 1 else f"rank {rank}: ")
        assert mapped is not None
        try:
            self._joined = mapped.applier.join([inventory for _, inventory in words])
        except HubsyncError as mismatch:
            self._error = mismatch
            raise
        self._begin(self._find)

    def layout(self) -> dict[str, Any]:
        """Class of every tensor that this rank holds, and the parameters that are derived from others.

        Also where tensors were refused.
        """
        if self._layout is None:
            raise ReplicaRefused(f"this worker is {self.state}: it has not mapped its model")
        return self._layout

    def stage(self, target: Position) -> None:
        """Start staging the way from the current position to `target`, which replaces any other target."""
        applier = self._require().applier
        if applier.poisoned is not None:
            raise ReplicaPoisoned(f"cannot stage {target}: {applier.poisoned}; heal first")
        staged = applier.staged
        if self._wanted is None and target in (applier.position, staged.target if staged else None):
            return
        if self._wanted != target:
            self._error = None
            self._wanted = target
            self._background.submit(self._stage)

    def open(self, position: Position, token: str) -> None:
        """A client begins a commit window. Refused while another one is open."""
        applier, window = self._require().applier, self._window
        if window is not None and (window.token, window.position) != (token, position):
            age = time.monotonic() - window.opened
            raise ReplicaRefused(
                f"a commit window to {window.position} has been open for {age:.1f} s (token {window.token}); "
                "complete that one first"
            )
        if window is None:
            self._window = CommitWindow(position, token, applier.position == position, time.monotonic())

    def close(self, token: str) -> None:
        """The client has finished its window. Closing it again is fine; closing another client's is not."""
        window = self._window
        if window is not None and window.token != token:
            raise ReplicaRefused(f"the open commit window to {window.position} has another token ({window.token})")
        self._window = None

    def commit(self, target: Position) -> int:
        """Apply what all ranks have staged. Returns elements written. See `Applier.commit` for what it raises."""
        applier = self._require_joined()
        before, started = applier.position, time.perf_counter()
        try:
            changed = applier.commit(target)
        except WrongParent:
            self._doubt(applier)
            raise
        if applier.position != before:
            self._metrics["commit_s"] = time.perf_counter() - started
            self._metrics["changed"] = changed
            self._background.submit(self._verify)
        self._mark_window(target)
        return changed

    def undo(self) -> None:
        """Take the last commit back."""
        position = self._require_joined().undo()
        self._background.submit(self._verify)
        self._mark_window(position)

    def heal(self) -> None:
        """Rebuild poisoned weights from an anchor or the base checkpoint and the deltas after it, here and now.

        Raises:
            ReplicaRefused: the weights are fine.
            NoPath, BucketError, ...: it was not possible. Still poisoned.
        """
        attached = self._require()
        applier, target = attached.applier, attached.applier.position
        if applier.poisoned is None or target is None:
            raise ReplicaRefused("there is nothing to heal: the weights are not poisoned")
        logger.warning("hubsync: rebuilding the weights: %s", applier.poisoned)
        started = time.perf_counter()
        with self._background.working:  # the reader serves one job, or healing, at a time
            view = attached.reader.carry_out(lambda: attached.plan(None, target), attached.view)
            written = applier.heal(view, target)
        self._error = None
        self._metrics["heal_s"] = time.perf_counter() - started
        self._metrics["heals"] = self._metrics.get("heals", 0) + 1
        logger.warning("hubsync: the weights are those of %s again; %d elements were wrong", target, written)

    def weights_lost(self, reason: str) -> None:
        """Somebody else has replaced the weights; they are rebuilt before the next forward pass."""
        if self._attached is not None:
            self._attached.applier.poison(reason)

    def before_forward(self) -> None:
        """Keep a model from running with weights that are not known to be right.

        Called ahead of every forward pass, so its usual cost is one comparison. Poisoned weights are healed first, in
        place of the forward pass that waits for it; if that fails, ReplicaPoisoned goes up into the engine, which ends:
        no answer is better than one of unknown weights, and whoever watches the server starts it again.
        """
        if self._attached is None or self._attached.applier.poisoned is None:
            return
        reason = self._attached.applier.poisoned
        try:
            self.heal()
        except Exception as error:
            raise ReplicaPoisoned(
                f"refusing to run the model: {reason}; and its weights could not be rebuilt: "
                f"{type(error).__name__}: {error}. Restart this server, from an anchor of the run if it has one"
            ) from error

    # --- what the background thread does ------------------------------------------------------------

    def _begin(self, job: Callable[[], None]) -> None:
        self._attaching, self._error = True, None
        self._background.submit(job)

    def _map(self) -> None:
        """Find out what this rank holds. Where it is the only one, that is all there is to know."""
        started = time.perf_counter()
        try:
            host = self._find_host()
            bucket = open_bucket(host.bucket, key=host.public_key)
            reader = ChainReader(bucket, host.cache, max_head_age=host.max_head_age)
            run = reader.run()
            if run.adapter is not None:
                raise ReplicaRefused(
                    "this run publishes a LoRA adapter: start the server with --enable-lora, --max-lora-rank "
                    f"{run.adapter.config['r']} or more, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
                )
            masters = Checkpoint(host.checkpoint, run.table) if host.dense_fallback and host.checkpoint else None
            applier = Applier(host.models, run.table, host.device, ranks=self.ranks, hints=host.hints, masters=masters)
            self._metrics["map_s"] = time.perf_counter() - started
            self._layout = {"tensors": applier.layout(), "derived": applier.derived}
            self._mapped = _Attached(host, reader, applier, applier.inventory())
            self._metrics["attach_s"] = time.perf_counter() - started
            logger.info("hubsync: mapped the model: %s", _summary(applier))
            if self.ranks.size == 1:
                self._joined = applier.join([self._mapped.inventory])
                self._locate()
        except Exception as error:
            self._fail("could not attach", error)
        finally:
            self._attaching = False

    def _find(self) -> None:
        try:
            self._locate()
        except Exception as error:
            self._fail("could not attach", error)
        finally:
            self._attaching = False

    def _locate(self) -> None:
        """Find the version of the run that the live weights of all ranks are."""
        attached, digest = self._mapped, self._joined
        assert attached is not None
        assert digest is not None
        position = attached.reader.find(digest.hex)
        if position is None:
            mismatch = RunMismatch(_explain_mismatch(attached, digest.hex))
            if self.ranks.size == 1:
                self._mapped = self._joined = None  # another try looks again
            raise mismatch
        attached.applier.adopt(position)
        self._attached = attached
        logger.info("hubsync: attached to run %s at %s", attached.reader.run().run_id, position)

    def _stage(self) -> None:
        attached, target = self._attached, self._wanted
        if attached is None or target is None:
            return
        applier, started = attached.applier, time.perf_counter()
        try:
            if applier.poisoned is not None:
                raise ReplicaPoisoned(f"cannot stage {target}: {applier.poisoned}; heal first")
            plan = attached.reader.carry_out(
                lambda: attached.plan(applier.position, target), lambda plan: _stage_along(plan, attached)
            )
            self._metrics["stage_s"] = time.perf_counter() - started
            self._metrics["stage_bytes"] = plan.nbytes
            self._error = None
            attached.reader.trim(_CACHE_BYTES)
        except Exception as error:
            applier.discard()
            self._fail(f"could not stage {target}", error)
            if isinstance(error, (WrongParent, FormatError)):
                self._doubt(applier)
        finally:
            if self._wanted == target:  # else a newer target is queued behind
                self._wanted = None

    def _doubt(self, applier: Applier) -> None:
        """Parts are checked before they are decoded, so where one does not fit it may be the live weights that are
        wrong. They are looked at, or they would be served on with an error that blames the delta.
        """
        if applier.poisoned is None:
            applier.doubt()
            self._background.submit(self._verify)

    def _verify(self) -> None:
        if self._attached is None or self._attached.applier.verified:
            return
        applier, started = self._attached.applier, time.perf_counter()
        try:
            if applier.verify():
                self._metrics["verify_s"] = time.perf_counter() - started
        except Exception as error:
            if applier.poisoned is None:  # failing to look is no better than having seen something wrong
                applier.poison(f"the digest could not be recomputed: {type(error).__name__}: {error}")
            self._fail("the weights are poisoned", error)

    # --- details ------------------------------------------------------------------------------------

    def _require(self) -> _Attached:
        if self._attached is None:
            if self._error is not None:
                raise self._error
            raise ReplicaRefused(f"this worker is {self.state}; call hubsync_attach and wait until it is ready")
        return self._attached

    def _require_joined(self) -> Applier:
        """The applier, for a collective. All ranks come to the same answer here, or one would wait for the others."""
        if self._joined is None or self._mapped is None:
            raise ReplicaRefused(f"this worker is {self.state}; call hubsync_attach and wait until it is ready")
        return self._mapped.applier

    def _mark_window(self, position: Position) -> None:
        if self._window is not None:
            self._window.committed = self._window.position == position

    def _fail(self, what: str, error: Exception) -> None:
        self._error = error if isinstance(error, HubsyncError) else ReplicaRefused(f"{type(error).__name__}: {error}")
        unexpected = not isinstance(error, HubsyncError)
        level = logging.ERROR if unexpected or self.state == WorkerState.POISONED else logging.WARNING
        logger.log(level, "hubsync: %s: %s", what, error, exc_info=unexpected)


def _stage_along(plan: Plan, attached: _Attached) -> Plan:
    if plan.start is None:
        attached.applier.stage_view(attached.view(plan), plan.target)
    else:
        attached.applier.stage_patch(attached.patch(plan), plan.target)
    return plan


def _position_json(position: Position | None) -> dict[str, Any]:
    return {} if position is None else {"version": position.version, "digest": position.digest}


def _summary(applier: Applier) -> str:
    """How many tensors of each class, for the log."""
    classes = Counter(str(row["class"]) for row in applier.layout().values())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(classes.items()))


def _explain_mismatch(attached: _Attached, digest: str) -> str:
    """Why the live weights are at no version of the run.

    They are never simply overwritten: a layout that was changed after loading would take checkpoint values without
    complaint, and the model would compute nonsense with them.
    """
    checkpoint = attached.checkpoint()
    different = attached.applier.differing(checkpoint) if checkpoint is not None else []
    if different:
        others = f" and {len(different) - 3} more" if len(different) > 3 else ""
        return (
            f"{', '.join(different[:3])}{others}: the live weights are not those of the checkpoint that was loaded; "
            "the server lays them out in another way (packed, swizzled), or somebody has changed them"
        )
    base = attached.reader.run().base
    origin = f"the run starts from {base.model}" if base.model else "the run starts from an anchor in the bucket"
    return (
        f"this server was not started from a version of the run in {attached.host.bucket} (its weights have digest "
        f"{digest[:12]}); {origin}: start it from that, or from one of the run's anchors"
    )
