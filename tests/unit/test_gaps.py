"""The gap rule: what a second of training is expected to save, and when a gap waits."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.evidence import Tally
from tutelage.evolution.gaps import EvolveSettings, Gap, Traffic, Tried, measure
from tutelage.settings import CHECKOUT

SETTINGS = EvolveSettings(min_requests=100, min_failure_rate=0.2, max_students=2, retry_growth=1.5)
COUNT = st.integers(0, 5000)
TRAFFIC = st.builds(
    lambda domain, known, requests, failed, cost: Traffic(domain, known, requests, min(failed, requests), cost),
    domain=st.text("abcdef", min_size=1, max_size=3), known=COUNT, requests=COUNT, failed=COUNT, cost=st.integers(0, 10**9),
)  # fmt: skip


def only(traffic: Traffic, settings: EvolveSettings = SETTINGS, tried: Tried | None = None, **more: float) -> Gap:
    return measure([traffic], settings, tried={traffic.domain: tried} if tried else {}, **more)[0]


def test_the_dearest_failures_come_first_and_only_as_many_as_a_cycle_takes_on() -> None:
    gaps = measure(
        [Traffic("cheap", 500, 500, 500, 1_000), Traffic("dear", 500, 500, 500, 90_000), Traffic("middle", 500, 500, 500, 9_000)],
        SETTINGS,
        tried={},
    )

    assert [(g.domain, g.decision) for g in gaps] == [("dear", "train"), ("middle", "train"), ("cheap", "wait")]
    assert "2 gaps of this cycle are worth more" in gaps[2].reason


def test_few_requests_or_few_failures_wait_and_say_why() -> None:
    few, fine = measure([Traffic("few", 99, 99, 99, 10_000), Traffic("fine", 400, 400, 79, 1_000)], SETTINGS, tried={})

    assert (few.decision, fine.decision) == ("wait", "wait")
    assert "100 are needed" in few.reason
    assert "already answer 80%" in fine.reason


def test_a_domain_is_tried_again_only_when_there_is_half_as_much_again_to_learn_from() -> None:
    def decision(known: int) -> str:
        return only(Traffic("sums", known, 400, 400, 1_000), tried=Tried(600)).decision

    assert (decision(899), decision(900)) == ("wait", "train")


def test_rates_come_with_intervals_and_money_by_the_day() -> None:
    gap = only(Traffic("sums", 400, 400, 200, 60_000, escalated=100, days=2))

    assert (gap.failure_rate, gap.escalation_rate) == (0.5, 0.25)
    assert gap.failure_95[0] < 0.5 < gap.failure_95[1]
    assert gap.escalation_95[0] < 0.25 < gap.escalation_95[1]
    assert (gap.per_day, gap.cost_per_day_microusd) == (200, 30_000)


def test_what_a_student_could_not_learn_comes_after_what_nobody_tried_and_that_after_what_one_nearly_learned() -> None:
    traffic = [Traffic(name, 900, 400, 400, 10_000) for name in ("hopeless", "untried", "promising")]
    gaps = measure(traffic, SETTINGS, tried={"hopeless": Tried(100, learnable=False), "promising": Tried(100, accuracy=0.8)})

    assert [g.domain for g in gaps] == ["promising", "untried", "hopeless"]


def test_a_student_that_trains_in_half_the_time_comes_first() -> None:
    traffic = [Traffic(name, 900, 400, 400, 10_000) for name in ("slow", "quick")]
    tried = {"slow": Tried(100, accuracy=0.5, core_seconds=800), "quick": Tried(100, accuracy=0.5, core_seconds=400)}

    assert [g.domain for g in measure(traffic, SETTINGS, tried=tried)] == ["quick", "slow"]


def test_the_days_budget_is_spent_in_order_and_what_is_too_long_for_the_rest_waits() -> None:
    settings = EvolveSettings(training_seconds_per_day=1000, training_seconds=600)
    traffic = [Traffic(name, 500, 500, 500, cost) for name, cost in (("first", 90_000), ("second", 50_000))]
    tried = {"third": Tried(100, accuracy=0.5, core_seconds=300)}
    gaps = measure([*traffic, Traffic("third", 500, 500, 500, 1_000)], settings, tried=tried)

    assert [(g.domain, g.decision) for g in gaps] == [("first", "train"), ("second", "wait"), ("third", "train")]
    assert "400 are left of today's" in gaps[1].reason
    assert only(traffic[0], settings, spent_seconds=500).decision == "wait"


@pytest.mark.parametrize(("right", "kind"), [(98, "knowledge"), (88, "skill"), (0, "skill")])
def test_what_the_most_similar_earlier_answer_knows_is_knowledge_once_that_is_certain(right: int, kind: str) -> None:
    assert only(Traffic("faq", 500, 500, 500, 9_000, recalled=Tally(right, 0, 100 - right))).kind == kind


def test_knowledge_is_retrieved_where_the_gateway_can_and_learned_elsewhere() -> None:
    traffic = Traffic("faq", 500, 500, 500, 9_000, recalled=Tally(98, 0, 2))

    assert only(traffic).decision == "train"
    retrieved = only(traffic, EvolveSettings(retrieval=True))
    assert retrieved.decision == "retrieve"
    assert "98 of 100" in retrieved.reason


@given(st.lists(TRAFFIC, max_size=8, unique_by=lambda t: t.domain))
def test_gaps_are_ordered_bounded_in_number_and_each_has_a_reason(traffic: list[Traffic]) -> None:
    gaps = measure(traffic, SETTINGS, tried={})

    assert sorted(g.domain for g in gaps) == sorted(t.domain for t in traffic)
    assert [g.priority for g in gaps] == sorted((g.priority for g in gaps), reverse=True)
    assert sum(g.decision == "train" for g in gaps) <= SETTINGS.max_students
    assert all(g.reason for g in gaps)


def test_without_spawning_by_itself_gaps_are_proposed_and_the_one_that_is_asked_for_is_trained() -> None:
    settings = EvolveSettings(auto_spawn_students=False)
    traffic = [Traffic("sums", 400, 400, 200, 60_000), Traffic("dates", 400, 400, 200, 90_000), Traffic("few", 9, 9, 9, 60_000)]

    assert {g.domain: g.decision for g in measure(traffic, settings, tried={})} == {"dates": "propose", "sums": "propose", "few": "wait"}
    asked = measure(traffic, settings, tried={}, asked=["sums", "few"])
    assert {g.domain: g.decision for g in asked} == {"dates": "propose", "sums": "train", "few": "wait"}


def test_a_gateway_that_is_asked_for_its_gaps_imports_nothing_slow() -> None:
    program = """
import sys
from tutelage import gaps
from tutelage.evolution.gaps import EvolveSettings, Traffic, measure
measure([Traffic("sums", 400, 400, 200, 60_000)], EvolveSettings(), tried={})
print([name for name in ("scipy", "sklearn", "pandas", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
