"""Training states: model and optimizer of all ranks in one directory, as `torch.distributed.checkpoint` writes them.

Every rank writes what it holds into a hidden directory. The directory gets its name once all parts of the step are
durable, so a state that can be seen is complete. A thread writes, so that a rank whose disk hangs delays the others no
longer than the timeout.
"""

from __future__ import annotations

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
from hubsync.retry import wait_reporting


class TrainingStates:
    """The saved states of one training. Under torch.distributed every rank makes one, and saves the same names.

    Args:
        directory: where the states are; the same for all ranks, on a disk that all of them reach.
        ranks: those of the training thread.
    """

    def __init__(self, directory: Path, ranks: Ranks):
        self._directory = directory
        self._ranks = ranks
        self._writing_ranks = ranks.apart()
        self._last: StateWriting | None = None

    def begin(self, name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> StateWriting:
        """Begin to write the state `directory/name`, which stays hidden until `StateWriting.show`. Collective.

        The state has the keys `model` and `optimizer`, as `get_state_dict` makes them. It is copied to the disk in the
        background: the model must not change until `StateWriting.wait` has returned.

        Raises:
            CheckpointFailed: on all ranks. The previous state is still being written, or the directory is unusable.
        """
        ranks = self._ranks
        ranks.together(self._require_idle)
        state = ranks.together(lambda: state_of(model, optimizer))
        hidden = ranks.first(lambda: self._hidden_directory(name))
        self._last = StateWriting(hidden, self._directory / name, state, self._writing_ranks.group)
        return self._last

    def _require_idle(self) -> None:
        if self._last is not None and not self._last.ended:
            raise CheckpointFailed(
                "the previous state is still being written, although its time is over: check the disk of dcp_directory"
            )

    def _hidden_directory(self, name: str) -> Path:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=self._directory, prefix=f".{name}-"))
        except OSError as error:
            raise CheckpointFailed(f"cannot make a directory for {name} in {self._directory}: {error}") from error


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
    """Undo the step with zero gradients by which torch creates the state of a new optimizer."""
    for entry in optimizer.state.values():
        if isinstance(entry.get("step"), torch.Tensor):
            entry["step"].zero_()  # also in the saved state, which shares the tensor
    optimizer.state.clear()


class StateWriting:
    """One rank's part of a state that is being written.

    Attributes:
        ended: whether the writing has ended, with success or failure.
    """

    def __init__(self, hidden: Path, target: Path, state: dict[str, Any], group: ProcessGroup | None):
        self.ended = False
        self._hidden = hidden
        self._target = target
        self._error: BaseException | None = None
        self._is_unwanted = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write, args=(state, group), name="hubsync-dcp", daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> None:
        """Return once the parts of all ranks are on the disk.

        Raises:
            CheckpointFailed: a rank could not write, or they were not written in `timeout` seconds.
        """
        wait_reporting(self._has_ended, timeout, waiting_for=f"{self._target} to be written")
        if not self.ended:
            raise CheckpointFailed(f"not written in {timeout:g} s: set a longer dcp_timeout, or check the disk")
        if self._error is not None:
            raise CheckpointFailed(_reason(self._error)) from self._error

    def _has_ended(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def show(self) -> None:
        """Give the written directory its name. It replaces an older state of this name. For one rank to call."""
        old = self._hidden.with_name(f"{self._hidden.name}.old")
        try:
            if self._target.exists():
                self._target.rename(old)
            self._hidden.rename(self._target)
        except OSError as error:
            raise CheckpointFailed(f"{self._target} could not be given its name: {error}") from error
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Delete what is written, once the writing has ended. Does not touch a state that is shown."""
        with self._lock:
            self._is_unwanted, ended = True, self.ended
        if ended:
            shutil.rmtree(self._hidden, ignore_errors=True)

    def _write(self, state: dict[str, Any], group: ProcessGroup | None) -> None:
        import torch.distributed.checkpoint as dcp  # takes a second

        try:
            dcp.save(state, checkpoint_id=self._hidden, process_group=group, no_dist=group is None)
        except BaseException as error:  # torch's CheckpointException is one
            self._error = error
        with self._lock:
            self.ended, unwanted = True, self._is_unwanted
        if unwanted:
            shutil.rmtree(self._hidden, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """Which rank failed with which error. torch's own text has a traceback of each."""
    failures = getattr(error, "failures", None) or {None: (error,)}
    texts = (f"{type(reason).__name__}: {reason}" for reason, *_ in failures.values())
    return "; ".join(
        text if rank is None else f"rank {rank}: {text}" for rank, text in zip(failures, texts, strict=True)
    )
