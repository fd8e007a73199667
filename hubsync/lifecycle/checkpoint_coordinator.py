"""Background saves, and steps that become visible only when all of their saves are durable.

A save is work under a name: saves of one name run one after the other, saves of different names concurrently. A step
consists of the saves that all ranks register for it. Once the last of them is durable, rank 0 makes the step visible by
one call of `commit`, which writes a manifest, moves a "latest" file, or notifies servers. If one of them fails on any
rank, or takes too long, the step never becomes visible, and every rank gets the reason.

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
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from types import TracebackType

from hubsync.errors import CheckpointFailed, ConfigError, RankError
from hubsync.publish.ranks import Ranks, SingleRank, join
from hubsync.retry import Deadline, wait_reporting

SAVE_SECONDS = 2700.0  # default of `save_timeout`


@dataclass
class _Save:
    """One save in the background. `given_up`: its time is over, although it may still run."""

    name: str
    global_step: int
    is_state_dict: bool
    ended: Future[None]
    deadline: Deadline
    given_up: bool = False


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
        save_timeout: seconds in which a save must be durable. After that its step fails, and later saves of its name
            fail as long as it still runs: two of them would write to one destination.
    """

    def __init__(self, commit: Callable[[int, bool], None], *, alone: bool = False, save_timeout: float = SAVE_SECONDS):
        self._commit = commit
        self._timeout = save_timeout
        self._ranks: Ranks = SingleRank() if alone else join()
        self._closed = False
        self._changed = threading.Condition()  # guards all below
        self._steps: dict[int, _SavedStep] = {}
        self._unraised: list[CheckpointFailed] = []
        self._saves: dict[str, _Save] = {}  # the last one of every name
        self._decisions: list[Future[None]] = []

    def save_async(self, name: str, work: Callable[[], object], global_step: int, is_state_dict: bool = False) -> None:
        """Run `work` in the background. First waits for the previous save of this name, until its time is over.

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
            self._await_save(before)
        with self._changed:
            unraised = self._take_unraised()
            self._step(global_step).begun[is_state_dict] += 1
            save = _Save(name, global_step, is_state_dict, Future(), Deadline(self._timeout))
            # Another thread may have begun one of this name meanwhile.
            before, self._saves[name] = self._saves.get(name), save
            _in_background(f"hubsync-checkpoint-{name}", lambda: self._save_or_note(save, before, work), save.ended)
        _raise_if_any(unraised)

    def save_sync(self, work: Callable[[], object], global_step: int, is_state_dict: bool = False) -> None:
        """Run `work` in this thread, as saves with collectives need. Raises the error of `work`."""
        self._require_open()
        self._step(global_step).begun[is_state_dict] += 1
        try:
            work()
        except BaseException as error:
            self._fail(global_step, is_state_dict, f"a save failed: {error!r}")
            raise
        self._count(global_step, is_state_dict)
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
            before, decision = self._decisions[-1:], Future[None]()
            self._decisions.append(decision)
            _in_background(
                "hubsync-checkpoint-monitor", lambda: self._decide(global_step, is_state_dict, before), decision
            )
        _raise_if_any(unraised)

    def wait_all(self, timeout: float | None = None) -> None:
        """Wait until all saves have ended, and every registered step is visible or has failed.

        Raises:
            TimeoutError: it takes longer than `timeout` seconds; default is until the time of each save is over, and
                for commits twice `save_timeout` after that: another rank may be as late. What is under way goes on.
            CheckpointFailed: a save, another rank or a commit failed, or a step has other saves than were registered.
        """
        deadline = Deadline(math.inf if timeout is None else timeout)
        with self._changed:
            saves = list(self._saves.values())
        if not all(self._await_save(save, deadline) for save in saves):
            raise TimeoutError("saves are still under way; they go on")
        with self._changed:
            decisions = list(self._decisions)
            self._expect_no_more()
        commits = Deadline(2 * self._timeout) if timeout is None else deadline
        if not _wait(decisions, commits, "saved steps to become visible"):
            raise TimeoutError("commits are still under way; they go on")
        _raise_if_any(self._take_unraised())

    def close(self) -> None:
        """`wait_all`, and accept no more work. Closing twice is allowed."""
        self._closed = True
        self.wait_all()

    def __enter__(self) -> CheckpointCoordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (CheckpointFailed, TimeoutError):
            if error is None:
                raise

    # --- saves

    def _save_or_note(self, save: _Save, before: _Save | None, work: Callable[[], object]) -> None:
        try:
            if before is not None:
                self._await_save(before)
                _require_ended(before)
            work()
        except BaseException as error:
            if not save.given_up:
                self._fail_save(save, f"failed: {error!r}", error)
            return
        with self._changed:
            if not save.given_up:
                self._count(save.global_step, save.is_state_dict)

    def _await_save(self, save: _Save, deadline: Deadline | None = None) -> bool:
        """Wait until a save has ended or its time is over. False if the given deadline was earlier.

        After its time it is given up: its step fails.
        """
        what = f"the save {save.name!r} of step {save.global_step}"
        within = save.deadline if deadline is None or deadline.left > save.deadline.left else deadline
        if _wait([save.ended], within, what):
            return True
        if not save.deadline.passed:
            return False
        with self._changed:
            given_up, save.given_up = save.given_up, True
        if not given_up:
            self._fail_save(save, f"is not durable after {self._timeout:g} s")
        return True

    def _fail_save(self, save: _Save, how: str, cause: BaseException | None = None) -> None:
        self._fail(save.global_step, save.is_state_dict, f"save {save.name!r} {how}")
        failure = CheckpointFailed(f"save {save.name!r} of step {save.global_step} {how}; it is not visible")
        failure.__cause__ = cause
        self._note(failure)

    def _fail(self, global_step: int, is_state_dict: bool, how: str) -> None:
        with self._changed:
            self._step(global_step).errors.setdefault(is_state_dict, how)
            self._changed.notify_all()

    def _count(self, global_step: int, is_state_dict: bool) -> None:
        with self._changed:
            self._step(global_step).durable[is_state_dict] += 1
            self._changed.notify_all()

    # --- steps

    def _decide(self, global_step: int, is_state_dict: bool, before: list[Future[None]]) -> None:
        """Wait for this rank's part of a step, gather the others' results, and have rank 0 commit it.

        Args:
            before: the decision before this one, which must have ended.
        """
        _wait(before, math.inf, "the step before to become visible")  # each decision ends

        def is_decided() -> bool:
            return step.error(is_state_dict) is not None or step.complete(is_state_dict)

        with self._changed:
            step = self._step(global_step)
            what = f"the saves of step {global_step}"
            in_time = wait_reporting(lambda s: self._changed.wait_for(is_decided, s), self._timeout, waiting_for=what)
            if not in_time:
                step.errors.setdefault(is_state_dict, f"not all of its saves are durable after {self._timeout:g} s")
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
        if own is None or not in_time:  # else the caller gets the error of the save
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


def _require_ended(save: _Save) -> None:
    if not save.ended.done():
        raise CheckpointFailed(
            f"the save of step {save.global_step} under this name still runs, although its time is over: check where "
            "it writes to, or allow more time (save_timeout)"
        )


def _raise_if_any(unraised: list[CheckpointFailed]) -> None:
    if unraised:
        raise CheckpointFailed("; ".join(map(str, unraised))) from unraised[0].__cause__


def _wait(futures: list[Future[None]], timeout: float | Deadline, what: str) -> bool:
    return wait_reporting(lambda seconds: not wait(futures, seconds).not_done, timeout, waiting_for=what)


def _in_background(name: str, act: Callable[[], None], ended: Future[None]) -> None:
    """Run `act` in a thread that does not keep the process from ending, as work that hangs would."""

    def run() -> None:
        try:
            act()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=run, name=name, daemon=True).start()
