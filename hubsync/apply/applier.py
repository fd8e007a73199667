"""The applier: stage, commit, verify and undo changes of one rank's weights, in place.

It knows the modules of one worker, the run's tensor table, a device, and the group of workers; no inference engine, no
processes, no requests. All work that grows with the number of *changes* or with the model happens in `stage_*`,
`verify` and `inventory`. They only read live weights and may run in a background thread while the model serves.
`commit` only checks, votes and writes what was staged.

Knowledge about the weights is explicit. `position` is the version and digest that the view should have of which this
rank holds a part. `verified` says whether the digest of that part was recomputed from live memory since the last write.
Where that knowledge is lost (weights changed by another writer, a write that failed half way, a wrong digest) the
applier is *poisoned*: it refuses everything but `heal`, and the model must not run.

A rank can follow the digest of its own part by itself. That the parts of all ranks add up to the view is established by
`join` when they attach, and again by the vote before every write.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch

from hubsync.errors import ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.format.codec.device_decode import DeviceDelta
from hubsync.format.digest import Digest, DigestList, digest_change, tensor_seed
from hubsync.format.manifest import Position
from hubsync.format.patch import Patch, TensorValues, check
from hubsync.format.table import TensorTable

from .coordinate_map import build_map
from .dense import REMEDY, DenseTensors, masters_of
from .live import LayoutHints
from .live_bits import LiveBits
from .live_weights import LiveWeights
from .memory import Edit, EditCollector
from .staging import Staged, Sums, Undo, add_values, add_view
from .sweep import Sweep, first_names
from .vote import Inventory, SingleWorker, WorkerGroup, decide, join, vote


class Applier:
    """Brings the live weights of one rank from position to position.

    Args:
        models: the served module, and a draft module that has weights of the run; each with `load_weights`.
        table: the run's tensor table.
        device: where the parameters are.
        group: the workers of this engine. `commit` and `undo` are collectives over them.
        hints: what the engine knows of its layout; see `live.LayoutHints`.
        masters: allows tensors that cannot be followed in place to be loaded whole instead (see `dense`): their values
            now, by name, asked for those only. Without it such tensors are refused.
        dense_share: the largest share of the view's bytes that may be loaded whole. With more, all are refused.

    Raises:
        ReplicaRefused: the model as a whole cannot be mapped (see `coordinate_map`). If some tensors cannot, `layout`
            names them, and `inventory` raises.

    `commit`, `undo` and `heal` write, and must be called while no forward pass runs. Everything else may run during
    forward passes; stage and verify from one thread at a time. Call `join` and `adopt` before anything else.
    """

    def __init__(
        self,
        models: torch.nn.Module | Sequence[torch.nn.Module],
        table: TensorTable,
        device: torch.device,
        *,
        group: WorkerGroup | None = None,
        hints: LayoutHints | None = None,
        masters: Mapping[str, torch.Tensor] | None = None,
        dense_share: float = 1.0,
    ):
        self.table = table
        self.position: Position | None = None
        self.verified = False
        self.staged: Staged | None = None
        self.poisoned: str | None = None
        self._models = [models] if isinstance(models, torch.nn.Module) else list(models)
        self._device = device
        self._group = group or SingleWorker()
        self._seeds = [tensor_seed(spec.name) for spec in table]
        self._map = build_map(self._models, table, hints)
        self._live = LiveWeights(self._map, device, self._seeds)
        loadable = sorted(self._map.refused.keys() - self._map.unloadable) if masters is not None else []
        if sum(table[index].nbytes for index in loadable) > dense_share * table.nbytes:
            loadable = []
        self._dense = DenseTensors(table, masters_of(table, loadable, masters or {}), self._seeds, self._models, device)
        self._sums = Sums.zero(0)
        self._fingerprint: dict[str, Digest] = {}
        self._undo: Undo | None = None
        self._writes = self._doubts = 0
        self._lock = threading.RLock()

    def layout(self) -> dict[str, dict[str, object]]:
        """The class of every tensor that this rank holds; see `CoordinateMap.layout`. `dense` ones are loaded whole."""
        layout = self._map.layout()
        for name, row in self._dense.layout().items():
            layout[name] |= row
        return layout

    @property
    def derived(self) -> list[str]:
        """Parameters that are computed again after a write to what they are computed from."""
        return sorted({name for names in self._map.refreshers.values() for name in names})

    # --- reading the live weights -------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """What this rank holds, with the digest of each region of live memory as it is now.

        ReplicaRefused, naming the first, if there are tensors that cannot be followed exactly.
        """
        refused = sorted(index for index in self._map.refused if index not in self._dense)
        if refused:
            others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            remedy = "" if refused[0] in self._map.unloadable else REMEDY
            raise ReplicaRefused(f"{self.table[refused[0]].name}: {self._map.refused[refused[0]]}{others}{remedy}")
        return [*self._live.holdings(), *self._dense.holdings()]

    def join(self, inventories: Sequence[Inventory]) -> Digest:
        """Find out what this rank owns, from what all ranks hold. Returns the digest of the whole live view.

        ReplicaRefused, the same on every rank, if the ranks do not hold the whole view; see `vote.join`.
        """
        owned, total = join(self.table, inventories)
        mine, inventory = owned[self._group.rank], inventories[self._group.rank]
        self._live = LiveWeights(self._map, self._device, self._seeds, mine)
        count = len(self._live.parts)  # the tensors that are loaded whole come after them
        self._sums = Sums(Digest(), DigestList.of(holding.digest for holding in inventory[:count]).lanes)
        self._sums.owned = sum((holding.digest for holding, own in zip(inventory, mine, strict=True) if own), Digest())
        self._dense.owned = {holding.index: own for holding, own in zip(inventory[count:], mine[count:], strict=True)}
        self._fingerprint = self._dense_fingerprint()
        return total

    def stale_parameters(self) -> list[str]:
        """Names of the parameters that do not hold what the loader makes of the tensors that are loaded whole."""
        return self._dense.differing(self._map.storages)

    def old_bits(self) -> LiveBits:
        """The old patterns that compact deltas from the current position are decoded against."""
        return LiveBits(self.table, self._map.storages, self._map.regions, self._dense.masters)

    @property
    def live(self) -> LiveWeights:
        """The mapped elements, to be read."""
        return self._live

    def adopt(self, position: Position) -> None:
        """Declare that the live weights, just read, are at this position."""
        with self._lock:
            self.position, self.verified = position, True

    # --- staging: nothing is written ----------------------------------------------------------------

    def stage_patch(self, patch: Patch | DeviceDelta, target: Position) -> Staged:
        """Stage a patch (of one delta, or of several composed) from the current position to `target`.

        A `DeviceDelta` must have been decoded for `live.places`, which makes it sound.

        Every new value is computed here, from the live old one, and with it the digest that this rank's part will have.
        So a wrong parent, a damaged delta and a decoding error are found before any write: here if this is the only
        rank, else when the ranks vote.

        Raises:
            WrongParent: the patch does not lead from the live weights to `target`. Nothing is staged.
            FormatError: the patch does not fit the tensor table.
        """
        start, writes = self._base()
        if start is None:
            raise ReplicaRefused("a delta cannot be staged before the position of the live weights is known")
        host = patch.host if isinstance(patch, DeviceDelta) else patch
        check(self.table, host)
        live, sums, edits, dense = self._live, self._sums.copy(), EditCollector(self._live.memory), {}
        with live.aside():
            if isinstance(patch, DeviceDelta):
                assert live.places is not None
                live.places.stage(patch, edits, sums)
            for index, delta in host.items():
                if index in self._dense:
                    dense[index], change = self._dense.advanced(index, delta)
                    sums.add_master(change, self._dense.owned[index])
                if isinstance(delta, TensorValues):
                    add_values(live, index, delta, edits, sums)
                    continue
                for part in live.held[index]:
                    at, before, after = edits.advance(part.region, delta)
                    sums.add(digest_change(self._seeds[index], delta.indices[at], before, after), part)
            edited = edits.finish()
        if self._group.size == 1 and sums.owned.hex != target.digest:
            raise WrongParent(
                f"the delta does not lead from {start} to {target} but to digest {sums.owned.hex[:12]}; "
                "its bytes are wrong, or it belongs to other weights"
            )
        return self._keep(Staged(start, target, edited, edits.touched, sums, edits.changed, dense), writes)

    def stage_view(self, tensors: Mapping[str, torch.Tensor], target: Position) -> Staged:
        """Stage the difference between the live weights and a whole view (an anchor or base checkpoint, or patched).

        Args:
            tensors: CPU tensors by checkpoint name, each asked for once, in table order; may open them lazily.
            target: position of that view. Its digest is compared with that of `tensors`.

        Raises:
            WrongParent: the view does not have the target's digest. Nothing is staged.
            FormatError: a tensor is missing, or has another shape or dtype than the table.
        """
        start, writes = self._base()
        live, edits = self._live, EditCollector(self._live.memory)
        sums = Sums.zero(len(live.parts))
        with live.aside():
            total, dense = add_view(live, self._dense, tensors, edits, sums)
            edited = edits.finish()
        if total.hex != target.digest:
            raise WrongParent(
                f"the checkpoint (with the deltas that follow it) has digest {total.hex[:12]}, which is not {target}; "
                "it is damaged, or it is not the checkpoint this run started from"
            )
        return self._keep(Staged(start, target, edited, edits.touched, sums, edits.changed, dense), writes)

    def discard(self) -> None:
        """Forget the staged change."""
        with self._lock:
            self.staged = None

    # --- writing ------------------------------------------------------------------------------------

    def commit(self, target: Position) -> int:
        """Write the change staged for `target`, if all ranks can. Afterwards the weights are at `target`, unverified.

        A collective over the ranks of the engine: all of them write, or all raise the same error and none does.
        Idempotent.

        Returns:
            elements written on this rank; 0 if its weights were at `target` already.

        Raises:
            ReplicaRefused: `target` is not staged, or the current weights are not verified yet. Nothing was written.
            WrongParent: staged from another position than the current one. Nothing was written.
            ReplicaPoisoned: the weights are wrong before or after the write.
        """
        with self._lock:
            decide(self._group.gather(vote(lambda: self._check_commit(target), self.position, target)))
            if self.position == target:
                return 0
            staged = self.staged
            assert staged is not None
            before = self._sums, {index: self._dense.masters[index] for index in staged.dense}
            self._arrive(target, staged.sums)
            self._write(staged)
            self._undo = None if staged.start is None else Undo(staged, *before)
            return staged.changed

    def undo(self) -> Position:
        """Write the values back that the last commit replaced, if all ranks can. A collective like `commit`.

        Returns:
            the position afterwards; unverified.

        Raises:
            ReplicaRefused: there is no commit to undo (only the last one can be). Nothing was written.
            ReplicaPoisoned: the weights are wrong, before or after the write.
        """
        with self._lock:
            undo = self._undo.change if self._undo else None
            decide(self._group.gather(vote(self._check_undo, self.position, undo.target if undo else None)))
            assert undo is not None
            self._arrive(undo.target, undo.sums)
            self._write(undo)
            return undo.target

    def verify(self) -> bool:
        """Recompute the digest of all live weights of this rank and compare it with the expected one.

        Safe during forward passes.

        Returns:
            True if the weights are right; False if they changed meanwhile, so that nothing is known.

        Raises:
            ReplicaPoisoned: they are wrong. The applier is poisoned.
        """
        with self._lock:
            self._refuse_if_poisoned()
            position, changes, sums, fingerprint = self.position, self.changes, self._sums, self._fingerprint
        if position is None:
            raise ReplicaRefused("the position of the live weights is not known")
        moved, wrong = self._map.moved(), self._differing(sums, fingerprint)
        with self._lock:
            if changes != self.changes:
                return False
            if moved is not None:
                self._poison(f"{moved} was replaced or moved in memory since hubsync attached")
            if wrong:
                whose = "the live weights" if self._group.size == 1 else f"the live weights of rank {self._group.rank}"
                self._poison(f"{whose} are not those of {position}: {first_names(wrong)}")
            self.verified = True
            return True

    def sweep(self) -> Sweep | None:
        """Another look at weights that are verified, a slice at a time. None while `verify` must come first."""
        with self._lock:
            return Sweep(self._live, self._sums, self.changes) if self.verified else None

    @property
    def changes(self) -> int:
        """How often the weights were written, or may have been changed by something else: what was read is old."""
        return self._writes + self._doubts

    def intact(self) -> bool:
        """Are all parameters where they were, and those that no region feeds unchanged?"""
        return self._map.moved() is None and self._dense_fingerprint() == self._fingerprint

    def heal(self, tensors: Mapping[str, torch.Tensor], target: Position) -> int:
        """Make the live weights equal to a whole view, whatever they are now, and prove it. Leaves the poisoned state.

        Concerns this rank alone: no collective, and the other ranks stay where they are.

        Returns:
            elements written.

        Raises:
            WrongParent, FormatError: as `stage_view`. Nothing was written; still poisoned if it was.
            ReplicaPoisoned: the weights are still wrong afterwards.
        """
        with self._lock:
            self.poisoned = self.poisoned or "being healed"
            if self._map.moved() is not None:
                self.follow(self._models, self._map.hints)
            self._undo = None
            staged = self.stage_view(tensors, target)
            self._write(staged)
            wrong = self._differing(staged.sums, self._fingerprint)
            if wrong:
                self._poison(f"after rebuilding them the live weights are not those of {target}: {first_names(wrong)}")
            self._arrive(target, staged.sums)
            self.poisoned, self.verified = None, True
            return staged.changed

    def doubt(self) -> None:
        """A sound delta did not fit the live weights, so something may have changed them: `verify` finds out."""
        with self._lock:
            self.verified = False
            self._doubts += 1

    def poison(self, reason: str) -> None:
        """The live weights are not known to be right: refuse everything but `heal` from here on."""
        with self._lock:
            self.poisoned = self.poisoned or reason
            self.verified = False
            self.staged = self._undo = None

    # --- voting -------------------------------------------------------------------------------------

    def _check_commit(self, target: Position) -> Digest:
        """Digest of what this rank owns after the commit; raises why it cannot be made. O(changes)."""
        self._refuse_if_poisoned()
        if self.position == target:
            return self._sums.owned
        staged = self.staged
        if staged is None or staged.target != target:
            found = "nothing is staged" if staged is None else f"{staged.target} is staged"
            raise ReplicaRefused(f"cannot commit {target}: {found}; stage it first")
        if staged.start != self.position:
            raise WrongParent(f"{target} was staged from {staged.start}, but the weights are at {self.position}")
        if not self.verified:
            raise ReplicaRefused(f"the digest of {self.position} is still being recomputed; commit again afterwards")
        self._check_memory(staged.edits)
        return staged.sums.owned

    def _check_undo(self) -> Digest:
        """Digest of what this rank owns after the undo; raises why it cannot be made. O(changes)."""
        self._refuse_if_poisoned()
        undo = self._undo.change if self._undo else None
        if undo is None or undo.start != self.position:
            raise ReplicaRefused("there is no commit to undo")
        self._check_memory(undo.edits)
        return undo.sums.owned

    def _check_memory(self, edits: Mapping[int, Edit]) -> None:
        """Poison, and raise, unless all parameters are where they were and hold what the edits expect."""
        if (name := self._map.moved()) is not None:
            self._poison(f"{name} was replaced or moved in memory since hubsync attached")
        if not self._live.memory.hold_old(edits):
            self._poison(f"something else changed weights since {self.position} was verified")

    # --- details ------------------------------------------------------------------------------------

    def follow(self, models: Sequence[torch.nn.Module], hints: LayoutHints | None) -> None:
        """The parameters are elsewhere, or in other modules: find them. What this rank owns stays as it was agreed."""
        rebuilt = build_map(models, self.table, hints)
        if [region.source_key for held in rebuilt.regions for region in held] != self._live.source_keys:
            raise ReplicaRefused("the parameters of this server hold other elements than before; restart it")
        self._models[:] = models  # also those of `_dense`
        self._map, before = rebuilt, self._live.parts
        self._live = LiveWeights(rebuilt, self._device, self._seeds, [part.owned for part in before])

    def _base(self) -> tuple[Position | None, int]:
        with self._lock:
            return self.position, self._writes

    def _keep(self, staged: Staged, writes: int) -> Staged:
        with self._lock:
            if writes != self._writes:
                raise WrongParent(f"the weights moved on from {staged.start} while {staged.target} was being staged")
            self.staged = staged
        return staged

    def _arrive(self, position: Position, sums: Sums) -> None:
        """From here on the weights should be at `position`, whether or not the write succeeds."""
        self.position, self._sums, self.verified = position, sums, False
        self.staged = self._undo = None
        self._writes += 1

    def _refuse_if_poisoned(self) -> None:
        if self.poisoned is not None:
            raise ReplicaPoisoned(f"the weights are not known to be right: {self.poisoned}")

    def _poison(self, reason: str) -> None:
        self.poison(reason)
        raise ReplicaPoisoned(f"the weights are not known to be right: {reason}")

    def _write(self, change: Staged) -> None:
        """Write the new patterns and check them; poison if that fails. O(changes), but for tensors loaded whole."""
        try:
            written = self._live.memory.write(change.edits)
            stale = [name for number in sorted(change.touched) for name in self._map.refreshers.get(number, ())]
            for name in dict.fromkeys(stale):
                self._map.hints.derived[name].refresh()
            if change.dense:
                self._dense.load(change.dense)
                self._fingerprint = self._dense_fingerprint()
        except Exception as error:
            self.poison(f"writing the weights failed: {type(error).__name__}: {error}")
            raise ReplicaPoisoned(f"the weights are not known to be right: {self.poisoned}") from error
        if not written:
            self._poison("the weights do not hold what was just written to them")

    def _differing(self, sums: Sums, fingerprint: Mapping[str, Digest]) -> list[str]:
        """Names of the tensors, and of the parameters made of them, whose live values do not have these digests."""
        names = self._live.names(self._live.digests(), sums.regions)
        now = self._dense_fingerprint()
        return names + [name for name, digest in now.items() if digest != fingerprint.get(name)]

    def _dense_fingerprint(self) -> dict[str, Digest]:
        fed = {part.region.storage for part in self._live.parts}
        return self._dense.fingerprint(self._map.storages, fed, self._map.static)
