"""The applier: stage, commit, verify and undo changes of a loaded model's weights, in place.

It knows a model, the run's tensor table and a device; nothing of vLLM, processes or requests. All work that grows with
the number of *changes* or with the model happens in `stage_*`, `verify` and `live_digest`, which only read live weights
and may run in a background thread while the model serves. `commit` only checks and writes what was staged.

What is known about the weights is explicit. `position` is the version and digest they should have; `verified` says
whether the digest was recomputed from live memory since the last write. Where that knowledge is lost (weights changed
by somebody else, a write that failed half way, a wrong digest) the applier is *poisoned*: it refuses everything but
`heal`, and whoever runs the model must not run it.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from hubsync.bits import TORCH_DTYPES, UNSIGNED, advance
from hubsync.digest import Digest, digest_change, digest_torch, tensor_seed
from hubsync.errors import FormatError, ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.manifest import Position
from hubsync.patch import Patch, check
from hubsync.table import TensorSpec, TensorTable

from .coordinates import INTEGERS, build_map
from .regions import Region

_PIECE = 1 << 22  # elements handled at once where a temporary copy is needed


@dataclass(frozen=True)
class Edit:
    """New patterns for some elements of one live storage, all three on the model's device.

    Attributes:
        offsets: int32 (int64 for storages of 2^31 elements or more), unique.
        old: patterns that must be there before, as integers of the element's width.
        new: patterns to write.
    """

    offsets: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor


@dataclass(frozen=True)
class Staged:
    """A change ready to be committed.

    Attributes:
        start: what the live weights were when it was computed; it can be committed from there only.
        target: where it leads.
        edits: by storage number of the coordinate map.
        changed: elements that differ.
        seconds: what staging took.
    """

    start: Position | None
    target: Position
    edits: dict[int, Edit]
    changed: int
    seconds: float


class Applier:
    """Brings the live weights of one model from position to position.

    Args:
        model: a loaded module with `load_weights`. ReplicaRefused if its layout cannot be mapped (see `coordinates`).
        table: the run's tensor table.
        device: where the parameters are.

    `commit`, `undo` and `heal` write, and must be called while no forward pass runs. Everything else may run beside
    forward passes; stage and verify from one thread at a time.
    """

    def __init__(self, model: torch.nn.Module, table: TensorTable, device: torch.device):
        self.table = table
        self.position: Position | None = None
        self.verified = False
        self.staged: Staged | None = None
        self.poisoned: str | None = None
        self._model = model
        self._device = device
        self._map = build_map(model, table)
        self._seeds = [tensor_seed(spec.name) for spec in table]
        self._last: Staged | None = None  # what `undo` takes back
        self._writes = 0
        self._lock = threading.RLock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    # --- reading the live weights -------------------------------------------------------------------

    def live_digest(self) -> Digest:
        """Digest of the published view that is in live memory now: every element read back through the map."""
        total = Digest()
        with self._aside():
            for seed, regions in zip(self._seeds, self._map.regions, strict=True):
                for region in regions:
                    total += self._digest_of(seed, region)
        return total

    def differing(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of the tensors whose live patterns differ from these, in table order."""
        names = []
        with self._aside():
            for index, spec in enumerate(self.table):
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

        Every new value is computed here, from the live old one, and the digest that the weights *will* have is
        compared with the target's. So a wrong parent, a damaged delta and a decoding error are found before any write.

        Raises:
            WrongParent: the patch does not lead from the live weights to `target`. Nothing is staged.
            FormatError: the patch does not fit the tensor table.
        """
        started = time.perf_counter()
        start, writes = self._base()
        if start is None:
            raise ReplicaRefused("a delta cannot be staged before the position of the live weights is known")
        check(self.table, patch)
        digest = Digest.parse(start.digest)
        edits = _Edits(self._device)
        with self._aside():
            for index, delta in patch.items():
                found = 0
                for region in self._map.regions[index]:
                    positions, offsets = region.locate(delta.indices)
                    if len(positions) == 0:
                        continue
                    places, old = self._read(region, offsets)
                    before = _unsigned(old)
                    after = advance(before, delta.diffs[positions])
                    digest += digest_change(self._seeds[index], delta.indices[positions], before, after)
                    edits.add(region.storage, places, old, torch.from_numpy(after.view(f"i{after.itemsize}")))
                    found += len(positions)
                assert found == len(delta), "the map holds every element of the table exactly once"
            edited = edits.finish()
        if digest.hex != target.digest:
            raise WrongParent(
                f"the delta does not lead from {start} to {target} but to digest {digest.hex[:12]}; "
                "its bytes are wrong, or it belongs to other weights"
            )
        return self._publish(Staged(start, target, edited, edits.changed, time.perf_counter() - started), writes)

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
        digest = Digest()
        edits = _Edits(self._device)
        with self._aside():
            for index, spec in enumerate(self.table):
                flat = _flat_bits(spec, tensors)
                digest += digest_torch(self._seeds[index], flat)
                for region, offsets, old, new in self._compare(index, flat):
                    edits.add(region.storage, offsets, old, new)
            edited = edits.finish()
        if digest.hex != target.digest:
            raise WrongParent(
                f"the checkpoint (with the deltas that follow it) has digest {digest.hex[:12]}, which is not {target}; "
                "it is damaged, or it is not the checkpoint this run started from"
            )
        return self._publish(Staged(start, target, edited, edits.changed, time.perf_counter() - started), writes)

    def discard(self) -> None:
        """Forget what is staged."""
        with self._lock:
            self.staged = None

    # --- writing ------------------------------------------------------------------------------------

    def commit(self, target: Position) -> int:
        """Write what is staged for `target`; afterwards the weights are there, unverified. Idempotent.

        Returns:
            elements written; 0 if the weights were there already.

        Raises:
            ReplicaRefused: `target` is not staged, or the current weights are not verified yet. Nothing was written.
            WrongParent: staged from another position than the current one. Nothing was written.
            ReplicaPoisoned: the weights are not what they should be, before or after the write.
        """
        with self._lock:
            self._refuse_if_poisoned()
            if self.position == target:
                return 0
            staged = self.staged
            if staged is None or staged.target != target:
                what = "nothing is staged" if staged is None else f"{staged.target} is staged"
                raise ReplicaRefused(f"cannot commit {target}: {what}; stage it first")
            if staged.start != self.position:
                raise WrongParent(f"{target} was staged from {staged.start}, but the weights are at {self.position}")
            if not self.verified:
                raise ReplicaRefused(
                    f"the digest of {self.position} is still being recomputed; commit again afterwards"
                )
            self._write(staged.edits)
            self._arrive(target)
            self._last = staged
            return staged.changed

    def undo(self) -> Position:
        """Take the last commit back, with the values it replaced. Returns where the weights are now, unverified.

        Raises:
            ReplicaRefused: there is no commit to take back (only the last one can be). Nothing was written.
            ReplicaPoisoned: the weights are not what they should be, before or after the write.
        """
        with self._lock:
            self._refuse_if_poisoned()
            last = self._last
            if last is None or last.start is None or last.target != self.position:
                raise ReplicaRefused("there is no commit to undo")
            self._write({number: Edit(edit.offsets, edit.new, edit.old) for number, edit in last.edits.items()})
            self._arrive(last.start)
            return last.start

    def verify(self) -> bool:
        """Recompute the digest of all live weights and compare it with the position's. Safe beside forward passes.

        Returns:
            True if the weights are right; False if they changed meanwhile, so that nothing was learnt.

        Raises:
            ReplicaPoisoned: they are wrong. The applier is poisoned.
        """
        with self._lock:
            self._refuse_if_poisoned()
            position, writes = self.position, self._writes
        if position is None:
            raise ReplicaRefused("the position of the live weights is not known")
        moved, digest = self._map.moved(), self.live_digest()
        with self._lock:
            if writes != self._writes:
                return False
            if moved is not None:
                self._poison(f"{moved} was replaced or moved in memory since hubsync attached")
            if digest.hex != position.digest:
                self._poison(f"the live weights have digest {digest.hex[:12]}, which is not that of {position}")
            self.verified = True
            return True

    def heal(self, tensors: Mapping[str, torch.Tensor], target: Position) -> int:
        """Make the live weights equal to a whole view, whatever they are now, and prove it. Leaves the poisoned state.

        Returns:
            elements that had to be written.

        Raises:
            WrongParent, FormatError: as `stage_view`. Nothing was written; still poisoned if it was.
            ReplicaPoisoned: the weights are still wrong afterwards.
        """
        with self._lock:
            self.poisoned = self.poisoned or "being healed"
            if self._map.moved() is not None:
                self._map = build_map(self._model, self.table)
            self._last = None
            staged = self.stage_view(tensors, target)
            self._write(staged.edits)
            digest = self.live_digest()
            if digest.hex != target.digest:
                self._poison(
                    f"after rebuilding them the live weights have digest {digest.hex[:12]}, not that of {target}"
                )
            self._arrive(target)
            self.poisoned, self.verified = None, True
            return staged.changed

    def poison(self, reason: str) -> None:
        """The live weights are not known to be right: refuse everything but `heal` from here on."""
        with self._lock:
            self.poisoned = self.poisoned or reason
            self.verified = False
            self.staged = self._last = None

    # --- details ------------------------------------------------------------------------------------

    def _base(self) -> tuple[Position | None, int]:
        with self._lock:
            return self.position, self._writes

    def _publish(self, staged: Staged, writes: int) -> Staged:
        with self._lock:
            if writes != self._writes:
                raise WrongParent(f"the weights moved on from {staged.start} while {staged.target} was being staged")
            self.staged = staged
        return staged

    def _arrive(self, position: Position) -> None:
        self.position, self.verified = position, False
        self.staged = self._last = None
        self._writes += 1

    def _refuse_if_poisoned(self) -> None:
        if self.poisoned is not None:
            raise ReplicaPoisoned(f"the weights are not known to be right: {self.poisoned}")

    def _poison(self, reason: str) -> None:
        self.poison(reason)
        raise ReplicaPoisoned(f"the weights are not known to be right: {reason}")

    def _write(self, edits: Mapping[int, Edit]) -> None:
        """Check the old patterns everywhere, write the new ones, check them. O(changes)."""
        if (name := self._map.moved()) is not None:
            self._poison(f"{name} was replaced or moved in memory since hubsync attached")
        pairs = [(self._map.storages[number].bits, edit) for number, edit in edits.items()]
        try:
            with torch.inference_mode():  # also where the model was loaded in inference mode
                intact = _hold(pairs, "old")
                if intact:
                    for bits, edit in pairs:
                        bits.scatter_(0, edit.offsets.long(), edit.new)
                written = intact and _hold(pairs, "new")
        except Exception as error:
            self.poison(f"writing the weights failed: {type(error).__name__}: {error}")
            raise ReplicaPoisoned(f"the weights are not known to be right: {self.poisoned}") from error
        if not intact:
            self._poison(f"somebody else changed weights since {self.position} was verified")
        if not written:
            self._poison("the weights do not hold what was just written to them")

    def _read(self, region: Region, offsets: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(offsets, live patterns there), both on the device."""
        bits = self._map.storages[region.storage].bits
        places = torch.from_numpy(offsets).to(torch.int32 if len(bits) < 1 << 31 else torch.int64).to(self._device)
        return places, bits.index_select(0, places)

    def _compare(
        self, index: int, flat: torch.Tensor
    ) -> Iterator[tuple[Region, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(piece, live offsets, old, new) of the elements of a tensor that differ from `flat`, in bounded pieces."""
        for region in self._map.regions[index]:
            bits = self._map.storages[region.storage].bits
            for piece in region.pieces(_PIECE):
                new = piece.gather_source(flat).to(self._device)
                ranks = (piece.gather_live(bits) != new).nonzero().squeeze(1)
                if len(ranks):
                    places, old = self._read(piece, piece.offsets(ranks.cpu().numpy()))
                    yield piece, places, old, new[ranks]

    def _digest_of(self, seed: int, region: Region) -> Digest:
        bits = self._map.storages[region.storage].bits
        if region.contiguous:
            first, last = region.target_extent
            return digest_torch(seed, bits[first:last], region.source_extent[0])
        total = Digest()
        for piece in region.pieces(_PIECE):
            indices = torch.from_numpy(piece.indices(np.arange(piece.numel))).to(self._device)
            total += digest_torch(seed, piece.gather_live(bits), indices=indices)
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
    """Collects edits storage by storage."""

    def __init__(self, device: torch.device):
        self.changed = 0
        self._device = device
        self._parts: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def add(self, storage: int, offsets: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        self.changed += len(offsets)
        self._parts[storage].append((offsets, old, new.to(old.dtype).to(self._device)))

    def finish(self) -> dict[int, Edit]:
        edits = {}
        for storage, parts in self._parts.items():
            offsets, old, new = (torch.cat(column) for column in zip(*parts, strict=True))
            edits[storage] = Edit(offsets, old, new)
        return edits


def _hold(pairs: list[tuple[torch.Tensor, Edit]], which: str) -> bool:
    """Are the old (or the new) patterns where they should be? One answer, and one wait for the device, for all."""
    flags = [(bits.index_select(0, edit.offsets) == getattr(edit, which)).all() for bits, edit in pairs]
    return not flags or bool(torch.stack(flags).all())


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
    return tensor.contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])
