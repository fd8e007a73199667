"""Background saves, and steps that become visible only when all of their saves are durable.

A save is work under a name: saves of one name run one after the other, saves of different names concurrently. A step
consists of the saves that all ranks register for it. Once the last of them is durable, rank 0 makes the step visible by
one call of `commit`, which writes a manifest, moves a "latest" file, or notifies servers. If one of them fails on any
rank, the step never becomes visible, and every rank gets the reason.

    coordinator = CheckpointCoordinator(commit)
    ticket = engine.publish(step, serve=False)  # detects the changes now, uploads in the background
    coordinator.save_async("weights", ticket.result, step, is_state_dict=True)
    coordinator.save_async("optimizer", lambda: torch.save(optimizer_state, path), step)
    coordinator.register_and_monitor(step, state_dict_thread_count=1, checkpoint_thread_count=1)
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import TracebackType

from hubsync.errors import CheckpointFailed, ConfigError, RankError
from hubsync.publish.ranks import Ranks, SingleRank, join
from hubsync.retry import Deadline, wait_reporting


@dataclass
class _SavedStep:
    """State of one step in this process: counts and errors by `is_state_dict`."""

    registered: Counter[bool] = field(default_factory=Counter)
    begun: Counter[bool] = field(default_factory=Counter)
    durable: Counter[bool] = field(default_factory=Counter)
    errors: dict[bool, str] = field(default_factory=dict)
    awaited: Counter[bool] = field(default_factory=Counter)  # decisions that are pending
    visible: set[bool] = field(default_factory=set)

    def error(self, is_state_dict: bool) -> str | None:
        return next((self.errors[kind] for kind in _kinds(is_state_dict) if kind in self.errors), None)

    def complete(self, is_state_dict: bool) -> bool:
        return all(self.registered[kind] == self.begun[kind] == self.durable[kind] for kind in _kinds(is_state_dict))


class CheckpointCoordinator:
    """Background saves of one process, or of all ranks of a job, and the commits of their steps.

    Under torch.distributed every rank makes one, at the same place of the program, and calls `register_and_monitor` for
    the same steps in the same order.

    A background error is raised once, as CheckpointFailed: by the next call of any method, or by `wait_all`. That call
    has completed its own work first, so a caller may handle the error and go on.

    Args:
        commit: called with (step, is_state_dict) to make a step visible, on rank 0 alone, once for each; step after
            step in the order of their registration.
        alone: coordinate this process only, regardless of torch.distributed.
    """

    def __init__(self, commit: Callable[[int, bool], None], *, alone: bool = False):
        self._commit = commit
        self._ranks: Ranks = SingleRank() if alone else join()
        self._closed = False
        self._changed = threading.Condition()  # guards all below
        self._steps: dict[int, _SavedStep] = {}
        self._unraised: list[CheckpointFailed] = []
        self._lanes: dict[str, ThreadPoolExecutor] = {}
        self._saves: dict[str, Future[None]] = {}  # the last one of every name
        self._monitor = ThreadPoolExecutor(1, thread_name_prefix="hubsync-checkpoint-monitor")
        self._decisions: list[Future[None]] = []

    def save_async(self, name: str, work: Callable[[], object], global_step: int, is_state_dict: bool = False) -> None:
        """Run `work` in the background. First waits for the previous save of this name.

        Args:
            name: name of the destination, such as "model" or "optimizer".
            work: returns when what it saves is durable. What it saves must not change meanwhile.
            global_step: the step that it is a part of.
            is_state_dict: whether it is a part of what inference loads, or only of a full checkpoint.
        """
        self._require_open()
        with self._changed:
            before = self._saves.get(name)
        if before is not None:
            _wait([before], math.inf, f"the previous save of {name!r}")
        with self._changed:
            if name not in self._lanes:
                self._lanes[name] = ThreadPoolExecutor(1, thread_name_prefix=f"hubsync-checkpoint-{name}")
            unraised = self._take_unraised()
            self._step(global_step).begun[is_state_dict] += 1
            self._saves[name] = self._lanes[name].submit(self._save_or_note, name, work, global_step, is_state_dict)
        _raise_if_any(unraised)

    def save_sync(self, work: Callable[[], object], global_step: int, is_state_dict: bool = False) -> None:
        """Run `work` in this thread, as saves with collectives need. Raises the error of `work`."""
        self._require_open()
        self._step(global_step).begun[is_state_dict] += 1
        self._save("", work, global_step, is_state_dict)
        _raise_if_any(self._take_unraised())

    def register_and_monitor(
        self,
        global_step: int,
        is_state_dict: bool = False,
        state_dict_thread_count: int = 0,
        checkpoint_thread_count: int = 0,
    ) -> None:
        """Make a step visible, in the background, when all saves registered for it are durable on all ranks.

        Args:
            is_state_dict: the step becomes visible to inference as soon as its state dict saves are durable. Otherwise
                it is a full checkpoint, and becomes visible when all of its saves are.
            state_dict_thread_count: number of state dict saves that this rank makes; added to those registered before.
            checkpoint_thread_count: number of other saves that this rank makes; added to those registered before.
        """
        self._require_open()
        if state_dict_thread_count < 0 or checkpoint_thread_count < 0:
            raise ConfigError(f"{state_dict_thread_count} and {checkpoint_thread_count} are not numbers of saves")
        with self._changed:
            step = self._step(global_step)
            step.registered[True] += state_dict_thread_count
            step.registered[False] += checkpoint_thread_count
            step.awaited[is_state_dict] += 1
            unraised = self._take_unraised()
            self._decisions = [decision for decision in self._decisions if not decision.done()]
            self._decisions.append(self._monitor.submit(self._decide, global_step, is_state_dict))
        _raise_if_any(unraised)

    def wait_all(self, timeout: float | None = None) -> None:
        """Wait until all saves have ended, and every registered step is visible or has failed.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds. The saves go on.
            CheckpointFailed: a save, another rank or a commit failed, or a step has other saves than were registered.
        """
        deadline = Deadline(math.inf if timeout is None else timeout)
        with self._changed:
            saves = list(self._saves.values())
        if not _wait(saves, deadline, "background saves"):
            raise TimeoutError("saves are still under way; they go on")
        with self._changed:
            decisions = list(self._decisions)
            self._expect_no_more()
        if not _wait(decisions, deadline, "saved steps to become visible"):
            raise TimeoutError("commits are still under way; they go on")
        _raise_if_any(self._take_unraised())

    def close(self) -> None:
        """`wait_all`, then end the threads. Closing twice is allowed."""
        self._closed = True
        try:
            self.wait_all()
        finally:
            for thread in (*self._lanes.values(), self._monitor):
                thread.shutdown()

    def __enter__(self) -> CheckpointCoordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointFailed:
            if error is None:
                raise

    # --- saves

    def _save_or_note(self, name: str, work: Callable[[], object], global_step: int, is_state_dict: bool) -> None:
        try:
            self._save(name, work, global_step, is_state_dict)
        except BaseException as error:
            failure = CheckpointFailed(f"save {name!r} of step {global_step} failed: {error!r}; it is not visible")
            failure.__cause__ = error
            self._note(failure)

    def _save(self, name: str, work: Callable[[], object], global_step: int, is_state_dict: bool) -> None:
        try:
            work()
        except BaseException as error:
            with self._changed:
                what = f"save {name!r}" if name else "a save"
                self._step(global_step).errors.setdefault(is_state_dict, f"{what} failed: {error!r}")
                self._changed.notify_all()
            raise
        with self._changed:
            self._step(global_step).durable[is_state_dict] += 1
            self._changed.notify_all()

    # --- steps

    def _decide(self, global_step: int, is_state_dict: bool) -> None:
        """Wait for this rank's part of a step, gather the others' results, and have rank 0 commit it."""

        def is_decided() -> bool:
            return step.error(is_state_dict) is not None or step.complete(is_state_dict)

        with self._changed:
            step = self._step(global_step)
            what = f"the saves of step {global_step}"
            wait_reporting(lambda s: self._changed.wait_for(is_decided, s), waiting_for=what)
            own = step.error(is_state_dict)
        try:
            error = self._agree(global_step, is_state_dict, own)
        except RankError as failure:
            error = f"its other ranks do not answer: {failure}"
        with self._changed:
            step.awaited[is_state_dict] -= 1
            if error is None:
                step.visible.add(is_state_dict)
                return
            step.errors.setdefault(is_state_dict, error)
        if own is None:  # else the caller gets the error of the save
            self._note(CheckpointFailed(f"step {global_step} is not visible: {error}"))

    def _agree(self, global_step: int, is_state_dict: bool, own: str | None) -> str | None:
        """Why the step is not visible, the same on all ranks; None if it is."""
        reports = self._ranks.gather(lambda: (global_step, is_state_dict, own))
        if len({(step, kind) for step, kind, _ in reports}) > 1:
            return f"the ranks registered different steps, or in a different order: {reports}"
        errors = [f"rank {rank}: {error}" for rank, (_, _, error) in enumerate(reports) if error is not None]
        if errors:
            return "; ".join(errors)
        return self._ranks.first(lambda: self._try_to_commit(global_step, is_state_dict))

    def _try_to_commit(self, global_step: int, is_state_dict: bool) -> str | None:
        if is_state_dict in self._step(global_step).visible:
            return None
        try:
            self._commit(global_step, is_state_dict)
        except BaseException as error:  # also SystemExit, which would only end this thread
            return f"the commit failed: {error!r}"
        return None

    def _expect_no_more(self) -> None:
        """Fail the steps that have other saves than were registered."""
        for number, step in self._steps.items():
            for kind in {kind for awaited in +step.awaited for kind in _kinds(awaited)}:
                if step.registered[kind] != step.durable[kind] and kind not in step.errors:
                    counts = f"{step.registered[kind]} were registered and {step.durable[kind]} were made"
                    step.errors[kind] = f"of its {'state dict' if kind else 'checkpoint'} saves {counts}"
                    self._unraised.append(CheckpointFailed(f"step {number} is not visible: {step.errors[kind]}"))
        self._changed.notify_all()

    def _step(self, global_step: int) -> _SavedStep:
        with self._changed:
            return self._steps.setdefault(global_step, _SavedStep())

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("this coordinator is closed: make a new one")

    # --- errors

    def _note(self, failure: CheckpointFailed) -> None:
        with self._changed:
            self._unraised.append(failure)

    def _take_unraised(self) -> list[CheckpointFailed]:
        """Errors to raise now. Taken before new work begins: errors of new work are for the next call."""
        with self._changed:
            unraised, self._unraised = self._unraised, []
        return unraised


def _kinds(is_state_dict: bool) -> tuple[bool, ...]:
    """The kinds of saves that a step needs: a full checkpoint needs its state dict too."""
    return (True,) if is_state_dict else (True, False)


def _raise_if_any(unraised: list[CheckpointFailed]) -> None:
    if unraised:
        raise CheckpointFailed("; ".join(map(str, unraised))) from unraised[0].__cause__


def _wait(futures: list[Future[None]], timeout: float | Deadline, what: str) -> bool:
    return wait_reporting(lambda seconds: not wait(futures, seconds).not_done, timeout, waiting_for=what)
