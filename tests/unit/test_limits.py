"""Plans, what is agreed otherwise, and what one worker lets through while nobody counts for all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import InvalidRequest
from tutelage.gateway.admission import OUTAGE_SHARE, Share
from tutelage.gateway.limits import PLANS, Limits, agreed, check


def test_the_plans_are_the_published_table() -> None:
    table = {name: (p.limits.queries_per_day, p.models, p.limits.concurrent, p.storage_bytes) for name, p in PLANS.items()}
    assert table == {
        "free": (1_000, 3, 5, 10**8),
        "pro": (50_000, 20, 50, 10**10),
        "enterprise": (1_000_000, 100, 1_000, 10**12),
    }
    assert [p.limits.requests_per_minute for p in PLANS.values()] == [60, 3_000, None]


def test_what_is_agreed_replaces_the_plan_and_none_lifts_a_limit() -> None:
    limits = agreed("free", {"queries_per_day": 7, "concurrent": None})
    assert (limits.queries_per_day, limits.concurrent, limits.requests_per_minute) == (7, None, 60)


@pytest.mark.parametrize("wrong", [{"queries": 5}, {"concurrent": 0}, {"queries_per_day": -1}, {"tokens_per_minute": "many"}])
def test_an_unknown_or_wrong_limit_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        check(wrong)


@given(
    limit=st.integers(1, 2_000_000),
    workers=st.integers(1, 16),
    arrivals=st.lists(st.floats(0, 100), min_size=1, max_size=200),
)
def test_all_workers_together_stay_within_the_stated_share_of_a_day(limit: int, workers: int, arrivals: list[float]) -> None:
    shares = [Share(Limits(queries_per_day=limit)) for _ in range(workers)]
    admitted, now = 0, 0.0
    for number, gap in enumerate(arrivals):
        now += gap
        share = shares[number % workers]
        if share.refusal(now, workers=workers) is None:
            share.take()
            admitted += 1
    assert admitted <= math.floor(OUTAGE_SHARE * limit)


@given(limit=st.integers(1, 600), workers=st.integers(1, 8), gaps=st.lists(st.floats(0, 5), min_size=1, max_size=300))
def test_one_workers_rate_never_exceeds_its_part(limit: int, workers: int, gaps: list[float]) -> None:
    share = Share(Limits(requests_per_minute=limit))
    part, now, admitted = max(1.0, limit / workers), 1.0, 0
    for gap in gaps:
        now += gap
        if share.refusal(now, workers=workers) is None:
            share.take()
            admitted += 1
    assert admitted <= part + (now - 1.0) * part / 60 + 1e-6


def test_running_requests_are_bounded_and_an_ended_one_makes_room() -> None:
    share = Share(Limits(concurrent=4))
    for _ in range(2):
        assert share.refusal(1.0, workers=2) is None
        share.take()
    assert share.refusal(1.0, workers=2) == "concurrent"
    share.running -= 1
    assert share.refusal(1.0, workers=2) is None
