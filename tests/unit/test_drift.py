from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.drift import simulate
from tutelage.routing.confidence import Calibrator
from tutelage.routing.drift import as_right, watch
from tutelage.routing.signs import MAX_SCORE, MIN_SCORE
from tutelage.scoring import Rate, wilson
from tutelage.settings import RoutingSettings

SURE = Calibrator("platt", n=200, a=1.0, b=0.0)


def outcomes(seed: int, n: int, *, lost: float = 0.0) -> list[tuple[float, float]]:
    random = np.random.default_rng(seed)
    scores = random.normal(2.5, 1.5, n)
    right = (random.random(n) < 1 / (1 + np.exp(-scores))) & (random.random(n) >= lost)
    return list(zip(scores.tolist(), right.astype(float).tolist(), strict=True))


def test_a_promise_that_is_kept_changes_nothing_much() -> None:
    kept = [watch(SURE, outcomes(seed, 400)).calibrator.reliability for seed in range(50)]
    assert np.mean(kept) > 0.97
    assert min(kept) > 0.88


def test_a_broken_promise_lowers_every_confidence_to_what_is_seen() -> None:
    found = watch(SURE, outcomes(1, 400, lost=0.2))
    assert 0.72 < found.calibrator.reliability < 0.9
    assert found.calibrator.probability(2.0) == SURE.probability(2.0) * found.calibrator.reliability
    assert "were right" in found.reason


def test_confidence_comes_back_with_the_answers() -> None:
    assert watch(SURE, [*outcomes(1, 300, lost=0.3), *outcomes(2, 400)]).calibrator.reliability > 0.95


@given(st.lists(st.tuples(st.floats(MIN_SCORE, MAX_SCORE), st.floats(0, 1)), max_size=60))
def test_confidence_is_never_raised_above_what_was_trained(seen: list[tuple[float, float]]) -> None:
    found = watch(SURE, seen).calibrator
    assert 0 < found.reliability <= 1
    assert Calibrator.from_dict(found.to_dict()) == found


def test_agreeing_with_a_teacher_that_errs_counts_as_more_than_agreeing_with_one_that_does_not() -> None:
    assert as_right(1.0, wilson(0, 0)) == 1.0, "nobody has judged the teacher: it is what quality is measured against"
    assert as_right(1.0, wilson(950, 1000)) == pytest.approx(1 / wilson(950, 1000).hi)
    assert as_right(1.0, wilson(10, 100)) == pytest.approx(1 / 0.9), "where only bad answers are judged, all look bad"
    assert as_right(0.0, wilson(950, 1000)) == 0.0


def test_a_student_that_is_always_right_is_seldom_doubted_for_its_teachers_mistakes() -> None:
    sure = Calibrator("platt", n=200, a=1.0, b=2.0)

    def doubted(seed: int, teacher: Rate) -> bool:
        agreed = np.random.default_rng(seed).random(400) < 0.95
        return watch(sure, [(3.0, as_right(float(same), teacher)) for same in agreed]).calibrator.reliability < 1

    assert sum(doubted(seed, wilson(0, 0)) for seed in range(60)) > 45
    assert sum(doubted(seed, wilson(950, 1000)) for seed in range(60)) < 30


def test_an_unknown_calibrator_stays_unknown() -> None:
    assert watch(Calibrator("unknown", 3), outcomes(1, 100)).calibrator.kind == "unknown"


def test_a_student_that_lost_15_points_loses_most_of_its_traffic_within_300_requests_and_a_healthy_one_does_not() -> None:
    routing = RoutingSettings()
    worse = [simulate(seed, drop=0.15, routing=routing) for seed in range(6)]
    healthy = [simulate(seed, drop=0.0, routing=routing) for seed in range(6)]
    assert np.mean([week.after / week.before for week in worse]) < 0.5
    assert np.mean([week.after / week.before for week in healthy]) > 0.8
