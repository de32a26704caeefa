from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.routing import confidence
from tutelage.routing.confidence import Calibrator
from tutelage.routing.signs import MAX_SCORE, MIN_LABELS, MIN_SCORE, Reading, Signs, agreement, fit, fit_again, lead, read, score


def told(n: int, seed: int, *, by_margin: float, by_length: float = 0.0) -> tuple[list[Signs], list[bool]]:
    """Answers of which the score says something, and the margin and the length as much more as is asked."""
    random = np.random.default_rng(seed)
    scores, margins, tokens = random.normal(1, 2, n), random.exponential(2, n), random.integers(2, 30, n)
    odds = 0.5 * scores + by_margin * (margins - 2) + by_length * (np.log(tokens) - 2.5)
    right = random.random(n) < 1 / (1 + np.exp(-odds))
    rows = zip(scores, margins, tokens, strict=True)
    return [Signs(float(s), float(m), int(t)) for s, m, t in rows], [bool(r) for r in right]


def test_the_score_is_the_log_odds_of_the_whole_answer() -> None:
    assert score([math.log(0.5), math.log(0.5)]) == pytest.approx(math.log(0.25 / 0.75))
    assert score([math.log(0.8)]) == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        ([], MIN_SCORE),
        ([-math.inf], MIN_SCORE),
        ([math.nan], MIN_SCORE),
        ([-0.1, math.nan], MIN_SCORE),
        ([-5000.0], MIN_SCORE),
        ([0.0], MAX_SCORE),
        ([1e-7], MAX_SCORE),
        ([-1e-30], MAX_SCORE),
    ],
)
def test_a_score_stays_within_its_bounds_whatever_the_model_reports(logprobs: list[float], expected: float) -> None:
    assert score(logprobs) == expected


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=20), st.floats(-50, 0))
def test_one_more_token_never_raises_the_score(logprobs: list[float], more: float) -> None:
    assert score([*logprobs, more]) <= score(logprobs) + 1e-9


def test_a_margin_that_tells_more_counts() -> None:
    reading = fit(*told(400, 0, by_margin=1.0))
    assert 1.0 < reading.margin < 4.0  # twice what a nat of the score says
    assert reading.score(Signs(0.0, 5.0, 8)) > reading.score(Signs(0.0, 0.5, 8)) + 4


def test_a_length_that_tells_more_counts() -> None:
    assert fit(*told(400, 1, by_margin=0.0, by_length=-2.0)).length < -1.0


@pytest.mark.parametrize("seed", range(8))
def test_signs_that_say_nothing_seldom_count(seed: int) -> None:
    reading = fit(*told(400, 100 + seed, by_margin=0.0))
    assert abs(reading.margin) < 0.5
    assert abs(reading.length) < 1.0


def test_few_answers_are_read_by_their_score_alone() -> None:
    signs, right = told(MIN_LABELS - 1, 0, by_margin=3.0)
    assert fit(signs, right) == Reading()
    assert Reading().score(signs[0]) == signs[0].score


def test_answers_without_alternatives_are_read_by_their_score_alone() -> None:
    signs, right = told(400, 0, by_margin=1.0)
    assert fit([signs[0]._replace(margin=None), *signs[1:]], right) == Reading()


@pytest.mark.parametrize("right", [True, False])
def test_answers_that_are_all_alike_are_read_by_their_score_alone(right: bool) -> None:
    signs, _ = told(200, 0, by_margin=1.0)
    assert fit(signs, [right] * 200) == Reading()


def test_an_answer_without_the_margin_that_counts_escalates() -> None:
    assert Reading(margin=1.0).score(Signs(MAX_SCORE, None, 3)) == MIN_SCORE


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(0, 10_000))
def test_a_score_read_stays_within_its_bounds(found: float, margin: float, tokens: int) -> None:
    assert MIN_SCORE <= Reading(2.0, 1.0, -3.0, 2.0).score(Signs(found, margin, tokens)) <= MAX_SCORE


def test_a_calibrator_keeps_how_it_reads() -> None:
    signs, right = told(400, 0, by_margin=1.0)
    calibrator = confidence.fit_signs(signs, right)
    assert calibrator.reading == fit(signs, right) != Reading()
    assert Calibrator.from_dict(calibrator.to_dict()) == calibrator
    assert Calibrator.from_dict({k: v for k, v in calibrator.to_dict().items() if k != "reading"}).reading == Reading()


def test_reading_more_than_the_score_tells_right_from_wrong_better_on_new_answers() -> None:
    calibrator, (signs, right) = confidence.fit_signs(*told(400, 0, by_margin=1.0)), told(2000, 1, by_margin=1.0)
    by_score = confidence.fit([one.score for one in signs], right)
    read_losses = [_loss(calibrator.probability(calibrator.reading.score(one)), r) for one, r in zip(signs, right, strict=True)]
    assert sum(read_losses) < 0.9 * sum(_loss(by_score.probability(one.score), r) for one, r in zip(signs, right, strict=True))


def _loss(probability: float, right: bool) -> float:
    return -math.log(probability if right else 1 - probability)


@pytest.mark.parametrize(
    ("logprob", "likeliest", "expected"),
    [
        (-0.1, [-0.1, -2.5], 2.4),
        (-0.1, [-2.5, -0.1], 2.4),
        (-2.5, [-0.1, -2.5], -2.4),  # sampled: a likelier one was passed over
        (-4.0, [-0.1, -2.5], -3.9),
        (-0.1, [-0.1], None),
        (-0.1, [], None),
        (math.nan, [-0.1, -2.5], None),
        (-0.1, [-0.1, -math.inf], None),
    ],
)
def test_the_lead_of_a_token(logprob: float, likeliest: list[float], expected: float | None) -> None:
    found = lead(logprob, likeliest)
    assert found == (None if expected is None else pytest.approx(expected))


def test_signs_are_read_from_what_a_model_sends() -> None:
    sure = {"token": "a", "logprob": -0.1, "top_logprobs": [{"logprob": -0.1}, {"logprob": -3.1}]}
    torn = {"token": "b", "logprob": -0.7, "top_logprobs": [{"logprob": -0.7}, {"logprob": -0.9}]}
    assert read([sure, torn]) == Signs(pytest.approx(score([-0.1, -0.7])), pytest.approx(0.2), 2)
    assert read([sure, {"token": "b", "logprob": -0.7}]).margin is None
    assert read([]) == Signs(MIN_SCORE, None, 0)


def asked_again(n: int, seed: int, *, by_agreement: float) -> tuple[list[Signs], list[bool]]:
    """Answers of which the agreement of further ones tells as much more than the score as is asked."""
    random = np.random.default_rng(seed)
    scores, agreed = random.normal(1, 2, n), random.integers(0, 4, n) / 3
    right = random.random(n) < 1 / (1 + np.exp(-(0.5 * scores + by_agreement * (agreed - 0.5))))
    return [Signs(float(s), None, 5, float(a)) for s, a in zip(scores, agreed, strict=True)], [bool(r) for r in right]


def test_the_agreement_of_further_answers_counts_where_it_is_proven_to_tell_more() -> None:
    signs, right = asked_again(400, 0, by_agreement=4.0)
    calibrator = confidence.fit_signs(signs, right)
    assert calibrator.again is not None
    reading = calibrator.again.reading
    assert reading.agreement > 2.0
    assert calibrator.reading == Reading(), "the first look knows nothing of it"
    assert Calibrator.from_dict(calibrator.to_dict()) == calibrator

    new, outcome = asked_again(2000, 1, by_agreement=4.0)
    losses = [
        -np.mean(np.log([p if r else 1 - p for p, r in zip(found, outcome, strict=True)]))
        for found in (
            [calibrator.probability(calibrator.reading.score(one)) for one in new],
            [calibrator.again.probability(reading.score(one)) for one in new],
        )
    ]
    assert losses[1] < losses[0] - 0.05


@pytest.mark.parametrize("seed", range(3))
def test_agreement_that_tells_nothing_new_is_not_asked_for(seed: int) -> None:
    signs, right = asked_again(400, seed, by_agreement=0.0)
    assert fit_again(signs, right, Reading()) is None


def test_agreement_that_was_not_looked_at_or_speaks_against_an_answer_counts_for_nothing() -> None:
    signs, right = asked_again(400, 0, by_agreement=4.0)
    assert fit_again([signs[0]._replace(agreement=None), *signs[1:]], right, Reading()) is None
    assert fit_again(*asked_again(400, 0, by_agreement=-4.0), Reading()) is None
    assert Reading(agreement=1.0).score(Signs(MAX_SCORE, 3.0, 3)) == MIN_SCORE


def test_answers_agree_in_how_they_end() -> None:
    assert agreement("12 + 5 = 17\n17 - 4 = 13", ["12 + 1 = 13", "13", "12 + 5 = 17"]) == pytest.approx(2 / 3)
    assert agreement("Because.\nAnswer: Paris.", ["paris"]) == 1.0
    with pytest.raises(ValueError, match="draw at least one"):
        agreement("13", [])


def test_a_doubted_student_is_doubted_when_it_is_asked_again_too() -> None:
    calibrator = confidence.fit_signs(*asked_again(400, 0, by_agreement=4.0))
    assert calibrator.second == calibrator.again
    doubted = replace(calibrator, reliability=0.5)
    assert doubted.second is not None
    assert doubted.second.probability(3.0) == pytest.approx(0.5 * calibrator.second.probability(3.0))
    assert Calibrator("platt", 30).second is None
