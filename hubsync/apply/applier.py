"""The applier: stage, commit, verify and undo changes of one rank's weights, in place.

It knows the modules of one worker, the run's tensor table, a device, and a way to hear the other ranks; nothing of
vLLM, processes or requests. All work that grows with the number of *changes* or with the model happens in `stage_*`,
`verify` and `inventory`. They only read live weights and may run in a background thread while the model serves.
`commit` only checks, votes and writes what was staged.

What is known about the weights is explicit. `position` is the version and digest that the view should have of which
this rank holds a part; `verified` says whether the digest of that part was recomputed from live memory since the last
write. Where that knowledge is lost (weights changed by somebody else, a write that failed half way, a wrong digest) the
applier is *poisoned*: it refuses everything but `heal`, and whoever runs the model must not run it.

A rank can follow the digest of its own part by itself. That the parts of all ranks add up to the view is established by
`join` when they attach, and again by the vote before every write.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from hubsync.errors import FormatError, ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.format.digest import Digest, digest_change, digest_torch, tensor_seed
from hubsync.format.manifest import Position
from hubsync.format.patch import Patch, check
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import TORCH_DTYPES, UNSIGNED, advance, bits_of

from .coordinate_map import CoordinateMap, build_map
from .live import INTEGERS, LayoutHints
from .live_bits import LiveBits
from .memory import Edit, Memory, memory_of, merged
from .protocol import error_to_json
from .regions import Region, block
from .vote import Holding, Inventory, PrepareVote, SingleWorker, WorkerGroup, decide, join

_PIECE = 1 << 22  # elements handled at once where a temporary copy is needed


@dataclass(frozen=True)
class Sums:
    """Digests of what one rank holds: of the elements it owns, and of everything that is mapped, copies included."""

    owned: Digest = field(default_factory=Digest)
    held: Digest = field(default_factory=Digest)

    def plus(self, change: Digest, owned: bool, held: bool = True) -> Sums:
        return Sums(self.owned + change if owned else self.owned, self.held + change if held else self.held)


@dataclass(frozen=True)
class Staged:
    """A change ready to be committed.

    Attributes:
        start: what the live weights were when it was computed; it can be committed from there only.
        target: where it leads.
        edits: by key of the memory.
        touched: numbers of the storages that they change.
        sums: this rank's digests afterwards.
        changed: live elements that differ.
        seconds: what staging took.
        dense: by table index, the new values of tensors that are loaded whole.
    """

    start: Position | None
    target: Position
    edits: dict[int, Edit]
    touched: frozenset[int]
    sums: Sums
    changed: int
    seconds: float
    dense: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Undo:
    """What takes the last write back."""

    start: Position
    target: Position
    edits: dict[int, Edit]
    touched: frozenset[int]
    sums: Sums
    dense: dict[int, torch.Tensor]


@dataclass(frozen=True)
class _Held:
    """One region of one tensor in live memory. Is it ours to count?"""

    region: Region
    owned: bool


class Applier:
    """Brings the live weights of one rank from position to position.

    Args:
        models: the served module, and a draft module that has weights of the run; each with `load_weights`.
        table: the run's tensor table.
        device: where the parameters are.
        ranks: the other workers of this engine. `commit` and `undo` are collectives over them.
        hints: what the server knows of its layout; see `live.LayoutHints`.
        masters: where tensors that cannot be followed in place may be loaded whole instead, by the model's own loader:
            their values now, by name (asked for those only). Without it such tensors are refused.

    ReplicaRefused, naming the reason, if the model as a whole cannot be mapped (see `coordinates`); if some tensors
    cannot, `layout` says which, and `inventory` refuses.

    `commit`, `undo` and `heal` write, and must be called while no forward pass runs. Everything else may run beside
    forward passes; stage and verify from one thread at a time. Before anything else, `join` and `adopt`.
    """

    def __init__(
        self,
        models: torch.nn.Module | Sequence[torch.nn.Module],
        table: TensorTable,
        device: torch.device,
        *,
        ranks: WorkerGroup | None = None,
        hints: LayoutHints | None = None,
        masters: Mapping[str, torch.Tensor] | None = None,
    ):
        self.table = table
        self.position: Position | None = None
        self.verified = False
        self.staged: Staged | None = None
        self.poisoned: str | None = None
        self._models = [models] if isinstance(models, torch.nn.Module) else list(models)
        self._device = device
        self._ranks = ranks or SingleWorker()
        self._seeds = [tensor_seed(spec.name) for spec in table]
        self._map = build_map(self._models, table, hints)
        self._memory = memory_of(self._map.storages, device)
        self._masters: dict[int, torch.Tensor] = {}
        if masters is not None:
            loadable = self._map.refused.keys() - self._map.unloadable
            self._masters = {index: masters[table[index].name].contiguous() for index in sorted(loadable)}
        self._held = _held(self._map, None)
        self._owned_masters: dict[int, bool] = {}
        self._sums = Sums()
        self._fingerprint = Digest()
        self._last: _Undo | None = None
        self._writes = 0
        self._lock = threading.RLock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def layout(self) -> dict[str, dict[str, object]]:
        """The class of every tensor that this rank holds; see `CoordinateMap.layout`. `dense` ones are loaded whole."""
        answer = self._map.layout()
        for index, master in self._masters.items():
            answer[self.table[index].name] |= {"class": "dense", "elements": master.numel()}
        return answer

    @property
    def derived(self) -> list[str]:
        """Parameters that are computed again after a write to what they are computed from."""
        return sorted({name for names in self._map.refreshers.values() for name in names})

    # --- reading the live weights -------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """What this rank holds, with the digest of each region of live memory as it is now.

        ReplicaRefused, naming the first, if there are tensors that cannot be followed exactly.
        """
        refused = self._map.refused.keys() - self._masters.keys()
        if refused:
            index = min(refused)
            others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            raise ReplicaRefused(f"{self.table[index].name}: {self._map.refused[index]}{others}")
        holdings = []
        with self._aside():
            for index, regions in enumerate(self._map.regions):
                holdings += [Holding(index, region, self._digest_of(index, region)) for region in regions]
        for index, master in self._masters.items():
            whole = block(-1, (master.numel(),), 0, (1,), 0, (1,))
            assert whole is not None
            holdings.append(Holding(index, whole, digest_torch(self._seeds[index], _bits(master))))
        return holdings

    def join(self, inventories: Sequence[Inventory]) -> Digest:
        """Find out what this rank owns, from what all ranks hold. Returns the digest of the whole live view.

        ReplicaRefused, the same on every rank, if the ranks do not hold the whole view; see `ranks.join`.
        """
        owned, total = join(self.table, inventories)
        mine, inventory = owned[self._ranks.rank], inventories[self._ranks.rank]
        self._held = _held(self._map, mine)
        self._owned_masters = {
            holding.index: own for holding, own in zip(inventory, mine, strict=True) if holding.index in self._masters
        }
        self._sums = Sums()
        for holding, own in zip(inventory, mine, strict=True):
            self._sums = self._sums.plus(holding.digest, own, held=holding.index not in self._masters)
        self._fingerprint = self._dense_fingerprint()
        return total

    def old_bits(self) -> LiveBits:
        """What compact deltas from the current position are decoded against."""
        regions = [[part.region for part in held] for held in self._held]
        return LiveBits(self.table, self._map.storages, regions, self._masters)

    def live_digest(self) -> Digest:
        """Digest of everything mapped that is in live memory now, copies included."""
        total = Digest()
        with self._aside():
            for index, held in enumerate(self._held):
                for part in held:
                    total += self._digest_of(index, part.region)
        return total

    def differing(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of the tensors whose live patterns differ from these, in table order."""
        names = []
        with self._aside():
            for index, spec in enumerate(self.table):
                if not self._held[index]:
                    continue
                flat = _flat_bits(spec, tensors)
                if any(len(offsets) for _, offsets, _, _ in self._compare(index, flat)):
                    names.append(spec.name)
        return names

    def adopt(self, position: Position) -> None:
        """The live weights, just read, are at this position."""
        with self._lock:
            self.position, self.verified = position, True

    # --- staging: nothing is written ----------------------------------------------------------------

    def stage_patch(self, patch: Patch, target: Position) -> Staged:
        """Stage a patch (of one delta, or of several composed) that leads from the current position to `target`.

        Every new value is computed here, from the live old one, and with it the digest that this rank's part will have.
        So a wrong parent, a damaged delta and a decoding error are found before any write: here if this is the only
        rank, else when the ranks vote.

        Raises:
            WrongParent: the patch does not lead from the live weights to `target`. Nothing is staged.
            FormatError: the patch does not fit the tensor table.
        """
        started = time.perf_counter()
        start, writes = self._base()
        if start is None:
            raise ReplicaRefused("a delta cannot be staged before the position of the live weights is known")
        check(self.table, patch)
        sums, edits, dense = self._sums, _Edits(self._memory), {}
        with self._aside():
            for index, delta in patch.items():
                if index in self._masters:
                    dense[index], change = _advanced(
                        self._masters[index], self._seeds[index], delta.indices, delta.diffs
                    )
                    sums = sums.plus(change, self._owned_masters[index], held=False)
                for part in self._held[index]:
                    positions, offsets = part.region.locate(delta.indices)
                    if len(positions) == 0:
                        continue
                    places, old = self._read(part.region, offsets)
                    before = _unsigned(old)
                    after = advance(before, delta.diffs[positions])
                    change = digest_change(self._seeds[index], delta.indices[positions], before, after)
                    sums = sums.plus(change, part.owned)
                    edits.add(part.region.storage, places, old, torch.from_numpy(after.view(f"i{after.itemsize}")))
            edited = edits.finish()
        staged = Staged(start, target, edited, edits.touched, sums, edits.changed, time.perf_counter() - started, dense)
        if self._ranks.size == 1 and sums.owned.hex != target.digest:
            raise WrongParent(
                f"the delta does not lead from {start} to {target} but to digest {sums.owned.hex[:12]}; "
                "its bytes are wrong, or it belongs to other weights"
            )
        return self._publish(staged, writes)

    def stage_view(self, tensors: Mapping[str, torch.Tensor], target: Position) -> Staged:
        """Stage what differs between the live weights and a whole view (an anchor or base checkpoint, patched or not).

        Args:
            tensors: CPU tensors by checkpoint name, each asked for once, in table order; may open them lazily.
            target: position of that view. Its digest is compared with what `tensors` holds.

        Raises:
            WrongParent: the view does not have the target's digest. Nothing is staged.
            FormatError: a tensor is missing, or has another shape or dtype than the table.
        """
        started = time.perf_counter()
        start, writes = self._base()
        total, sums, edits, dense = Digest(), Sums(), _Edits(self._memory), {}
        with self._aside():
            for index, spec in enumerate(self.table):
                flat = _flat_bits(spec, tensors)
                whole = digest_torch(self._seeds[index], flat)
                total += whole
                if index in self._masters:
                    dense[index] = flat.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
                    sums = sums.plus(whole, self._owned_masters[index], held=False)
                for part in self._held[index]:
                    sums = sums.plus(self._digest_of_source(index, part.region, flat), part.owned)
                for region, offsets, old, new in self._compare(index, flat):
                    edits.add(region.storage, offsets, old, new)
            edited = edits.finish()
        if total.hex != target.digest:
            raise WrongParent(
                f"the checkpoint (with the deltas that follow it) has digest {total.hex[:12]}, which is not {target}; "
                "it is damaged, or it is not the checkpoint this run started from"
            )
        seconds = time.perf_counter() - started
        return self._publish(Staged(start, target, edited, edits.touched, sums, edits.changed, seconds, dense), writes)

    def discard(self) -> None:
        """Forget what is staged."""
        with self._lock:
            self.staged = None

    # --- writing ------------------------------------------------------------------------------------

    def commit(self, target: Position) -> int:
        """Write what is staged for `target`, if all ranks can. Afterwards the weights are there, unverified.

        A collective over the ranks of the engine: all of them write, or all raise the same error and none does.
        Idempotent.

        Returns:
            elements written on this rank; 0 if its weights were there already.

        Raises:
            ReplicaRefused: `target` is not staged, or the current weights are not verified yet. Nothing was written.
            WrongParent: staged from another position than the current one. Nothing was written.
            ReplicaPoisoned: the weights are not what they should be, before or after the write.
        """
        with self._lock:
            decide(self._ranks.gather(self._prepare_vote(lambda: self._check_commit(target), target)))
            if self.position == target:
                return 0
            staged, start = self.staged, self.position
            assert staged is not None
            undo = None
            if start is not None:
                edits = {number: edit.inverted() for number, edit in staged.edits.items()}
                dense = {index: self._masters[index] for index in staged.dense}
                undo = _Undo(start, target, edits, staged.touched, self._sums, dense)
            self._arrive(target, staged.sums)
            self._write(staged)
            self._last = undo
            return staged.changed

    def undo(self) -> Position:
        """Take the last commit back, with the values it replaced, if all ranks can. Returns where the weights are now,
        unverified. A collective like `commit`.

        Raises:
            ReplicaRefused: there is no commit to take back (only the last one can be). Nothing was written.
            ReplicaPoisoned: the weights are not what they should be, before or after the write.
        """
        with self._lock:
            last = self._last
            target = last.start if last else None
            decide(self._ranks.gather(self._prepare_vote(self._check_undo, target)))
            assert last is not None
            self._arrive(last.start, last.sums)
            self._write(last)
            return last.start

    def verify(self) -> bool:
        """Recompute the digest of all live weights of this rank and compare it with what it must be.

        Safe beside forward passes.

        Returns:
            True if the weights are right; False if they changed meanwhile, so that nothing was learnt.

        Raises:
            ReplicaPoisoned: they are wrong. The applier is poisoned.
        """
        with self._lock:
            self._refuse_if_poisoned()
            position, writes = self.position, self._writes
            expected, fingerprint = self._sums.held, self._fingerprint
        if position is None:
            raise ReplicaRefused("the position of the live weights is not known")
        moved, digest, dense = self._map.moved(), self.live_digest(), self._dense_fingerprint()
        with self._lock:
            if writes != self._writes:
                return False
            if moved is not None:
                self._poison(f"{moved} was replaced or moved in memory since hubsync attached")
            if digest != expected or dense != fingerprint:
                whose = f"the live weights have digest {digest.hex[:12]}"
                if self._ranks.size > 1:
                    whose = f"the part of rank {self._ranks.rank} has digest {digest.hex[:12]} in live memory"
                self._poison(f"{whose}, which is not that of {position}")
            self.verified = True
            return True

    def heal(self, tensors: Mapping[str, torch.Tensor], target: Position) -> int:
        """Make the live weights equal to a whole view, whatever they are now, and prove it. Leaves the poisoned state.

        Concerns this rank alone: the others are not asked, and stay where they are.

        Returns:
            elements that had to be written.

        Raises:
            WrongParent, FormatError: as `stage_view`. Nothing was written; still poisoned if it was.
            ReplicaPoisoned: the weights are still wrong afterwards.
        """
        with self._lock:
            self.poisoned = self.poisoned or "being healed"
            if self._map.moved() is not None:
                self._rebuild_map()
            self._last = None
            staged = self.stage_view(tensors, target)
            self._write(staged)
            digest = self.live_digest()
            if digest != staged.sums.held:
                self._poison(
                    f"after rebuilding them the live weights have digest {digest.hex[:12]}, not that of {target}"
                )
            self._arrive(target, staged.sums)
            self.poisoned, self.verified = None, True
            return staged.changed

    def doubt(self) -> None:
        """A sound delta did not fit the live weights, so they may have been changed by somebody: `verify` says."""
        with self._lock:
            self.verified = False

    def poison(self, reason: str) -> None:
        """The live weights are not known to be right: refuse everything but `heal` from here on."""
        with self._lock:
            self.poisoned = self.poisoned or reason
            self.verified = False
            self.staged = self._last = None

    # --- may we write? ------------------------------------------------------------------------------

    def _prepare_vote(self, find_share: Callable[[], Digest], target: Position | None) -> PrepareVote:
        """What this rank says before a write. It always says something: the others wait for it."""
        try:
            return PrepareVote(None, self.position, target, find_share())
        except Exception as error:
            return PrepareVote(error_to_json(error), self.position, target, Digest())

    def _check_commit(self, target: Position) -> Digest:
        """What this rank owns after the commit; raises why it cannot be made. O(changes)."""
        self._refuse_if_poisoned()
        if self.position == target:
            return self._sums.owned
        staged = self.staged
        if staged is None or staged.target != target:
            what = "nothing is staged" if staged is None else f"{staged.target} is staged"
            raise ReplicaRefused(f"cannot commit {target}: {what}; stage it first")
        if staged.start != self.position:
            raise WrongParent(f"{target} was staged from {staged.start}, but the weights are at {self.position}")
        if not self.verified:
            raise ReplicaRefused(f"the digest of {self.position} is still being recomputed; commit again afterwards")
        self._check_memory(staged.edits)
        return staged.sums.owned

    def _check_undo(self) -> Digest:
        self._refuse_if_poisoned()
        last = self._last
        if last is None or last.target != self.position:
            raise ReplicaRefused("there is no commit to undo")
        self._check_memory(last.edits)
        return last.sums.owned

    def _check_memory(self, edits: Mapping[int, Edit]) -> None:
        """Poison, and raise, unless all parameters are where they were and hold what the edits expect."""
        if (name := self._map.moved()) is not None:
            self._poison(f"{name} was replaced or moved in memory since hubsync attached")
        if not self._memory.hold_old(edits):
            self._poison(f"somebody else changed weights since {self.position} was verified")

    # --- details ------------------------------------------------------------------------------------

    def _rebuild_map(self) -> None:
        """Parameters were moved: find them again. What this rank owns stays as it was agreed."""
        rebuilt = build_map(self._models, self.table, self._map.hints)
        before = [[part.region.source_key for part in held] for held in self._held]
        if [[region.source_key for region in regions] for regions in rebuilt.regions] != before:
            raise ReplicaRefused("the parameters of this server hold other elements than before; restart it")
        owned = [part.owned for held in self._held for part in held]
        self._map, self._held = rebuilt, _held(rebuilt, owned)
        self._memory = memory_of(rebuilt.storages, self._device)

    def _base(self) -> tuple[Position | None, int]:
        with self._lock:
            return self.position, self._writes

    def _publish(self, staged: Staged, writes: int) -> Staged:
        with self._lock:
            if writes != self._writes:
                raise WrongParent(f"the weights moved on from {staged.start} while {staged.target} was being staged")
            self.staged = staged
        return staged

    def _arrive(self, position: Position, sums: Sums) -> None:
        """From here on the weights should be at `position`, whatever becomes of the write."""
        self.position, self._sums, self.verified = position, sums, False
        self.staged = self._last = None
        self._writes += 1

    def _refuse_if_poisoned(self) -> None:
        if self.poisoned is not None:
            raise ReplicaPoisoned(f"the weights are not known to be right: {self.poisoned}")

    def _poison(self, reason: str) -> None:
        self.poison(reason)
        raise ReplicaPoisoned(f"the weights are not known to be right: {reason}")

    def _write(self, change: Staged | _Undo) -> None:
        """Write the new patterns and check them; poison if that fails. O(changes), but for tensors loaded whole."""
        try:
            written = self._memory.write(change.edits)
            stale = [name for number in sorted(change.touched) for name in self._map.refreshers.get(number, ())]
            for name in dict.fromkeys(stale):
                self._map.hints.derived[name].refresh()
            if change.dense:
                self._load_dense(change.dense)
        except Exception as error:
            self.poison(f"writing the weights failed: {type(error).__name__}: {error}")
            raise ReplicaPoisoned(f"the weights are not known to be right: {self.poisoned}") from error
        if not written:
            self._poison("the weights do not hold what was just written to them")

    def _load_dense(self, tensors: Mapping[int, torch.Tensor]) -> None:
        """Load tensors that are not mapped through the model's own loader."""
        with torch.no_grad():
            for model in self._models:
                named = [(self.table[index].name, tensor.to(self._device)) for index, tensor in tensors.items()]
                model.load_weights(iter(named))  # type: ignore[operator]
        self._masters |= tensors
        self._fingerprint = self._dense_fingerprint()

    def _dense_fingerprint(self) -> Digest:
        """Digest of the parameters that no region feeds: what loaders computed of tensors that are loaded whole."""
        total = Digest()
        if self._masters:
            fed = {part.region.storage for held in self._held for part in held}
            for number, storage in enumerate(self._map.storages):
                if storage.parameter and number not in fed:
                    total += digest_torch(number, storage.bits)
        return total

    def _read(self, region: Region, offsets: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(places, patterns there) for offsets in the region's storage as the loader sees them, both on the device."""
        places = self._memory.places(region.storage, self._map.storages[region.storage].live(offsets))
        return places, self._memory.read(self._memory.key(region.storage), places)

    def _compare(
        self, index: int, flat: torch.Tensor
    ) -> Iterator[tuple[Region, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(piece, live offsets, old, new) of the elements of a tensor that differ from `flat`, in bounded pieces."""
        for part in self._held[index]:
            storage = self._map.storages[part.region.storage]
            for piece in part.region.pieces(_PIECE):
                new = piece.gather_source(flat).to(self._device)
                ranks = (storage.gather(piece) != new).nonzero().squeeze(1)
                if len(ranks):
                    places, old = self._read(piece, piece.offsets(ranks.cpu().numpy()))
                    yield piece, places, old, new[ranks]

    def _digest_of(self, index: int, region: Region) -> Digest:
        """Digest of a region of live memory."""
        storage, seed = self._map.storages[region.storage], self._seeds[index]
        if region.contiguous and storage.relayout is None:
            first, last = region.target_extent
            return digest_torch(seed, storage.bits[first:last], region.source_extent[0])
        return self._digest_pieces(seed, region, storage.gather)

    def _digest_of_source(self, index: int, region: Region, flat: torch.Tensor) -> Digest:
        """Digest of the same elements of a flat checkpoint tensor."""
        if region.contiguous:
            first, last = region.source_extent
            return digest_torch(self._seeds[index], flat[first:last], first)
        return self._digest_pieces(self._seeds[index], region, lambda piece: piece.gather_source(flat))

    def _digest_pieces(self, seed: int, region: Region, gather: Callable[[Region], torch.Tensor]) -> Digest:
        total = Digest()
        for piece in region.pieces(_PIECE):
            bits = gather(piece)
            indices = torch.from_numpy(piece.indices(np.arange(piece.numel))).to(bits.device)
            total += digest_torch(seed, bits, indices=indices)
        return total

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Reads of live weights do not queue up behind forward passes on a GPU: they have their own stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()


class _Edits:
    """Collects edits."""

    def __init__(self, memory: Memory):
        self.changed = 0
        self._memory = memory
        self._touched: set[int] = set()
        self._parts: dict[int, list[Edit]] = defaultdict(list)

    def add(self, storage: int, places: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        self.changed += len(places)
        self._touched.add(storage)
        self._parts[self._memory.key(storage)].append(Edit(places, old, new.to(old.dtype).to(old.device)))

    @property
    def touched(self) -> frozenset[int]:
        return frozenset(self._touched)

    def finish(self) -> dict[int, Edit]:
        return {key: merged(parts) for key, parts in self._parts.items()}


def _held(coordinates: CoordinateMap, owned: Sequence[bool] | None) -> list[list[_Held]]:
    """The mapped regions by table index. `owned`: for each of them in order; all are, before the ranks have joined."""
    flags = iter(owned) if owned is not None else None
    return [
        [_Held(region, True if flags is None else next(flags)) for region in regions] for regions in coordinates.regions
    ]


def _advanced(master: torch.Tensor, seed: int, indices: np.ndarray, diffs: np.ndarray) -> tuple[torch.Tensor, Digest]:
    """A copy of a whole tensor with a delta applied, and what its digest changes by."""
    new = master.clone()
    bits = bits_of(new)
    before = bits[indices]
    bits[indices] = advance(before, diffs)
    return new, digest_change(seed, indices, before, bits[indices])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(INTEGERS[tensor.element_size()])


def _unsigned(bits: torch.Tensor) -> np.ndarray:
    return bits.cpu().numpy().view(UNSIGNED[8 * bits.element_size()])


def _flat_bits(spec: TensorSpec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One tensor of a view as a flat integer tensor; FormatError if it is not what the table says."""
    try:
        tensor = tensors[spec.name]
    except KeyError:
        raise FormatError(f"{spec.name} is missing from the checkpoint") from None
    if tuple(tensor.shape) != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
        raise FormatError(
            f"{spec.name} is {tensor.dtype} {list(tensor.shape)} in the checkpoint, "
            f"and {spec.dtype} {list(spec.shape)} in the run"
        )
    return _bits(tensor.contiguous())
