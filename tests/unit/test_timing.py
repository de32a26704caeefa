"""When a cycle begins by itself: by interactions, by time, after a crash, and never while one runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.gaps import EvolveSettings
from tutelage.evolution.timing import Seen, due

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
SETTINGS = EvolveSettings(evolution_interval=100, schedule_hours=24, rest_minutes=10)


def ago(**time: float) -> datetime:
    return NOW - timedelta(**time)


def decided(seen: Seen, settings: EvolveSettings = SETTINGS) -> bool:
    return due(seen, settings, now=NOW).due


def test_a_cycle_begins_at_the_interval_and_not_before() -> None:
    assert not decided(Seen(99, ago(hours=1)))
    assert decided(Seen(100, ago(hours=1)))


def test_a_cycle_begins_on_schedule_where_anything_was_asked() -> None:
    assert decided(Seen(1, ago(hours=24)))
    assert not decided(Seen(0, ago(hours=24)))
    assert not decided(Seen(1, ago(hours=23)))


def test_two_cycles_are_a_rest_apart() -> None:
    seen = Seen(100, ago(hours=1), ended=ago(minutes=9))

    assert not decided(seen)
    assert "12:01:00" in due(seen, SETTINGS, now=NOW).reason
    assert decided(Seen(100, ago(hours=1), ended=ago(minutes=10)))


def test_one_that_was_cut_off_is_begun_again_at_once_and_then_ever_later() -> None:
    assert decided(Seen(5, ago(hours=1), cut_off=True, failures=1, ended=ago(minutes=1)))
    assert not decided(Seen(5, ago(hours=1), cut_off=True, failures=3, ended=ago(minutes=39)))
    assert decided(Seen(5, ago(hours=1), cut_off=True, failures=3, ended=ago(minutes=40)))


def test_a_cycle_that_failed_is_tried_again_after_its_rest() -> None:
    assert not decided(Seen(100, ago(hours=1), failures=2, ended=ago(minutes=19)))
    assert decided(Seen(100, ago(hours=1), failures=2, ended=ago(minutes=20)))


@given(st.builds(Seen, st.integers(0, 10_000), st.just(ago(days=9)), st.just(True), st.booleans(), st.integers(0, 20)))
def test_while_one_runs_none_begins(seen: Seen) -> None:
    assert not decided(seen)


@given(st.builds(Seen, st.integers(0, 10_000), st.just(ago(days=9)), st.booleans(), st.booleans(), st.integers(0, 10**6)))
def test_with_neither_interval_nor_schedule_none_begins_by_itself(seen: Seen) -> None:
    assert not decided(seen, EvolveSettings(evolution_interval=None, schedule_hours=None))


@pytest.mark.parametrize(("preset", "interval", "spawns", "most"), [("aggressive", 50, True, 10), ("stable", 500, False, 5)])
def test_a_preset_sets_what_is_not_said(preset: str, interval: int, spawns: bool, most: int) -> None:
    settings = EvolveSettings.model_validate({"preset": preset})

    assert (settings.evolution_interval, settings.auto_spawn_students, settings.max_models_per_domain) == (interval, spawns, most)
    assert EvolveSettings.model_validate({"preset": preset, "evolution_interval": 7}).evolution_interval == 7
