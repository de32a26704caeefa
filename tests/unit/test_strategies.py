from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.records import Strategy
from tutelage.routing.confidence import Calibrator
from tutelage.routing.estimates import Estimate
from tutelage.routing.policy import Policy, StudentSnapshot
from tutelage.routing.promises import Assurance
from tutelage.routing.strategies import STRATEGIES, Candidate, Plan, Situation, plan

SURE = Calibrator("platt", n=120, a=1.0, b=0.0)
STUDENT = Candidate("acme-sums", "ta", 25, student=StudentSnapshot("acme-sums", 1, "ta", "sums", "d1", SURE, 0.85))
TEACHER = Candidate("big", "teacher", 2_000)
SMALL = Candidate("small", "ta", 100)
POLICY = Policy(0, 0.85, 0.6)
KNOWN = Situation("sums", 0.9, (TEACHER,), (STUDENT,), POLICY, 0.85)


def known(candidate: Candidate, probability: float) -> Candidate:
    return replace(candidate, estimate=Estimate(probability, 200, "isotonic", "as measured", assured=probability))


def names(found: Plan) -> list[str]:
    return [step.candidate.name for step in found.steps]


def test_every_strategy_that_a_tenant_may_have_can_plan() -> None:
    assert set(STRATEGIES) == set(get_args(Strategy))
    for strategy in STRATEGIES:
        found = plan(strategy, KNOWN)
        assert found.strategy == strategy
        assert found.reason


def test_always_teacher_asks_no_student() -> None:
    assert (names(plan("always-teacher", KNOWN)), plan("always-teacher", KNOWN).shape) == (["big"], "always-teacher")


@pytest.mark.parametrize("strategy", ["cascade", "quality"])
def test_a_domain_with_a_student_is_a_cascade_that_ends_at_the_teacher(strategy: Strategy) -> None:
    found = plan(strategy, KNOWN)
    assert (names(found), found.shape, found.steps[0].least, found.steps[1].least) == (["acme-sums", "big"], "cascade", 0.85, None)


def test_a_cascade_goes_from_the_lowest_tier_to_the_highest() -> None:
    young = replace(STUDENT, name="young", tier="student", student=replace(STUDENT.student, name="young", tier="student"))  # type: ignore[type-var]
    assert names(plan("cascade", replace(KNOWN, students=(STUDENT, young)))) == ["young", "acme-sums", "big"]


def test_a_student_that_cannot_be_sure_enough_is_not_tried() -> None:
    found = plan("quality", replace(KNOWN, least=0.999))
    assert (names(found), found.shape) == (["big"], "always-teacher")
    assert "enough verified outcomes" in found.reason


def test_quality_ends_at_the_cheapest_model_that_is_good_enough_by_estimate() -> None:
    good, bad = known(SMALL, 0.9), known(replace(SMALL, name="tiny", microusd=10), 0.7)
    found = plan("quality", replace(KNOWN, students=(), models=(TEACHER, good, bad)))
    assert (names(found), found.shape) == (["small"], "direct")
    assert names(plan("quality", replace(KNOWN, models=(TEACHER, bad)))) == ["acme-sums", "big"]
    assert names(plan("quality", replace(KNOWN, models=(TEACHER, SMALL)))) == ["acme-sums", "big"], "unknown is not good enough"


def test_a_likely_answer_is_not_good_enough_for_quality_until_outcomes_assure_it() -> None:
    likely = replace(SMALL, estimate=Estimate(0.95, 30, "platt", "as measured", assured=0.8))
    assert names(plan("quality", replace(KNOWN, students=(), models=(TEACHER, likely)))) == ["big"]
    found = plan("quality", replace(KNOWN, students=(), models=(TEACHER, likely), least=0.8))
    assert names(found) == ["small"]
    assert "surely is good enough (0.800 reaches 0.800)" in found.reason


def test_a_model_with_the_answer_before_its_eyes_is_as_good_as_that_until_outcomes_say_otherwise() -> None:
    told = replace(SMALL, recalled=0.9)
    found = plan("quality", replace(KNOWN, students=(), models=(TEACHER, told)))
    assert (names(found), "with earlier answers in context" in found.reason) == (["small"], True)
    assert names(plan("quality", replace(KNOWN, students=(), models=(TEACHER, told), least=0.95))) == ["big"]
    seen = replace(told, estimate=Estimate(0.5, 60, "platt", "as measured", assured=0.4))
    assert names(plan("quality", replace(KNOWN, students=(), models=(TEACHER, seen)))) == ["big"]


@pytest.mark.parametrize("strategy", ["cascade", "quality"])
def test_a_stated_minimum_is_asked_of_students_by_assurance_and_not_by_probability_alone(strategy: Strategy) -> None:
    assured = replace(STUDENT.student, calibrator=replace(SURE, assurance=Assurance((0.0, 4.0), (0.8, 0.93))))  # type: ignore[type-var]
    stated = replace(KNOWN, least=0.9, promised=0.9)
    unproven = plan(strategy, stated)
    assert (names(unproven), "is promised" in unproven.reason) == (["big"], True)
    found = plan(strategy, replace(stated, students=(replace(STUDENT, student=assured),)))
    assert (names(found), found.steps[0].promised) == (["acme-sums", "big"], 0.9)


def test_direct_keeps_a_stated_minimum_too() -> None:
    models = (TEACHER, replace(SMALL, estimate=Estimate(0.95, 30, "platt", "as measured", assured=0.8)))
    assert names(plan("direct", replace(KNOWN, students=(), models=models))) == ["small"]
    assert names(plan("direct", replace(KNOWN, students=(), models=models, promised=0.9, least=0.9))) == ["big"]
    assured = replace(STUDENT.student, calibrator=replace(SURE, assurance=Assurance((0.0,), (0.95,))))  # type: ignore[type-var]
    student = known(replace(STUDENT, student=assured), 0.99)
    found = plan("direct", replace(KNOWN, students=(student,), models=models, promised=0.9, least=0.9))
    assert (names(found), found.steps[0].promised) == (["acme-sums"], 0.9)


def test_direct_asks_the_best_performer_of_similar_queries_and_nobody_else() -> None:
    models = (known(TEACHER, 0.9), known(SMALL, 0.95))
    assert names(plan("direct", replace(KNOWN, models=models))) == ["small"]
    strange = plan("direct", replace(KNOWN, models=models, similarity=0.5))
    assert names(strange) == ["acme-sums", "small"]
    assert "no query like it" in strange.reason


def test_parallel_asks_several_at_once_where_the_query_is_novel_only() -> None:
    models = (TEACHER, SMALL, replace(SMALL, name="other"), replace(SMALL, name="fourth"))
    novel = plan("parallel", replace(KNOWN, domain=None, students=(), models=models))
    assert (novel.shape, len(novel.steps), names(novel)[0]) == ("parallel", 3, "big")
    assert plan("parallel", replace(KNOWN, models=models)).shape == "cascade"
    stated = plan("parallel", replace(KNOWN, domain=None, students=(), models=models, promised=0.9))
    assert (names(stated), "promises no quality" in stated.reason) == (["big"], True)


def test_a_budget_is_kept_by_whoever_is_best_within_it() -> None:
    models = (TEACHER, known(SMALL, 0.8))
    assert names(plan("budget", replace(KNOWN, models=models, max_microusd=3_000))) == ["acme-sums", "big"]
    assert names(plan("budget", replace(KNOWN, models=models, max_microusd=2_010))) == ["big"], "both would cost 2,025"
    assert names(plan("budget", replace(KNOWN, models=models, max_microusd=500))) == ["acme-sums", "small"]
    assert names(plan("budget", replace(KNOWN, models=models, max_microusd=30))) == ["acme-sums"]
    refused = plan("budget", replace(KNOWN, models=models, max_microusd=3))
    assert (refused.steps, "25" in refused.reason) == ((), True)


@given(st.sampled_from(list(STRATEGIES)), st.integers(1, 5_000), st.floats(0.5, 1), st.lists(st.floats(0, 1), max_size=4), st.booleans())
def test_no_plan_may_cost_more_than_is_allowed(strategy: Strategy, most: int, least: float, worths: list[float], novel: bool) -> None:
    models = (TEACHER, *(known(replace(SMALL, name=f"m{i}", microusd=50 * (i + 1)), worth) for i, worth in enumerate(worths)))
    domain, students = (None, ()) if novel else ("sums", (STUDENT,))
    found = plan(strategy, replace(KNOWN, models=models, domain=domain, students=students, least=least, max_microusd=most))
    assert found.microusd <= most
    caps = [step.most_microusd for step in found.steps]
    if found.shape == "parallel":
        assert sum(cap or most + 1 for cap in caps) <= most
    elif found.steps:
        before = sum(step.candidate.microusd for step in found.steps[:-1])
        assert caps[-1] is not None
        assert found.steps[-1].candidate.microusd <= caps[-1] <= most - before


@given(st.sampled_from(["cascade", "quality"]), st.floats(0.01, 1))
def test_every_student_step_is_as_strict_as_asked_and_as_the_student_itself(strategy: Strategy, least: float) -> None:
    for step in plan(strategy, replace(KNOWN, least=least)).steps[:-1]:
        assert step.least == max(least, 0.85)


def test_without_a_teacher_students_alone_are_planned() -> None:
    assert names(plan("quality", replace(KNOWN, models=()))) == ["acme-sums"]
