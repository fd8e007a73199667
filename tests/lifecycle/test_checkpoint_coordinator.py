"""Background saves. A step becomes visible only when all of its saves are durable."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsync.errors import CheckpointFailed, ConfigError
from hubsync.lifecycle.checkpoint_coordinator import CheckpointCoordinator
from tests.support.coordinated import Rank, commits, job


class Commits(list[tuple[int, bool]]):
    """The visible steps, in order."""

    def __call__(self, step: int, is_state_dict: bool) -> None:
        self.append((step, is_state_dict))


class Held:
    """Work that signals its begin and blocks until `end` is set."""

    def __init__(self, error: Exception | None = None):
        self.begun = threading.Event()
        self.end = threading.Event()
        self._error = error

    def __call__(self) -> None:
        self.begun.set()
        assert self.end.wait(60)
        if self._error is not None:
            raise self._error


def done() -> None:
    """Work that is durable at once."""


def failing(text: str) -> Callable[[], None]:
    def work() -> None:
        raise OSError(text)

    return work


# --- saves


def test_saves_of_different_names_run_side_by_side() -> None:
    works = [Held(), Held()]
    with CheckpointCoordinator(Commits()) as coordinator:
        for name, work in zip(("model", "optimizer"), works, strict=True):
            coordinator.save_async(name, work, 1)
        assert all(work.begun.wait(60) for work in works)
        for work in works:
            work.end.set()


def test_saves_of_one_name_run_in_order() -> None:
    running, most, lock = 0, [0], threading.Lock()

    def work() -> None:
        nonlocal running
        with lock:
            running += 1
            most.append(running)
        threading.Event().wait(0.001)
        with lock:
            running -= 1

    with CheckpointCoordinator(Commits()) as coordinator:
        callers = [
            threading.Thread(target=lambda: [coordinator.save_async("model", work, step) for step in range(10)])
            for _ in range(3)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(most) == 31
    assert max(most) == 1


def test_a_synchronous_save_counts_and_raises_its_error() -> None:
    visible = Commits()
    with CheckpointCoordinator(visible) as coordinator:
        coordinator.save_sync(done, 1)
        coordinator.register_and_monitor(1, checkpoint_thread_count=1)
        with pytest.raises(OSError, match="disk full"):
            coordinator.save_sync(failing("disk full"), 2)
        coordinator.register_and_monitor(2, checkpoint_thread_count=1)
        coordinator.wait_all()
    assert visible == [(1, False)]


# --- when a step becomes visible


def test_a_step_becomes_visible_with_the_last_of_its_saves() -> None:
    visible, works = Commits(), [Held(), Held()]
    coordinator = CheckpointCoordinator(visible)
    coordinator.save_async("model", works[0], 1, is_state_dict=True)
    coordinator.save_async("optimizer", works[1], 1)
    coordinator.register_and_monitor(1, state_dict_thread_count=1, checkpoint_thread_count=1)
    works[0].end.set()
    with pytest.raises(TimeoutError, match="still under way"):
        coordinator.wait_all(timeout=0.05)
    assert not visible
    works[1].end.set()
    coordinator.wait_all()
    assert visible == [(1, False)]
    coordinator.close()


def test_inference_sees_a_step_before_its_full_checkpoint_is_there() -> None:
    visible, optimizer = Commits(), Held()
    seen = threading.Event()

    def commit(step: int, is_state_dict: bool) -> None:
        visible(step, is_state_dict)
        seen.set()

    with CheckpointCoordinator(commit) as coordinator:
        coordinator.save_async("optimizer", optimizer, 1)
        coordinator.save_async("model", done, 1, is_state_dict=True)
        coordinator.register_and_monitor(1, is_state_dict=True, state_dict_thread_count=1)
        assert seen.wait(60)
        assert visible == [(1, True)]
        coordinator.register_and_monitor(1, checkpoint_thread_count=1)
        optimizer.end.set()
    assert visible == [(1, True), (1, False)]


def test_a_step_is_committed_once_however_often_it_is_registered() -> None:
    visible = Commits()
    with CheckpointCoordinator(visible) as coordinator:
        for _ in range(2):
            coordinator.save_async("model", done, 1, is_state_dict=True)
            coordinator.register_and_monitor(1, is_state_dict=True, state_dict_thread_count=1)
        coordinator.wait_all()
    assert visible == [(1, True)]


def test_steps_become_visible_in_their_order() -> None:
    visible, slow = Commits(), Held()
    with CheckpointCoordinator(visible) as coordinator:
        coordinator.save_async("slow", slow, 1)
        coordinator.register_and_monitor(1, checkpoint_thread_count=1)
        coordinator.save_async("fast", done, 2)
        coordinator.register_and_monitor(2, checkpoint_thread_count=1)
        slow.end.set()
    assert visible == [(1, False), (2, False)]


# --- errors


def test_the_next_call_raises_an_error_once_and_still_does_its_work() -> None:
    visible = Commits()
    with CheckpointCoordinator(visible) as coordinator:
        coordinator.save_async("model", failing("disk full"), 1)
        with pytest.raises(CheckpointFailed, match=r"save 'model' of step 1 failed: OSError\('disk full'\)") as caught:
            coordinator.save_async("model", done, 2)  # waits for the previous save
        assert isinstance(caught.value.__cause__, OSError)
        coordinator.register_and_monitor(1, checkpoint_thread_count=1)
        coordinator.register_and_monitor(2, checkpoint_thread_count=1)
        coordinator.wait_all()
    assert visible == [(2, False)]


def test_wait_raises_the_errors_of_all_saves() -> None:
    coordinator = CheckpointCoordinator(Commits())
    held = [Held(OSError(text)) for text in ("one", "two")]
    for number, work in enumerate(held):
        coordinator.save_async(str(number), work, 1)
    for work in held:
        work.end.set()
    with pytest.raises(CheckpointFailed) as caught:
        coordinator.wait_all()
    assert "one" in str(caught.value)
    assert "two" in str(caught.value)
    coordinator.close()


def test_a_failed_step_stays_invisible_after_its_save_is_repeated() -> None:
    visible = Commits()
    with CheckpointCoordinator(visible) as coordinator:
        coordinator.register_and_monitor(1, checkpoint_thread_count=1)
        coordinator.save_async("model", failing("disk full"), 1)
        with pytest.raises(CheckpointFailed):
            coordinator.wait_all()
        coordinator.save_async("model", done, 1)
        coordinator.register_and_monitor(1)
        coordinator.wait_all()
    assert not visible


def test_a_commit_that_fails_is_an_error_of_its_step() -> None:
    def commit(step: int, is_state_dict: bool) -> None:
        raise OSError("the bucket is away")

    coordinator = CheckpointCoordinator(commit)
    coordinator.save_async("model", done, 1)
    coordinator.register_and_monitor(1, checkpoint_thread_count=1)
    with pytest.raises(CheckpointFailed, match=r"step 1 is not visible: the commit failed: .*the bucket is away"):
        coordinator.wait_all()
    coordinator.close()


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((1, 2), "of its checkpoint saves 2 were registered and 1 were made"),
        ((1, 0), "of its checkpoint saves 0 were registered and 1 were made"),
        ((2, 1), "of its state dict saves 2 were registered and 1 were made"),
    ],
)
def test_unregistered_saves_are_an_error_of_the_step(counts: tuple[int, int], says: str) -> None:
    visible = Commits()
    coordinator = CheckpointCoordinator(visible)
    coordinator.save_async("model", done, 1, is_state_dict=True)
    coordinator.save_async("optimizer", done, 1)
    coordinator.register_and_monitor(1, False, *counts)
    with pytest.raises(CheckpointFailed, match=says):
        coordinator.wait_all()
    assert not visible
    coordinator.close()


def test_an_unregistered_save_in_progress_holds_its_step_back() -> None:
    visible, optimizer = Commits(), Held()
    coordinator = CheckpointCoordinator(visible)
    coordinator.save_async("optimizer", optimizer, 1)
    coordinator.register_and_monitor(1)
    with pytest.raises(TimeoutError):
        coordinator.wait_all(timeout=0.05)
    assert not visible
    optimizer.end.set()
    with pytest.raises(CheckpointFailed, match="0 were registered and 1 were made"):
        coordinator.wait_all()
    coordinator.close()
    assert not visible


def test_an_error_of_the_training_loop_is_not_replaced_by_a_save_error() -> None:
    def train() -> None:
        with CheckpointCoordinator(Commits()) as coordinator:
            coordinator.register_and_monitor(1, checkpoint_thread_count=1)  # no save follows
            raise KeyError("loop")

    with pytest.raises(KeyError, match="loop"):
        train()


# --- time


def test_a_save_that_hangs_fails_its_step_and_no_wait_is_endless() -> None:
    """As on a disk that does not answer. The next save of its name would write to the same place."""
    visible, hung = Commits(), Held()
    coordinator = CheckpointCoordinator(visible, save_timeout=0.1)
    coordinator.save_async("model", hung, 1)
    coordinator.register_and_monitor(1, checkpoint_thread_count=1)
    with pytest.raises(CheckpointFailed, match=r"'model' of step 1 is not durable after 0.1 s; it is not visible"):
        coordinator.wait_all()
    coordinator.register_and_monitor(2, checkpoint_thread_count=1)
    coordinator.save_async("model", done, 2)
    with pytest.raises(CheckpointFailed, match="step 1 under this name still runs, although its time is over"):
        coordinator.wait_all()
    coordinator.save_async("optimizer", done, 3)
    coordinator.register_and_monitor(3, checkpoint_thread_count=1)
    coordinator.wait_all()
    hung.end.set()
    coordinator.close()
    assert visible == [(3, False)]


def test_saves_that_were_registered_and_are_never_made_do_not_delay_other_steps_for_ever() -> None:
    visible, seen = Commits(), threading.Event()

    def commit(step: int, is_state_dict: bool) -> None:
        visible(step, is_state_dict)
        seen.set()

    coordinator = CheckpointCoordinator(commit, save_timeout=0.1)
    coordinator.register_and_monitor(1, checkpoint_thread_count=1)
    coordinator.save_async("model", done, 2)
    coordinator.register_and_monitor(2, checkpoint_thread_count=1)
    assert seen.wait(60)
    with pytest.raises(CheckpointFailed, match=r"step 1 is not visible: .*not all of its saves are durable after"):
        coordinator.close()
    assert visible == [(2, False)]


def test_a_commit_that_hangs_does_not_hold_close() -> None:
    stuck = Held()
    coordinator = CheckpointCoordinator(lambda step, is_state_dict: stuck(), save_timeout=0.05)
    coordinator.register_and_monitor(1)
    with pytest.raises(TimeoutError, match="commits are still under way; they go on"):
        coordinator.close()
    stuck.end.set()


def test_system_exit_in_a_commit_is_an_ordinary_error() -> None:
    def commit(step: int, is_state_dict: bool) -> None:
        raise SystemExit(3)

    coordinator = CheckpointCoordinator(commit)
    coordinator.register_and_monitor(1)
    with pytest.raises(CheckpointFailed, match=r"the commit failed: SystemExit\(3\)"):
        coordinator.wait_all()
    coordinator.close()


def test_wait_and_close_are_idempotent_and_a_closed_coordinator_refuses_work() -> None:
    coordinator = CheckpointCoordinator(Commits())
    coordinator.save_async("model", done, 1)
    coordinator.register_and_monitor(1, checkpoint_thread_count=1)
    for end in (coordinator.wait_all, coordinator.close) * 2:
        end()
    for call in (
        lambda: coordinator.save_async("model", done, 2),
        lambda: coordinator.save_sync(done, 2),
        lambda: coordinator.register_and_monitor(2),
    ):
        with pytest.raises(ConfigError, match="closed"):
            call()
    with pytest.raises(ConfigError, match="not numbers of saves"):
        CheckpointCoordinator(Commits()).register_and_monitor(1, state_dict_thread_count=-1)


parts = st.lists(
    st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from([False, False, False, True])), min_size=1, max_size=8
)


@settings(max_examples=60)
@given(parts, st.lists(st.booleans(), min_size=4, max_size=4), st.randoms(use_true_random=False))
def test_in_any_interleaving_exactly_the_complete_steps_become_visible(
    parts: list[tuple[int, bool, bool]], for_inference: list[bool], dice: object
) -> None:
    """Parts (step, is_state_dict, fails) begin, end and are registered in any order."""
    durable: set[int] = set()
    ends = [threading.Event() for _ in parts]
    told: list[str] = []
    visible = Commits()

    def relevant(step: int, is_state_dict: bool) -> set[int]:
        return {i for i, (of, kind, _) in enumerate(parts) if of == step and (kind or not is_state_dict)}

    def commit(step: int, is_state_dict: bool) -> None:
        assert relevant(step, is_state_dict) <= durable
        visible(step, is_state_dict)

    def work(number: int) -> None:
        assert ends[number].wait(60)
        if parts[number][2]:
            raise OSError
        durable.add(number)

    def begin(number: int) -> None:
        coordinator.save_async(f"part{number}", lambda: work(number), parts[number][0], parts[number][1])

    def register(step: int) -> None:
        kinds = [kind for of, kind, _ in parts if of == step]
        coordinator.register_and_monitor(step, for_inference[step], kinds.count(True), kinds.count(False))

    coordinator = CheckpointCoordinator(commit)
    numbers, steps = range(len(parts)), sorted({step for step, _, _ in parts})
    actions: list[tuple[Callable[[int], object], int]] = [
        *((begin, number) for number in numbers),
        *((lambda number: ends[number].set(), number) for number in numbers),
        *((register, step) for step in steps),
    ]
    dice.shuffle(actions)  # type: ignore[attr-defined]
    for action, argument in [*actions, (lambda _: coordinator.wait_all(), 0)]:
        try:
            action(argument)
        except CheckpointFailed as error:
            told.append(str(error))
    coordinator.close()

    order = [argument for action, argument in actions if action is register]
    complete = [(step, for_inference[step]) for step in order if relevant(step, for_inference[step]) <= durable]
    assert visible == complete
    for number, (_, _, fails) in enumerate(parts):
        assert sum(text.count(f"save 'part{number}'") for text in told) == fails, "each error is reported exactly once"


# --- across ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    with job(tmp_path_factory.mktemp("job")) as ranks:
        yield ranks


def all_call(ranks: list[Rank], method: str, *args: object, **kwargs: object) -> list[str | None]:
    for rank in ranks:
        rank.call(method, *args, **kwargs)
    return [rank.heard() for rank in ranks]


def test_rank_0_commits_once_when_the_last_rank_is_durable(ranks: list[Rank]) -> None:
    all_call(ranks, "save", "model", 1, is_state_dict=True)
    all_call(ranks, "register_and_monitor", 1, is_state_dict=True, state_dict_thread_count=1)
    ranks[0].end("model")
    ranks[0].call("wait_all", timeout=0.2)
    assert "TimeoutError" in (ranks[0].heard() or "")
    assert commits(ranks[0].root) == []
    ranks[1].end("model")
    assert all_call(ranks, "wait_all") == [None, None]
    assert commits(ranks[0].root) == ["0 1 True"]


def test_a_failed_save_of_one_rank_is_raised_on_all_ranks(ranks: list[Rank]) -> None:
    before = commits(ranks[0].root)
    all_call(ranks, "save", "optimizer", 2)
    all_call(ranks, "register_and_monitor", 2, checkpoint_thread_count=1)
    ranks[0].end("optimizer")
    ranks[1].end("optimizer", "disk full")
    for error in all_call(ranks, "wait_all"):
        assert error is not None
        assert "CheckpointFailed" in error
        assert "disk full" in error
    assert commits(ranks[0].root) == before


def test_a_failed_commit_is_raised_on_all_ranks(ranks: list[Rank]) -> None:
    all_call(ranks, "register_and_monitor", 13)
    errors = all_call(ranks, "wait_all")
    assert all("step 13 is not visible: the commit failed: OSError('the bucket is away')" in str(e) for e in errors)


def test_the_step_after_a_failure_succeeds(ranks: list[Rank]) -> None:
    all_call(ranks, "register_and_monitor", 14)
    assert all_call(ranks, "wait_all") == [None, None]
    assert commits(ranks[0].root)[-1] == "0 14 False"


def test_registering_different_steps_raises_on_all_ranks(ranks: list[Rank]) -> None:
    before = commits(ranks[0].root)
    for rank in ranks:
        rank.call("register_and_monitor", 20 + rank.number)
        rank.heard()
    assert all("registered different steps" in str(error) for error in all_call(ranks, "wait_all"))
    assert commits(ranks[0].root) == before


def test_a_dead_rank_is_reported_to_the_others(tmp_path: Path) -> None:
    with job(tmp_path) as (first, second):
        all_call([first, second], "register_and_monitor", 1)
        assert all_call([first, second], "wait_all") == [None, None]
        first.call("register_and_monitor", 2)
        first.heard()
        second.process.kill()
        first.call("wait_all")
        assert "step 2 is not visible: its other ranks do not answer" in str(first.heard())
        assert commits(tmp_path) == ["0 1 False"]
