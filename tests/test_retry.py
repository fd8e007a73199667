"""Waits end at their deadline, back off, and state what they wait for."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator

import pytest

from hubsync import retry as waits
from hubsync.errors import BucketDenied, BucketUnavailable
from hubsync.retry import Deadline, attempts, reporting, retry, wait_reporting


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(waits.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(waits.time, "sleep", clock.sleep)
    return clock


def failing(times: int, error: Exception) -> Iterator[object]:
    for _ in range(times):
        yield error
    while True:
        yield "done"


def act_on(outcomes: Iterator[object]) -> object:
    outcome = next(outcomes)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def test_a_call_that_succeeds_is_made_once(clock: Clock) -> None:
    assert retry(lambda: 7, timeout=1.0, on=BucketUnavailable, waiting_for="it") == 7
    assert clock.pauses == []


def test_a_call_is_repeated_while_its_error_may_pass(clock: Clock) -> None:
    outcomes = failing(3, BucketUnavailable("no connection"))
    result = retry(lambda: act_on(outcomes), timeout=60.0, on=BucketUnavailable, waiting_for="it")
    assert result == "done"
    assert len(clock.pauses) == 3


def test_other_errors_are_raised_at_once(clock: Clock) -> None:
    outcomes = failing(1, BucketDenied("no access"))
    with pytest.raises(BucketDenied):
        retry(lambda: act_on(outcomes), timeout=60.0, on=BucketUnavailable, waiting_for="it")
    assert clock.pauses == []


def test_the_last_error_is_raised_at_the_deadline(clock: Clock) -> None:
    outcomes = failing(1000, BucketUnavailable("no connection"))
    with pytest.raises(BucketUnavailable, match="no connection"):
        retry(lambda: act_on(outcomes), timeout=60.0, on=BucketUnavailable, waiting_for="it")
    assert clock.now == pytest.approx(160.0)


def test_a_timeout_of_zero_makes_one_attempt(clock: Clock) -> None:
    assert list(attempts(0.0, waiting_for="it")) == [0.0]


def test_pauses_double_up_to_the_longest_with_jitter(clock: Clock) -> None:
    for _ in attempts(60.0, waiting_for="it", first=1.0, longest=8.0):
        pass
    *pauses, _ = clock.pauses  # the last one is cut off at the deadline
    for pause, longest in zip(pauses, [1.0, 2.0, 4.0] + [8.0] * len(pauses), strict=False):
        assert longest / 2 <= pause <= longest
    assert len({pause / 8.0 for pause in pauses[3:]}) > 1


def test_waits_share_a_deadline(clock: Clock) -> None:
    deadline = Deadline(10.0)
    for _ in attempts(deadline, waiting_for="the first"):
        pass
    assert list(attempts(deadline, waiting_for="the second")) == [0.0]
    assert deadline.passed


def test_a_wait_without_a_limit_is_reported_in_the_log(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, waits.__name__)
    for _ in attempts(math.inf, waiting_for="the server to load", longest=1.0):
        if clock.now > 200.0:
            break
    assert [record.getMessage() for record in caplog.records] == ["still waiting for the server to load"] * 3


def test_the_first_error_is_reported_at_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = failing(2, BucketUnavailable("no connection"))
    retry(lambda: act_on(outcomes), timeout=60.0, on=BucketUnavailable, waiting_for="the bucket")
    assert [record.getMessage() for record in caplog.records] == ["waiting for the bucket, up to 60 s: no connection"]


def test_a_blocking_wait_reports_and_ends_at_its_deadline(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    def never(seconds: float) -> bool:
        clock.sleep(seconds)
        return False

    assert not wait_reporting(never, 75.0, waiting_for="the upload")
    assert clock.pauses == [30.0, 30.0, 15.0]
    assert caplog.messages == [
        "still waiting for the upload, 45 s left",
        "still waiting for the upload, 15 s left",
    ]


def test_a_blocking_wait_without_a_deadline_reports_too(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    def at_last(seconds: float) -> bool:
        clock.sleep(seconds)
        return clock.now >= 160.0

    assert wait_reporting(at_last, waiting_for="the upload")
    assert caplog.messages == ["still waiting for the upload"]


def test_a_wait_that_cannot_be_interrupted_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    reported = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())
            reported.set()

    listener = Listener()
    monkeypatch.setattr(waits, "REPORT_SECONDS", 0.01)
    waits.logger.addHandler(listener)
    try:
        with reporting("the other ranks"):
            assert reported.wait(60)
    finally:
        waits.logger.removeHandler(listener)
    assert told[0] == "still waiting for the other ranks"
