"""The gap rule: frequency × cost × failure, and when a gap waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.gaps import EvolveSettings, Traffic, measure

SETTINGS = EvolveSettings(min_requests=100, min_failure_rate=0.2, max_students=2, retry_growth=1.5)
TRAFFIC = st.builds(
    Traffic,
    domain=st.text("abcdef", min_size=1, max_size=3),
    known=st.integers(0, 5000),
    requests=st.integers(0, 5000),
    failed=st.integers(0, 5000),
    cost_microusd=st.integers(0, 10**9),
)


def test_the_dearest_failures_come_first_and_only_as_many_as_a_cycle_takes_on() -> None:
    gaps = measure(
        [Traffic("cheap", 500, 500, 500, 1_000), Traffic("dear", 500, 500, 500, 90_000), Traffic("middle", 500, 500, 500, 9_000)],
        SETTINGS,
        trained_on={},
    )

    assert [(g.domain, g.decision) for g in gaps] == [("dear", "train"), ("middle", "train"), ("cheap", "wait")]
    assert "2 gaps of this cycle are worth more" in gaps[2].reason


def test_few_requests_or_few_failures_wait_and_say_why() -> None:
    few, fine = measure([Traffic("few", 99, 99, 99, 10_000), Traffic("fine", 400, 400, 79, 1_000)], SETTINGS, trained_on={})

    assert (few.decision, fine.decision) == ("wait", "wait")
    assert "100 are needed" in few.reason
    assert "already answer 80%" in fine.reason


def test_a_domain_is_tried_again_only_when_there_is_half_as_much_again_to_learn_from() -> None:
    def decision(known: int) -> str:
        return measure([Traffic("sums", known, 400, 400, 1_000)], SETTINGS, trained_on={"sums": 600})[0].decision

    assert (decision(899), decision(900)) == ("wait", "train")


@given(st.lists(TRAFFIC, max_size=8, unique_by=lambda t: t.domain))
def test_gaps_are_ordered_bounded_in_number_and_each_has_a_reason(traffic: list[Traffic]) -> None:
    gaps = measure(traffic, SETTINGS, trained_on={})

    assert sorted(g.domain for g in gaps) == sorted(t.domain for t in traffic)
    assert [g.priority for g in gaps] == sorted((g.priority for g in gaps), reverse=True)
    assert sum(g.decision == "train" for g in gaps) <= SETTINGS.max_students
    assert all(g.reason for g in gaps)
