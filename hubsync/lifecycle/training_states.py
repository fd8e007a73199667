"""The state of a training, model and optimizer, as `torch.distributed.checkpoint` keeps it: all ranks in one directory.

Every rank writes what it holds, and the directory gets its name once all of them have: a state that can be seen is
whole. Writing is a thread's work, so that a rank whose disk hangs keeps nobody longer than the timeout.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from hubsync.errors import CheckpointFailed
from hubsync.publish.detect.stepping import unwrapped
from hubsync.publish.ranks import Ranks

logger = logging.getLogger(__name__)


class TrainingStates:
    """The saved states of one training. Under torch.distributed every rank makes one, and saves the same names.

    Args:
        directory: where they are; the same for all ranks, on a disk that all of them reach.
        ranks: those of the training thread.
        timeout: seconds that a rank may take to write.
    """

    def __init__(self, directory: Path, ranks: Ranks, timeout: float):
        self._directory = directory
        self._ranks = ranks
        self._writing_ranks = ranks.apart()
        self._timeout = timeout
        self._last: _Writing | None = None

    def save(self, name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Write `directory/name`, with the keys `model` and `optimizer` as `get_state_dict` makes them.

        A state of this name that is there already is replaced once the new one is whole.

        Raises:
            CheckpointFailed: on all ranks; nothing can be seen of it then.
        """
        ranks = self._ranks
        ranks.together(self._require_idle)
        state = ranks.together(lambda: state_of(model, optimizer))
        staging = ranks.first(lambda: self._make_room(name))
        writing = self._last = _Writing(staging, state, self._writing_ranks.group)
        try:
            ranks.together(lambda: writing.wait(self._timeout))
            ranks.first(lambda: self._show(staging, name))
        except BaseException:
            writing.discard()
            raise

    def _require_idle(self) -> None:
        if self._last is not None and not self._last.ended:
            raise CheckpointFailed("the save before is still being written, although its time is over")

    def _make_room(self, name: str) -> Path:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=self._directory, prefix=f".{name}-"))
        except OSError as error:
            raise CheckpointFailed(f"no room for {name} in {self._directory}: {error}") from error

    def _show(self, staging: Path, name: str) -> None:
        target, old = self._directory / name, staging.with_name(f"{staging.name}.old")
        try:
            if target.exists():
                target.rename(old)
            staging.rename(target)
        except OSError as error:
            raise CheckpointFailed(f"{target} could not be given its name: {error}") from error
        shutil.rmtree(old, ignore_errors=True)


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Model and optimizer as `torch.distributed.checkpoint` saves them. Changes neither of them."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict

    if optimizer is None:
        return {"model": get_model_state_dict(model)}
    optimizer = unwrapped(optimizer)
    is_new = not optimizer.state
    weights, moments = get_state_dict(model, optimizer)
    if is_new:
        _forget_step(optimizer)
    return {"model": weights, "optimizer": moments}


def _forget_step(optimizer: torch.optim.Optimizer) -> None:
    """torch gives an optimizer that has no state yet one, by a step with gradients of zero: it must not count."""
    for entry in optimizer.state.values():
        if isinstance(entry.get("step"), torch.Tensor):
            entry["step"].zero_()  # in what is saved, too
    optimizer.state.clear()


class _Writing:
    """One rank's part of a state on its way to the disk."""

    def __init__(self, directory: Path, state: dict[str, Any], group: ProcessGroup | None):
        self.ended = False
        self._directory = directory
        self._error: BaseException | None = None
        self._is_unwanted = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write, args=(state, group), name="hubsync-dcp", daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> None:
        """Return once all ranks' parts are on the disk. CheckpointFailed if they are not in time, or never will be."""
        self._thread.join(timeout)
        if not self.ended:
            raise CheckpointFailed(f"not written in {timeout:g} s")
        if self._error is not None:
            raise CheckpointFailed(_words(self._error)) from self._error

    def discard(self) -> None:
        """Delete what is written, once it is."""
        with self._lock:
            self._is_unwanted, ended = True, self.ended
        if ended:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _write(self, state: dict[str, Any], group: ProcessGroup | None) -> None:
        import torch.distributed.checkpoint as dcp  # takes a second

        try:
            dcp.save(state, checkpoint_id=self._directory, process_group=group, no_dist=group is None)
        except BaseException as error:  # torch's CheckpointException is one
            self._error = error
        with self._lock:
            self.ended, unwanted = True, self._is_unwanted
        if unwanted:
            shutil.rmtree(self._directory, ignore_errors=True)


def _words(error: BaseException) -> str:
    """What failed on which rank; torch would add a traceback of each."""
    failures = getattr(error, "failures", None) or {None: (error,)}
    said = (f"{type(reason).__name__}: {reason}" for reason, *_ in failures.values())
    return "; ".join(
        what if rank is None else f"rank {rank}: {what}" for rank, what in zip(failures, said, strict=True)
    )
