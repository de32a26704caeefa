"""What held-out outcomes assure of answers above a cut of their score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.routing.promises import RISK, Assurance, assure, lower_bound


def test_the_bound_of_faultless_outcomes_is_the_exact_one() -> None:
    assert lower_bound(1.0, 100, risk=0.05) == pytest.approx(0.05 ** (1 / 100))


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0.001, 0.5))
def test_the_bound_is_below_the_mean_and_rises_with_outcomes(n: int, mean: float, risk: float) -> None:
    assert 0.0 <= lower_bound(mean, n, risk=risk) <= lower_bound(mean, 2 * n, risk=risk) <= mean


@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(0, 1)), max_size=80))
def test_a_higher_score_is_never_assured_less_and_nothing_more_than_the_best_cut_saw(rows: list[tuple[float, float]]) -> None:
    found = assure([score for score, _ in rows], [value for _, value in rows])
    assert list(found.kept) == sorted(found.kept) and list(found.cuts) == sorted(found.cuts)
    assert all(bound <= 1.0 for bound in found.kept)
    assert found.at(-math.inf) == 0.0


def test_few_outcomes_assure_little() -> None:
    assert assure([1.0] * 20, [1.0] * 20).at(1.0) == pytest.approx(math.exp(-math.log(8 / RISK) / 20))
    assert assure([], []) == Assurance()


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one outcome for each score"):
        assure([1.0], [])


def test_what_is_assured_holds_of_new_answers_in_all_but_the_stated_share_of_samples() -> None:
    broken = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        scores = random.normal(size=150)
        found = assure(scores.tolist(), (random.random(150) < _true(scores)).tolist())
        grid = np.linspace(-4, 6, 4001)
        density = np.exp(-(grid**2) / 2)
        kept = [(density * _true(grid))[grid >= cut].sum() / density[grid >= cut].sum() for cut in found.cuts]
        broken += any(true < bound for true, bound in zip(kept, found.kept, strict=True))
    assert broken <= 300 * RISK


def _true(scores: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-1.5 - scores)))
