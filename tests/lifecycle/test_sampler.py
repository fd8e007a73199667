"""The rollout sampler: each sample exactly once despite failures, and windows that follow a server's load."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubsync.errors import (
    ConfigError,
    HubsyncError,
    ReplicaBehind,
    ReplicaRefused,
    ReplicaUnreachable,
    ReplicaUnsuitable,
)
from hubsync.lifecycle.rollouts.sampler import Sample, Sampler
from hubsync.lifecycle.rollouts.window import AdaptiveWindow, Load, RequestLimit
from tests.support.standins import METRICS, Hangup, StandIn

SEED = 1000
PROMPTS = [[1, 2, 3], [4], [5, 6], [7]]


@pytest.fixture
def replica() -> Iterator[Callable[..., StandIn]]:
    started: list[StandIn] = []

    def start(**options: Any) -> StandIn:
        started.append(StandIn(**options))
        return started[-1]

    yield start
    for standin in started:
        standin.kill()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Result of `work`. Its tasks must end with it, except that abandoned generators may take a moment longer."""

    async def checked() -> Any:
        result = await work
        while asyncio.all_tasks() > {asyncio.current_task(), main}:
            await asyncio.sleep(0.001)
        return result

    async def in_time() -> Any:
        nonlocal main
        main = asyncio.current_task()
        return await asyncio.wait_for(checked(), 120)

    main: asyncio.Task[Any] | None = None
    return asyncio.run(in_time())


async def samples_of(*replicas: StandIn, k: int = 3, prompts: Any = PROMPTS, **options: Any) -> list[Sample]:
    request = {name: options.pop(name) for name in ("ordered", "logprobs", "version", "min_version") if name in options}
    async with Sampler([replica.url for replica in replicas], poll_s=0.01, **options) as sampler:
        return [sample async for sample in sampler.sample(prompts, k, seed=SEED, **request)]


def assert_one_of_each(samples: list[Sample], k: int, prompts: int = len(PROMPTS)) -> None:
    assert sorted((sample.prompt, sample.k) for sample in samples) == [(i, j) for i in range(prompts) for j in range(k)]
    for sample in samples:
        assert sample.token_ids == (SEED + sample.prompt * k + sample.k,), "the answer belongs to its request"


# --- samples of a wanted version


@pytest.mark.parametrize("endpoints", [True, False], ids=["refused at once", "looked at afterwards"])
@pytest.mark.parametrize("wanted", [{"version": 7}, {"min_version": 6}])
def test_only_replicas_at_the_wanted_version_make_samples(
    replica: Callable[..., StandIn], wanted: dict[str, int], endpoints: bool
) -> None:
    old, new = replica(version=5, endpoints=endpoints), replica(version=7, endpoints=endpoints)
    samples = run(samples_of(old, new, window=2, **wanted))
    assert_one_of_each(samples, 3)
    assert {(sample.replica, sample.min_version, sample.max_version) for sample in samples} == {(new.url, 7, 7)}
    assert old.samples_asked <= len(samples), "a sample asks a replica once before it asks the others"


@pytest.mark.parametrize("endpoints", [True, False])
def test_samples_wait_for_a_version_that_a_replica_reaches(replica: Callable[..., StandIn], endpoints: bool) -> None:
    server = replica(version=5, endpoints=endpoints)

    async def check() -> list[Sample]:
        waiting = asyncio.ensure_future(samples_of(server, min_version=6, window=1, attempts=1))
        await asyncio.to_thread(server.asked, "/inference/v1/generate", 3)
        server.version = 6
        return await waiting

    samples = run(check())
    assert_one_of_each(samples, 3)
    assert {sample.min_version for sample in samples} == {6}


def test_a_version_that_no_replica_serves_is_an_error_after_a_while(replica: Callable[..., StandIn]) -> None:
    servers = [replica(version=5, endpoints=True), replica(version=6)]
    with pytest.raises(ReplicaBehind, match=r"no replica has served the wanted version for 0.3 s: .*hubsync follow"):
        run(samples_of(*servers, version=4, patience=0.3))


# --- the fields of a sample


def test_samples_record_their_versions_and_replica(
    replica: Callable[..., StandIn],
) -> None:
    server = replica(version=7)
    samples = run(samples_of(server, logprobs=True))
    assert_one_of_each(samples, 3)
    for sample in samples:
        assert (sample.min_version, sample.max_version) == (7, 7)
        assert [(span.version, span.start, span.end) for span in sample.spans] == [(7, 0, 1)]
        assert sample.logprobs == (-0.5,)
        assert sample.text is None
        assert sample.replica == server.url
        assert sample.seconds > 0


def test_a_text_prompt_gives_a_text_sample(replica: Callable[..., StandIn]) -> None:
    for scale_out, text in ((True, f"after {list(b'hello')}"), (False, "after hello")):
        (sample,) = run(samples_of(replica(scale_out=scale_out), k=1, prompts=["hello"]))
        assert sample.text == text
        assert sample.token_ids == (SEED,)


def test_ordered_samples_follow_prompts_and_sample_numbers(replica: Callable[..., StandIn]) -> None:
    servers = [replica(fate=lambda: threading.Event().wait(random.random() / 50) or None) for _ in range(2)]
    samples = run(samples_of(*servers, ordered=True))
    assert [(sample.prompt, sample.k) for sample in samples] == [(i, k) for i in range(4) for k in range(3)]
    assert_one_of_each(samples, 3)


def test_versions_are_bounded_by_the_served_versions_when_the_server_does_not_report_them(
    replica: Callable[..., StandIn],
) -> None:
    def commit_meanwhile() -> None:
        server.version = 5

    server = replica(scale_out=False, version=3, fate=commit_meanwhile)
    first, second = run(samples_of(server, k=2, prompts=[[1]], window=1, ordered=True))
    assert (first.min_version, first.max_version, first.spans) == (3, 5, ())
    assert (second.min_version, second.max_version, second.spans) == (5, 5, ())


def test_answers_come_as_they_are_completed(replica: Callable[..., StandIn]) -> None:
    held = threading.Event()
    slow, fast = replica(fate=lambda: held.wait(60) and None), replica()

    async def check() -> None:
        async with Sampler([slow.url, fast.url], window=1) as sampler:
            samples = [sample async for sample in stop_holding(sampler.sample([[1]], 9, seed=SEED))]
        assert [sample.replica for sample in samples] == [fast.url] * 8 + [slow.url]

    async def stop_holding(samples: Any) -> Any:
        done = 0
        async for sample in samples:
            yield sample
            done += 1
            if done == 8:
                held.set()

    run(check())


# --- failing replicas


class Mortality:
    """A server that fails sample requests at random in several ways, and restarts after it was killed."""

    def __init__(self, replica: Callable[..., StandIn], seed: int):
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self._killed = False
        self.deaths = 0
        self.server = replica(fate=self._fate)

    def _fate(self) -> int | None:
        with self._lock:
            fate = self._dice.choice(["live"] * 5 + ["hang up", "cut", "500", "503", "kill"])
            if fate != "live":
                self.deaths += 1
            if fate == "kill" and not self._killed:
                self._killed = True
                self.server.kill()
                threading.Timer(0.05, self._revive).start()
        if fate in ("hang up", "kill"):
            raise Hangup
        if fate == "cut":
            raise Hangup(after=self._dice.randint(1, 120))
        return int(fate) if fate.isdigit() else None

    def _revive(self) -> None:
        with self._lock:
            self.server.start()
            self._killed = False

    def settle(self) -> None:
        while self._killed:
            threading.Event().wait(0.01)


@pytest.mark.parametrize("seed", range(3))
def test_each_sample_arrives_exactly_once_under_random_deaths(replica: Callable[..., StandIn], seed: int) -> None:
    mortals = [Mortality(replica, seed * 3 + number) for number in range(3)]
    prompts = [[number] for number in range(20)]
    servers = [mortal.server for mortal in mortals]
    samples = run(samples_of(*servers, k=4, prompts=prompts, window=6, attempts=1000, timeout=30.0))
    for mortal in mortals:
        mortal.settle()
    assert_one_of_each(samples, 4, prompts=20)
    assert sum(mortal.deaths for mortal in mortals) > 10


def test_requests_of_a_dead_replica_are_resent_and_its_late_answers_dropped(
    replica: Callable[..., StandIn],
) -> None:
    held = threading.Event()
    dying, other = replica(fate=lambda: held.wait(60) and None), replica(ill=True)

    def die_when_asked() -> None:
        dying.asked("/inference/v1/generate")
        dying.ill, other.ill = True, False
        other.asked("/inference/v1/generate")
        held.set()

    killer = threading.Thread(target=die_when_asked)
    killer.start()
    samples = run(samples_of(dying, other, k=2, prompts=[[1]], window=1))
    killer.join()
    assert_one_of_each(samples, 2, prompts=1)
    assert {sample.replica for sample in samples} == {other.url}


def test_a_replica_that_closed_one_connection_is_retried_at_once(replica: Callable[..., StandIn]) -> None:
    fates = iter([Hangup(), Hangup(after=30)])

    def fate() -> None:
        for hangup in fates:
            raise hangup

    server = replica(fate=fate)
    assert_one_of_each(run(samples_of(server, window=1)), 3)
    assert server.samples_asked == 12 + 2


def test_a_dead_replica_is_probed_until_it_is_back(replica: Callable[..., StandIn]) -> None:
    server = replica(ill=True)

    def recover() -> None:
        server.asked("/health", times=4)
        assert not server.samples_asked
        server.ill = False

    doctor = threading.Thread(target=recover)
    doctor.start()
    assert_one_of_each(run(samples_of(server, window=2)), 3)
    doctor.join()


def test_the_error_without_a_usable_replica_names_the_fault_of_each(replica: Callable[..., StandIn]) -> None:
    ill, gone = replica(ill=True), replica()
    gone.kill()
    with pytest.raises(ReplicaUnreachable, match="no replica has been usable") as caught:
        run(samples_of(ill, gone, patience=0.2, window=1))
    assert f"{ill.url}/health answered 503" in str(caught.value)
    assert f"cannot reach {gone.url}" in str(caught.value)
    gone.start()  # for the fixture to kill


def test_a_sample_that_fails_everywhere_raises(replica: Callable[..., StandIn]) -> None:
    with pytest.raises(ReplicaUnreachable, match=r"sample 0 of prompt 0 failed 3 times.*answered 500: .*as the test"):
        run(samples_of(replica(fate=lambda: 500), replica(fate=lambda: 500), attempts=3, k=1, prompts=[[1]]))


@pytest.mark.parametrize(("status", "error"), [(400, ReplicaRefused), (401, ConfigError)])
def test_an_invalid_request_is_not_retried(
    replica: Callable[..., StandIn], status: int, error: type[HubsyncError]
) -> None:
    server = replica(fate=lambda: status)
    with pytest.raises(error):
        run(samples_of(server, k=1, prompts=[[1]]))
    assert server.samples_asked == 1


def test_the_error_without_metrics_offers_metrics_or_a_fixed_window() -> None:
    with pytest.raises(ReplicaUnsuitable, match="--disable-log-stats, or sample with a fixed window"):
        Load.parse("python_info 1.0\n")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        "[]",
        "[" * 100_000,
        "{",
        '{"choices": []}',
        '{"choices": [{}]}',
        '{"choices": [{"token_ids": ["a"]}]}',
    ],
)
def test_an_invalid_answer_raises_after_the_retries(
    replica: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    server = replica()
    monkeypatch.setattr(server, "_sample", lambda *_, **__: (200, answer))
    with pytest.raises(ReplicaUnreachable, match="failed 2 times"):
        run(samples_of(server, attempts=2, k=1, prompts=[[1]]))


def test_invalid_metrics_are_reported_as_the_error_of_the_replica(replica: Callable[..., StandIn]) -> None:
    server = replica(waiting="many")
    with pytest.raises(ReplicaUnreachable, match="that is not a number: many"):
        run(samples_of(server, patience=0.2))


# --- windows


def test_no_replica_has_more_than_its_window(replica: Callable[..., StandIn]) -> None:
    held = threading.Event()
    servers = [replica(fate=lambda: held.wait(60) and None) for _ in range(3)]
    most = []

    def watch() -> None:
        while sum(server.samples_asked for server in servers) < 12:
            threading.Event().wait(0.002)
        most.extend(server.samples_asked for server in servers)
        held.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert_one_of_each(run(samples_of(*servers, k=5, window=4)), 5)
    watcher.join()
    assert most == [4, 4, 4]


def test_replicas_with_free_capacity_get_equal_shares(replica: Callable[..., StandIn]) -> None:
    held = threading.Event()
    servers = [replica(fate=lambda: held.wait(60) and None) for _ in range(3)]

    async def check() -> list[int]:
        async with Sampler([server.url for server in servers], window=12, poll_s=0.01) as sampler:
            for server in servers:  # probed more than once: known to be healthy
                await asyncio.to_thread(server.asked, "/health", 2)
            samples = [asyncio.ensure_future(anext(sampler.sample([[1]], 1, seed=SEED))) for _ in range(12)]
            while sum(server.samples_asked for server in servers) < 12:
                await asyncio.sleep(0.002)
            shares = [server.samples_asked for server in servers]
            held.set()
            await asyncio.gather(*samples)
            return shares

    assert run(check()) == [4, 4, 4]


def test_a_replica_with_a_long_queue_gets_less(replica: Callable[..., StandIn]) -> None:
    held = threading.Event()
    busy, idle = (replica(fate=lambda: held.wait(60) and None, waiting=waiting) for waiting in (100, 0))

    async def check() -> None:
        window = AdaptiveWindow(initial_window=4, max_window=8)
        async with Sampler([busy.url, idle.url], window=window, poll_s=0.01) as sampler:
            while sampler.windows[busy.url] > 1:
                await asyncio.sleep(0.002)
            samples = [asyncio.ensure_future(anext(sampler.sample([[1]], 1, seed=SEED))) for _ in range(5)]
            while busy.samples_asked + idle.samples_asked < 5:
                await asyncio.sleep(0.002)
            held.set()
            await asyncio.gather(*samples)

    run(check())
    assert (busy.samples_asked, idle.samples_asked) == (1, 4)


def test_metrics_of_several_engines_add_up_and_similar_names_are_not_mixed() -> None:
    engines = METRICS.format(waiting=2, finished=5, queue_s=1.5, prefill_s=1e-1) * 2
    assert Load.parse(engines) == Load(waiting=4, finished=10, delay_s=3.2)


SETTINGS = AdaptiveWindow(initial_window=8, min_window=2, max_window=32, queue_target=3, prefill_queue_target=1.0)
observations = st.tuples(
    st.integers(0, 10),  # waiting
    st.integers(-3, 40),  # finished since the last poll; the server restarts below 0
    st.floats(0, 5),  # seconds to the end of the prefill, for each request
    st.integers(0, 40),  # outstanding meanwhile
)


@given(st.lists(observations, max_size=60))
def test_a_window_follows_the_load_within_its_bounds(steps: list[tuple[int, int, float, int]]) -> None:
    window = RequestLimit(SETTINGS)
    finished, delay_s = 100.0, 0.0
    window.observe(Load(0, finished, delay_s))
    for waiting, more, delay, outstanding in steps:
        before = window.size
        window.use(outstanding)
        finished, delay_s = (finished + more, delay_s + more * delay) if more >= 0 else (0.0, 0.0)
        window.observe(Load(waiting, finished, delay_s))
        overloaded = waiting > 3
        late = more > 0 and delay > 1.01
        assert 2 <= window.size <= 32
        assert before // 2 <= window.size <= before + 1 or window.size == 2
        if overloaded or late:
            assert window.size <= before
        if window.size > before:
            assert outstanding >= before, "the whole window was in use"
        if not overloaded and not (more > 0 and delay > 0.99) and outstanding >= before:
            assert window.size == min(32, before + 1)


def test_a_window_shrinks_once_for_what_was_sent_before() -> None:
    window = RequestLimit(SETTINGS)
    window.observe(Load(0, 0, 0))
    window.use(8)
    window.observe(Load(20, 0, 0))
    assert window.size == 4
    window.observe(Load(12, 5, 50.0))  # 5 of the 8 have finished late, as expected
    assert window.size == 4
    window.observe(Load(12, 9, 90.0))  # others are late too
    assert window.size == 2


@pytest.mark.parametrize("sizes", [(0, 1, 2), (3, 2, 4), (1, 5, 4)])
def test_bounds_that_contradict_each_other_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="min_window <= initial_window <= max_window"):
        AdaptiveWindow(min_window=sizes[0], initial_window=sizes[1], max_window=sizes[2])


# --- leaving


def test_leaving_the_loop_cancels_requests_in_progress(replica: Callable[..., StandIn]) -> None:
    server = replica()

    async def first() -> Sample:
        async with Sampler([server.url], window=2) as sampler:
            async for sample in sampler.sample([[1]], 1000, seed=SEED):
                return sample
        raise AssertionError

    assert run(first()).replica == server.url
    assert server.samples_asked < 1000


def test_a_cancelled_consumer_frees_its_capacity(replica: Callable[..., StandIn]) -> None:
    held = threading.Event()
    server = replica(fate=lambda: held.wait(60) and None)

    async def check() -> list[Sample]:
        async with Sampler([server.url], window=1) as sampler:
            stuck = asyncio.ensure_future(anext(sampler.sample([[1]], 2, seed=SEED)))
            await asyncio.to_thread(server.asked, "/inference/v1/generate")
            stuck.cancel()
            held.set()
            return [sample async for sample in sampler.sample(PROMPTS, 3, seed=SEED)]

    assert_one_of_each(run(check()), 3)


def test_closing_raises_in_waiting_consumers(replica: Callable[..., StandIn]) -> None:
    held = threading.Event()
    server = replica(fate=lambda: held.wait(60) and None)

    async def check() -> None:
        async with Sampler([server.url]) as sampler:
            waiting = asyncio.ensure_future(anext(sampler.sample([[1]], 1, seed=SEED)))
            await asyncio.to_thread(server.asked, "/inference/v1/generate")
        with pytest.raises(ConfigError, match="closed before"):
            await waiting
        held.set()
        with pytest.raises(ConfigError, match="use it within"):
            await anext(sampler.sample([[1]], 1))

    run(check())


def test_a_closed_sampler_is_not_opened_again(replica: Callable[..., StandIn]) -> None:
    async def check() -> None:
        sampler = Sampler([replica().url])
        await sampler.close()
        async with sampler:
            pass

    with pytest.raises(ConfigError, match="make a new one"):
        run(check())


@pytest.mark.parametrize(
    ("replicas", "says"),
    [
        ([], "at least one server"),
        ("http://a", "at least one server"),
        (["a:8000"], "not the URL"),
        ([None], "not the URL"),
        (["http://a", "http://a/"], "named twice"),
    ],
)
def test_replicas_must_be_distinct_urls(replicas: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampler(replicas)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"window": "8"},
        {"attempts": 0},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"patience": -1},
        {"poll_s": 0},
    ],
)
def test_invalid_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="|".join(options)):
        Sampler(["http://a"], **options)


@pytest.mark.parametrize(
    ("prompts", "k", "sampling", "says"),
    [
        ("hello", 1, {}, "prompts must be a list"),
        ([[1], None], 1, {}, "a prompt is a text"),
        ([["one"]], 1, {}, "a prompt is a text"),
        ([[1]], -1, {}, "k must be"),
        ([[1]], 1.5, {}, "k must be"),
        ([[1]], 1, {"n": 4}, "n cannot be chosen"),
        ([[1]], 1, {"seed": "one"}, "seed must be"),
    ],
)
def test_an_impossible_request_is_refused_before_it_is_sent(
    replica: Callable[..., StandIn], prompts: Any, k: Any, sampling: dict[str, Any], says: str
) -> None:
    server = replica()

    async def check() -> None:
        async with Sampler([server.url]) as sampler:
            await anext(sampler.sample(prompts, k, **sampling))

    with pytest.raises(ConfigError, match=says):
        run(check())
    assert server.samples_asked == 0


def test_no_samples_of_no_prompts(replica: Callable[..., StandIn]) -> None:
    assert run(samples_of(replica(), k=0)) == run(samples_of(replica(), prompts=[])) == []
