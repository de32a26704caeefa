"""The breaker and the retry budget: trouble upstream is left alone, and never answered with more trouble."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.fleet.breaker import LONGEST_SECONDS, OPEN_SECONDS, RUN, Breaker
from tutelage.fleet.retries import FLOOR, SHARE, WINDOW_SECONDS, Budget, wait_seconds


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(RUN):
        breaker.failed(now)
    return breaker


def test_a_run_of_failures_opens_it_and_one_success_in_between_does_not() -> None:
    breaker = Breaker()
    for _ in range(RUN - 1):
        breaker.failed(0.0)
    breaker.succeeded(0.0)
    breaker.failed(0.0)
    assert breaker.state(0.0) == "closed"
    assert opened().state(1.0) == "open"
    assert not opened().admits(1.0)
    assert opened().until(1.0) == OPEN_SECONDS - 1.0


def test_failing_half_of_the_time_opens_it_without_a_run() -> None:
    breaker = Breaker()
    for n in range(20):
        (breaker.failed if n % 2 else breaker.succeeded)(float(n) / 10)
    assert breaker.state(2.0) == "open"


def test_old_failures_are_forgotten() -> None:
    breaker = Breaker()
    for n in range(19):
        (breaker.failed if n % 2 else breaker.succeeded)(0.0)
    breaker.failed(100.0)
    assert breaker.state(100.0) == "closed"


def test_one_probe_at_a_time_decides_whether_it_closes_or_stays_open_for_longer() -> None:
    breaker = opened()
    later = OPEN_SECONDS + 0.1
    assert breaker.state(later) == "half-open"
    assert [breaker.admits(later) for _ in range(3)] == [True, False, False]
    breaker.failed(later)
    assert breaker.until(later) == 2 * OPEN_SECONDS
    again = later + 2 * OPEN_SECONDS
    assert breaker.admits(again)
    breaker.succeeded(again)
    assert breaker.state(again) == "closed"
    assert breaker.admits(again)


def test_a_probe_whose_caller_went_away_makes_room_for_another() -> None:
    breaker = opened()
    assert breaker.admits(OPEN_SECONDS)
    breaker.left()
    assert breaker.admits(OPEN_SECONDS)


def test_a_replica_that_asks_to_be_left_alone_rests_and_counts_no_failure() -> None:
    breaker = Breaker()
    breaker.rest(0.0, 3.0)
    assert (breaker.state(1.0), breaker.until(1.0), breaker.failures) == ("resting", 2.0, 0)
    assert breaker.admits(3.0)
    breaker.rest(0.0, 9999.0)
    assert breaker.until(0.0) == LONGEST_SECONDS


@given(st.lists(st.tuples(st.sampled_from(["ok", "fail", "left", "rest"]), st.floats(0, 20)), max_size=80))
def test_it_is_never_shut_for_longer_than_its_longest_time(events: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(), 0.0
    for event, passed in events:
        now += passed
        if event == "rest":
            breaker.rest(now, 30.0)
        elif breaker.admits(now):
            {"ok": breaker.succeeded, "fail": breaker.failed}.get(event, lambda _: breaker.left())(now)
        assert breaker.until(now) <= LONGEST_SECONDS
    assert breaker.state(now + LONGEST_SECONDS) in ("closed", "half-open")


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5)), max_size=100))
def test_retries_stay_within_their_share_of_any_window(steps: list[tuple[float, int]]) -> None:
    budget, now = Budget(), 0.0
    calls: list[float] = []
    retries: list[float] = []
    for passed, wanted in steps:
        now += passed
        budget.called(now)
        calls.append(now)
        for _ in range(wanted):
            if budget.take(now):
                retries.append(now)
        since = int(now) - WINDOW_SECONDS + 1
        seen = sum(int(at) >= since for at in retries)
        assert seen <= max(FLOOR, SHARE * sum(int(at) >= since for at in calls) + 1)


def test_a_quiet_model_may_try_again_a_few_times() -> None:
    budget = Budget()
    budget.called(0.0)
    assert [budget.take(0.0) for _ in range(FLOOR + 2)] == [True] * FLOOR + [False] * 2
    assert budget.take(float(WINDOW_SECONDS))


@pytest.mark.parametrize(("retry", "asked", "least", "most"), [(0, None, 0.0, 0.1), (1, None, 0.0, 0.2), (0, 1.5, 1.5, 1.5)])
def test_the_wait_is_within_its_bound(retry: int, asked: float | None, least: float, most: float) -> None:
    for chance in (0.0, 0.5, 1.0):
        seconds = wait_seconds(retry, chance=chance, asked=asked)
        assert seconds is not None
        assert least <= seconds <= most


def test_nobody_waits_for_a_minute() -> None:
    assert wait_seconds(0, chance=0.5, asked=60.0) is None
