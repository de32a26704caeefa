from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.routing.confidence import Calibrator
from tutelage.routing.exploration import Exploration, explore, propensity
from tutelage.routing.policy import StudentSnapshot
from tutelage.routing.strategies import Candidate, Plan, Step

SURE = Calibrator("platt", n=120, a=1.0, b=0.0)
STUDENT = Candidate("s", "ta", 25, student=StudentSnapshot("s", 1, "ta", "sums", "d1", SURE, 0.85))
TEACHER, SMALL, OTHER = Candidate("big", "teacher", 2_000), Candidate("small", "ta", 100), Candidate("other", "ta", 90)
CASCADE = Plan("quality", "cascade", (Step(STUDENT, least=0.85), Step(TEACHER)), "as usual")
ALONE = Plan("quality", "always-teacher", (Step(TEACHER),), "as usual", others=(SMALL, OTHER))
SOME = Exploration(0.05, 0.7)


def given_at(plan: Plan, confidence: float) -> bool:
    return confidence >= (plan.steps[0].least or 0.0)


@pytest.mark.parametrize("confidence", [0.5, 0.75, 0.9])
def test_propensities_are_the_shares_in_which_things_really_happen(confidence: float) -> None:
    random = np.random.default_rng(7)
    n = 60_000
    happened = sum(given_at(explore(CASCADE, SOME, drawn=random.random(), which=random.random()), confidence) for _ in range(n)) / n
    told = propensity(CASCADE, SOME, [confidence], given=True)
    assert happened == pytest.approx(told, abs=4 * np.sqrt(told * (1 - told) / n) + 1e-9)
    assert propensity(CASCADE, SOME, [confidence], given=False) == pytest.approx(1 - told)


@given(st.floats(0, 1), st.floats(0, 0.05), st.floats(0, 0.999), st.floats(0, 0.999))
def test_nothing_below_the_floor_is_ever_given(confidence: float, share: float, drawn: float, which: float) -> None:
    found = explore(CASCADE, Exploration(share, 0.7), drawn=drawn, which=which)
    assert not (given_at(found, confidence) and confidence < 0.7)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=3), st.floats(0.001, 0.05))
def test_the_ends_of_a_cascade_are_all_that_can_happen(confidences: list[float], share: float) -> None:
    plan = replace(CASCADE, steps=(*(Step(STUDENT, least=0.85) for _ in confidences), Step(TEACHER)))
    ends = [propensity(plan, Exploration(share, 0.7), confidences[: i + 1], given=True) for i in range(len(confidences))]
    assert sum(ends) + propensity(plan, Exploration(share, 0.7), confidences, given=False) == pytest.approx(1)


def test_where_one_answers_alone_another_is_drawn_and_its_probability_is_told() -> None:
    random = np.random.default_rng(7)
    drawn = [explore(ALONE, SOME, drawn=random.random(), which=random.random()) for _ in range(60_000)]
    shares = Counter(found.steps[0].candidate.name for found in drawn)
    told = {found.steps[0].candidate.name: found.propensity for found in drawn}
    assert sum(told.values()) == pytest.approx(1)
    for name, probability in told.items():
        assert shares[name] / len(drawn) == pytest.approx(probability, abs=0.004)
    assert {found.explored for found in drawn if found.steps[0].candidate.name != "big"} == {True}


def test_nothing_is_drawn_where_there_is_nothing_to_choose() -> None:
    only = replace(ALONE, others=())
    assert explore(only, SOME, drawn=0.0, which=0.9) == only
    assert explore(CASCADE, Exploration(0.0, 0.7), drawn=0.0, which=0.9) == CASCADE
