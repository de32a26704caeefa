from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.routing.confidence import (
    ISOTONIC_LABELS,
    MIN_LABELS,
    Calibrator,
    ece,
    fit,
)
from tutelage.routing.signs import MAX_SCORE, MIN_SCORE

scores = st.floats(MIN_SCORE, MAX_SCORE)
outcomes = st.lists(st.tuples(scores, st.booleans()), min_size=MIN_LABELS, max_size=80)


def simulated(n: int, seed: int, *, right: float = 0.5) -> tuple[list[float], list[bool]]:
    """Scores as students give them: right answers' log-odds around 1.5, wrong ones' around -0.5."""
    random = np.random.default_rng(seed)
    correct = random.random(n) < right
    found = np.where(correct, random.normal(1.5, 1.5, n), random.normal(-0.5, 1.2, n))
    return [float(x) for x in found], [bool(x) for x in correct]


def learned(rows: list[tuple[float, bool]]) -> Calibrator:
    return fit([x for x, _ in rows], [right for _, right in rows])


def test_too_few_outcomes_say_nothing() -> None:
    calibrator = fit([5.0] * (MIN_LABELS - 1), [True] * (MIN_LABELS - 1))
    assert calibrator.kind == "unknown"
    assert calibrator.probability(MAX_SCORE) == 0.0


@settings(deadline=None, max_examples=60)
@given(outcomes, scores, scores)
def test_a_higher_score_never_means_a_lower_probability(rows: list[tuple[float, bool]], a: float, b: float) -> None:
    calibrator = learned(rows)
    assert calibrator.probability(min(a, b)) <= calibrator.probability(max(a, b))


@settings(deadline=None, max_examples=60)
@given(outcomes, st.floats(allow_nan=False))
def test_a_known_probability_is_never_0_or_1(rows: list[tuple[float, bool]], at: float) -> None:
    assert 0.0 < learned(rows).probability(at) < 1.0


@settings(deadline=None, max_examples=30)
@given(st.lists(scores, min_size=MIN_LABELS, max_size=200))
def test_all_right_is_high_but_no_higher_than_the_outcomes_support(found: list[float]) -> None:
    calibrator = fit(found, [True] * len(found))
    assert 0.85 < calibrator.probability(max(found)) <= (len(found) + 1) / (len(found) + 2)


@settings(deadline=None, max_examples=30)
@given(st.lists(scores, min_size=MIN_LABELS, max_size=200))
def test_all_wrong_is_low_at_every_score(found: list[float]) -> None:
    assert fit(found, [False] * len(found)).probability(MAX_SCORE) < 0.15


def test_a_score_that_points_the_wrong_way_leaves_only_the_share_right() -> None:
    calibrator = fit([float(i) for i in range(40)], [i < 20 for i in range(40)])
    assert calibrator.probability(MIN_SCORE) == calibrator.probability(MAX_SCORE) == pytest.approx(0.5, abs=0.01)


def test_perfectly_separated_outcomes_keep_a_finite_slope() -> None:
    calibrator = fit([float(i) for i in range(40)], [i >= 20 for i in range(40)])
    assert 0.0 < calibrator.a < 10.0


def test_not_a_number_has_no_confidence() -> None:
    assert fit(*simulated(100, 0)).probability(math.nan) == 0.0


@pytest.mark.parametrize(("n", "kind"), [(ISOTONIC_LABELS - 1, "platt"), (ISOTONIC_LABELS, "isotonic")])
def test_the_curve_is_learned_once_there_are_enough_outcomes(n: int, kind: str) -> None:
    assert fit(*simulated(n, 0)).kind == kind


def test_an_isotonic_curve_is_monotone_and_never_certain() -> None:
    calibrator = fit(*simulated(800, 3))
    found = [calibrator.probability(x / 10) for x in range(-100, 100)]
    assert found == sorted(found)
    assert 0.0 < found[0] < found[-1] < 1.0


@pytest.mark.parametrize("n", [100, 800])
def test_a_calibrator_survives_json(n: int) -> None:
    calibrator = fit(*simulated(n, 1))
    again = Calibrator.from_dict(json.loads(json.dumps(calibrator.to_dict())))
    assert again == calibrator
    assert 0.0 < again.assured(MAX_SCORE) < calibrator.ceiling


def test_a_description_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError):
        Calibrator.from_dict({"kind": "platt", "n": 30, "slope": 1.0})


@pytest.mark.parametrize(("found", "correct"), [([1.0], [True, False]), ([math.nan] * 30, [True] * 30)])
def test_outcomes_that_make_no_sense_are_refused(found: list[float], correct: list[bool]) -> None:
    with pytest.raises(ValueError, match=r"pass one outcome|not finite"):
        fit(found, correct)


def test_answers_above_the_threshold_are_right_also_when_the_student_is_right_half_of_the_time() -> None:
    """The cascade's proof: 120 outcomes, threshold 0.85, precision of at least 0.85 in every one of 40 runs."""
    for seed in range(40):
        calibrator = fit(*simulated(120, seed))
        unseen, correct = simulated(2000, 1000 + seed)
        accepted = [right for x, right in zip(unseen, correct, strict=True) if calibrator.probability(x) >= 0.85]
        assert len(accepted) > 40
        assert sum(accepted) / len(accepted) >= 0.85, seed


def test_a_calibrator_of_120_outcomes_is_calibrated_on_unseen_ones() -> None:
    unseen, correct = simulated(2000, 77)
    calibrators = [fit(*simulated(120, seed)) for seed in range(10)]
    errors = [ece([calibrator.probability(x) for x in unseen], correct) for calibrator in calibrators]
    assert sum(errors) / len(errors) < 0.10


def test_calibration_error_is_the_gap_between_probability_and_share_right() -> None:
    assert ece([0.9] * 10, [True] * 9 + [False]) == pytest.approx(0.0)
    assert ece([0.9] * 10, [False] * 10) == pytest.approx(0.9)
    assert ece([0.2] * 5 + [0.8] * 5, [False] * 5 + [True] * 5, bins=2, least=5) == pytest.approx(0.2)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.randoms())
def test_calibration_error_does_not_depend_on_the_order(rows: list[tuple[float, bool]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    found, again = (ece([p for p, _ in order], [right for _, right in order]) for order in (rows, shuffled))
    assert found == pytest.approx(again)
    assert 0.0 <= found <= 1.0


def test_calibration_error_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ece([], [])
