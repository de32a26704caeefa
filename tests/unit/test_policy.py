from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.routing.confidence import Calibrator
from tutelage.routing.policy import StudentSnapshot, accept, again, choose_student, judge, score_again
from tutelage.routing.promises import Assurance
from tutelage.routing.signs import Reading, Signs

SURE = Calibrator("platt", n=120, a=1.0, b=0.0)
UNKNOWN = Calibrator("unknown", n=7)
STUDENT = StudentSnapshot("acme-sums", 1, "student", "sums", "d1", SURE, 0.85)


def test_a_request_of_no_domain_goes_to_the_teacher() -> None:
    choice = choose_student(None, [STUDENT], quality_floor=0.85)
    assert choice.student is None
    assert "no known domain" in choice.reason


def test_a_domain_without_a_student_goes_to_the_teacher() -> None:
    choice = choose_student("colours", [STUDENT], quality_floor=0.85)
    assert choice.student is None
    assert "colours" in choice.reason


def test_a_student_that_can_never_be_sure_enough_is_not_tried() -> None:
    hopeless = Calibrator("platt", n=120, a=0.0, b=0.0)  # right half of the time, whatever the score
    for calibrator in (UNKNOWN, hopeless):
        assert choose_student("sums", [replace(STUDENT, calibrator=calibrator)], quality_floor=0.85).student is None


def test_what_is_promised_must_be_assured_by_outcomes_and_is_told() -> None:
    student = replace(STUDENT, calibrator=replace(SURE, assurance=Assurance((1.0, 3.0), (0.8, 0.92))))
    assert judge(student, 2.5, needed=0.9, promised=None).accepted
    refused = judge(student, 2.5, needed=0.9, promised=0.9)
    assert (refused.accepted, "0.800, 0.900 is promised" in refused.reason) == (False, True)
    assert judge(student, 3.0, needed=0.9, promised=0.9).accepted
    doubted = replace(student, calibrator=replace(student.calibrator, reliability=0.95))
    assert not judge(doubted, 3.0, needed=0.9, promised=0.9).accepted


def test_the_highest_tier_then_the_newest_version_tries_first_in_any_order() -> None:
    team = [STUDENT, replace(STUDENT, version=3), replace(STUDENT, tier="ta", version=1), replace(STUDENT, tier="ta", version=2)]
    for order in permutations(team):
        assert choose_student("sums", order, quality_floor=0.85).student == team[-1]


@pytest.mark.parametrize(("score", "accepted"), [(1.7, False), (1.8, True)])
def test_an_answer_is_given_when_its_confidence_reaches_the_threshold(score: float, accepted: bool) -> None:
    assert accept(STUDENT, score, threshold=0.85).accepted is accepted


@given(st.floats(-20, 16), st.floats(0, 1), st.floats(0, 1))
def test_the_stricter_of_both_thresholds_holds(score: float, own: float, asked: float) -> None:
    found = accept(replace(STUDENT, threshold=own), score, threshold=asked)
    assert found.accepted == (found.confidence >= max(own, asked))


def test_an_answer_of_a_student_with_too_few_outcomes_is_refused_and_says_so() -> None:
    found = accept(replace(STUDENT, calibrator=UNKNOWN), 16.0, threshold=0.5)
    assert not found.accepted
    assert "only 7 verified outcomes" in found.reason


def test_a_student_is_asked_again_only_where_that_can_help() -> None:
    surer = replace(SURE, reading=Reading(agreement=4.0, agreement_mean=0.5))
    student, short = replace(STUDENT, calibrator=replace(SURE, again=surer)), Signs(1.0, None, 3)

    found = again(student, short, needed=0.9, promised=None)
    assert found is not None
    assert judge(found, score_again(found, short, 1.0), needed=0.9).accepted
    assert not judge(found, score_again(found, short, 1 / 3), needed=0.9).accepted
    assert again(student, short._replace(score=-9.0), needed=0.9, promised=None) is None, "not even if all agreed"
    assert again(student, short, needed=0.9, promised=0.9) is None, "nothing is promised of such answers"
    assert again(STUDENT, short, needed=0.9, promised=None) is None, "agreement is not proven to tell anything"
