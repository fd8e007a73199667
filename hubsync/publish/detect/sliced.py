"""Exact detection without a copy of the model: a parameter's old weights exist until its own update.

The optimizer steps a few parameters at a time, and a recorder compares their published view before and after. So this
detector holds only changes, and the memory for one bucket of parameters.

Writes to weights outside of these steps are not observed: by another optimizer, through `.data`, by a replaced tensor.
Each detection finds them: the digest of every live tensor must be the one after its changes. A tensor that deviates is
published with new values instead of changes. If it deviates again, a copy of it is kept from then on, and changes are
found by comparison.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch

from hubsync.errors import ChainError
from hubsync.format.digest import Digest, DigestList
from hubsync.format.table import TensorTable
from hubsync.kernels.bits import bits_of
from hubsync.publish.view.live import require_same_table
from hubsync.publish.view.strided import whole_of

from .changes import Detected, TensorDigests
from .copied import CopiedTensors, Tensors
from .recorder import HostRecorder, Recorder
from .snapshot import Snapshot
from .stepping import SlicedSteps

logger = logging.getLogger(__name__)


class Sliced:
    """Records the changes of optimizer steps as they happen.

    Args:
        tensors: the live tensors, from `published_tensors`.
        table: their table.
        optimizer: a torch optimizer for which `why_not_sliced` returns None. Its `step` is replaced until `close`.
        recorder: records changes in steps; by default on the CPU.
        copied: table indices of tensors that the recorder cannot follow.
    """

    holds_old = False  # no weights to encode compact deltas against

    def __init__(
        self,
        tensors: Tensors,
        table: TensorTable,
        optimizer: torch.optim.Optimizer,
        recorder: Recorder | None = None,
        copied: frozenset[int] = frozenset(),
    ):
        self.table = table
        self._weights = threading.RLock()  # held during steps, and while weights are read
        self._recorder = HostRecorder(table) if recorder is None else recorder
        self._live = [tensors[spec.name] for spec in table]
        self._of = TensorDigests(table)
        self._copied = CopiedTensors(table)
        # No optimizer updates buffers, and they are small: they are compared with a copy.
        unseen = [index for index in range(len(table)) if index in copied or not self._is_parameter(index)]
        self._copied.add(self._copies_of(unseen))
        self._recorder.follow(self._live, self._copied.indices)
        self.digests = self._in_order(*self._recorder.digests(), self._copied.digests())
        self._deviated: set[int] = set()  # tensors that a publish found written to outside of steps
        self._candidate: Snapshot | None = None  # copies to keep once the new values are durable
        self._steps = SlicedSteps(optimizer, self, self._recorder.bucket)

    @property
    def digest(self) -> Digest:
        return self.digests.total

    # --- called by the publisher -----------------------------------------------------------------------

    def begin(self) -> None:
        with self._weights:
            self._recorder.begin()

    def follow(self, tensors: Tensors) -> None:
        """Watch these live tensors from now on. ConfigError unless they have the names and shapes of the table."""
        require_same_table(self.table, tensors)
        with self._weights:
            self._live = [tensors[spec.name] for spec in self.table]
            self._recorder.follow(self._live, self._copied.indices)
            self._copied.follow(tensors)

    def detect(self) -> Detected:
        """All changes since the view of `digest`, proved by the digests of all live tensors."""
        with self._weights:
            self._candidate = None
            recorded = self._recorder.collect(self.digests)
            copied = self._copied.detect()
            after = self._in_order(recorded.indices, recorded.after, copied.after)
            deviating = recorded.indices[(recorded.after != recorded.expected).any(axis=1)]
            values = dict(copied.values)
            if len(deviating):
                values |= self._new_values(deviating.tolist(), after)
            changes = {index: change for index, change in recorded.changes.items() if index not in values}
            on_device = recorded.on_device
            if on_device is not None:
                on_device = on_device.without(values)
            return Detected(changes | copied.changes, values, self.digests, after, on_device=on_device)

    def advance(self, detected: Detected) -> None:
        """Count changes from the view after the last `detected`: it is durable."""
        with self._weights:
            self._recorder.advance()
            self._copied.advance(detected)
            if self._candidate is not None:
                self._copied.add(self._candidate)
                self._candidate = None
                self._recorder.follow(self._live, self._copied.indices)
            assert isinstance(detected.after, DigestList)
            self.digests = detected.after

    def tensors(self) -> Tensors:
        """The view of `digest` by name: a clone of the live view with the changes since then undone.

        ChainError if weights were written outside of the optimizer's steps, so that the view cannot be restored.
        """
        view = {}
        with self._weights:
            restored = self._recorder.restorer()
            held = self._copied.tensors()
            for index, spec in enumerate(self.table):
                if spec.name in held:
                    view[spec.name] = held[spec.name].clone()
                    continue
                tensor = restored(index)
                if self._of.of(index, tensor) != self.digests[index]:
                    raise ChainError(
                        f"{spec.name} was written outside of the optimizer's steps, so the last published view cannot "
                        "be restored: publish first"
                    )
                view[spec.name] = tensor.view(spec.shape)
        return view

    def close(self) -> None:
        """Restore the optimizer's own step."""
        self._steps.undo()

    # --- called by steps ----------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._weights:
            with self._recorder.step():
                yield
            if self._recorder.outgrown:
                self._copy_outgrown(sorted(self._recorder.outgrown))

    def update(self, parameters: list[torch.Tensor]) -> AbstractContextManager[None]:
        return self._recorder.update(parameters)

    def _copy_outgrown(self, indices: list[int]) -> None:
        """Keep a copy of the last durable view of some tensors, instead of lists of changes that have outgrown it."""
        restored = self._recorder.restorer()
        view = {index: restored(index) for index in indices}
        # Of a tensor that was written outside of steps that view is lost: it will be published with new values.
        known = [index for index in indices if self._of.of(index, view[index]) == self.digests[index]]
        if known:
            logger.info("keeping a copy of %d tensors: many elements have changed since a publish", len(known))
            copies = self._copies_of(known)
            assert copies is not None
            copies.hold([view[index] for index in known], [self.digests[index] for index in known])
            self._copied.add(copies)
            self._recorder.follow(self._live, self._copied.indices)
        self._recorder.outgrown.clear()

    # --- writes outside of steps ----------------------------------------------------------------------

    def _new_values(self, deviating: list[int], after: DigestList) -> dict[int, np.ndarray]:
        """New values of tensors whose changes are not known. Sets their digests in `after`."""
        again = [index for index in deviating if index in self._deviated]
        first = [index for index in deviating if index not in self._deviated]
        self._deviated |= set(first)
        self._candidate = self._copies_of(again)
        size = sum(self.table[index].nbytes for index in deviating) / 1e6
        logger.warning(
            "%s and %d other tensors were written outside of the observed optimizer's steps: publishing their new "
            "values (%.1f MB)%s",
            self.table[deviating[0]].name,
            len(deviating) - 1,
            size,
            ". It is not the first time, so a copy of them is kept from now on" if again else "",
        )
        values = {}
        for indices, copies in ((again, self._candidate), (first, self._copies_of(first))):
            for number, index in enumerate(indices):
                assert copies is not None
                after.lanes[index] = copies.digests[number].a, copies.digests[number].b
                values[index] = bits_of(copies.part(number).cpu())
        return values

    def _copies_of(self, indices: list[int]) -> Snapshot | None:
        if not indices:
            return None
        table = TensorTable([self.table[index] for index in indices])
        return Snapshot({self.table[index].name: self._live[index] for index in indices}, table)

    def _is_parameter(self, index: int) -> bool:
        return isinstance(whole_of(self._live[index]), torch.nn.Parameter)

    def _in_order(self, indices: np.ndarray, lanes: np.ndarray, others: dict[int, Digest]) -> DigestList:
        """Digests of all tensors, from recorded ones and others."""
        found = np.zeros((len(self.table), 2), np.uint64)
        found[indices] = lanes
        for index, digest in others.items():
            found[index] = digest.a, digest.b
        return DigestList(found)
