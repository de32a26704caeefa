from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.drift import simulate
from tutelage.routing.confidence import Calibrator
from tutelage.routing.drift import watch
from tutelage.routing.signs import MAX_SCORE, MIN_SCORE
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


def test_an_unknown_calibrator_stays_unknown() -> None:
    assert watch(Calibrator("unknown", 3), outcomes(1, 100)).calibrator.kind == "unknown"


def test_a_student_that_lost_15_points_loses_most_of_its_traffic_within_300_requests_and_a_healthy_one_does_not() -> None:
    routing = RoutingSettings()
    worse = [simulate(seed, drop=0.15, routing=routing) for seed in range(6)]
    healthy = [simulate(seed, drop=0.0, routing=routing) for seed in range(6)]
    assert np.mean([week.after / week.before for week in worse]) < 0.5
    assert np.mean([week.after / week.before for week in healthy]) > 0.8
