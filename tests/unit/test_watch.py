"""The watch over a version that serves: when it alarms, and that it seldom does for nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.watch import Detector, WatchSettings, follow

SETTINGS = WatchSettings()
ACCEPTED = SETTINGS.detector("acceptance", 0.9)


def test_a_version_that_stays_as_good_is_left_alone() -> None:
    watched = follow("acceptance", ACCEPTED, ([True] * 9 + [False]) * 200)

    assert not watched.alarm
    assert "200 of 2000 outcomes bad" in watched.reason


def test_a_version_that_only_fails_is_noticed_within_ten_outcomes() -> None:
    watched = follow("acceptance", ACCEPTED, [False] * 50)

    assert watched.alarm
    assert watched.seen <= 10
    assert watched.reason.endswith("alarm")


def test_an_alarm_is_final_and_later_outcomes_are_not_looked_at() -> None:
    alarmed = follow("acceptance", ACCEPTED, [False] * 50)

    assert follow("acceptance", ACCEPTED, [True] * 500, alarmed) == alarmed


@given(st.lists(st.booleans(), max_size=80), st.integers(0, 80))
def test_outcomes_may_come_in_any_number_of_parts(outcomes: list[bool], cut: int) -> None:
    parts = follow("acceptance", ACCEPTED, outcomes[cut:], follow("acceptance", ACCEPTED, outcomes[:cut]))

    assert parts == follow("acceptance", ACCEPTED, outcomes)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e4)), min_size=1, max_size=5))
def test_while_nothing_is_worse_the_evidence_grows_by_one_an_outcome_on_the_mean(states: list[tuple[float, ...]]) -> None:
    """M − t is a martingale at the baseline: hence the mean number of outcomes before a false alarm is at least the limit."""
    state = np.array(states)
    good, bad = (ACCEPTED.value(ACCEPTED.after(state, np.full(len(states), outcome))) for outcome in (True, False))

    assert 0.9 * good + 0.1 * bad == pytest.approx(ACCEPTED.value(state) + 1)


def test_many_watches_at_once_are_the_same_as_each_alone() -> None:
    outcomes = np.random.default_rng(1).random((30, 4)) < 0.85
    together = np.tile(ACCEPTED.start(), (4, 1))
    for row in outcomes:
        together = ACCEPTED.after(together, row)

    for column in range(4):
        assert follow("acceptance", ACCEPTED, outcomes[:, column].tolist()).state == pytest.approx(tuple(together[column]))


@pytest.mark.parametrize(("signal", "expected"), [("error", 0.99), ("truncation", 0.95), ("latency", 0.95), ("acceptance", 0.8)])
def test_service_levels_are_held_to_their_own_and_acceptance_to_its_frozen_share(signal: str, expected: float) -> None:
    assert SETTINGS.detector(signal, 0.8).baseline == pytest.approx(expected)  # type: ignore[arg-type]


def test_a_baseline_of_all_right_still_allows_a_failure() -> None:
    assert not follow("acceptance", Detector(1.0, 1e5), [*[True] * 50, False]).alarm
