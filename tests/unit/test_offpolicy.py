from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.routing.offpolicy import Estimated, Logged, Refused, doubly_robust, effective_size, snips


def logs(random: np.random.Generator, n: int, *, right: bool = True) -> tuple[list[Logged], float]:
    """Requests at which a policy that prefers action 0 was logged, for one that prefers action 1; and what the other is worth."""
    x = random.random(n)
    explored = 0.1 + 0.3 * x  # probability of action 1
    target = 0.2 + 0.7 * (x > 0.5)  # of the other policy
    worth = {0: 0.6 - 0.2 * x, 1: 0.3 + 0.6 * x}
    predicted = worth if right else {0: np.full(n, 0.9), 1: np.full(n, 0.1)}
    action = (random.random(n) < explored).astype(int)
    reward = (random.random(n) < np.where(action == 1, worth[1], worth[0])).astype(float)
    rows = [
        Logged(
            float(reward[i]),
            float(explored[i] if action[i] else 1 - explored[i]),
            float(target[i] if action[i] else 1 - target[i]),
            float(predicted[int(action[i])][i]),
            float(target[i] * predicted[1][i] + (1 - target[i]) * predicted[0][i]),
        )
        for i in range(n)
    ]
    grid = (np.arange(100_000) + 0.5) / 100_000
    pi = 0.2 + 0.7 * (grid > 0.5)
    return rows, float(np.mean(pi * (0.3 + 0.6 * grid) + (1 - pi) * (0.6 - 0.2 * grid)))


@pytest.mark.parametrize("right", [True, False])
def test_both_estimates_are_unbiased_and_their_bounds_hold_as_often_as_they_say(right: bool) -> None:
    runs = 300
    found: dict[str, list[Estimated]] = {"snips": [], "dr": []}
    for seed in range(runs):
        rows, truth = logs(np.random.default_rng(seed), 600, right=right)
        for name, estimate in (("snips", snips(rows)), ("dr", doubly_robust(rows))):
            assert isinstance(estimate, Estimated)
            found[name].append(estimate)
    for estimates in found.values():
        values = np.array([e.value for e in estimates])
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(runs) + 0.002
        assert np.mean([e.lo <= truth for e in estimates]) == pytest.approx(0.95, abs=0.04)
        assert np.mean([e.hi >= truth for e in estimates]) == pytest.approx(0.95, abs=0.04)


def test_right_predictions_make_the_doubly_robust_estimate_the_tighter_one() -> None:
    rows, _ = logs(np.random.default_rng(1), 2_000)
    robust, ratio = doubly_robust(rows), snips(rows)
    assert isinstance(robust, Estimated) and isinstance(ratio, Estimated)
    assert robust.hi - robust.lo < ratio.hi - ratio.lo


def test_rewards_that_nobody_saw_are_made_up_for_by_the_probability_of_looking() -> None:
    means = []
    for seed in range(200):
        random = np.random.default_rng(seed)
        context = random.random(800)
        looked = random.random(800) < 0.2 + 0.6 * context  # it is looked where it is better
        rows = [Logged(float(random.random() < c) if seen else None, 0.2 + 0.6 * c, 1.0) for c, seen in zip(context, looked, strict=True)]
        estimate = snips(rows)
        assert isinstance(estimate, Estimated)
        means.append(estimate.value)
    assert np.mean(means) == pytest.approx(0.5, abs=0.01)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=50))
def test_the_effective_size_is_between_one_and_all(weights: list[float]) -> None:
    assert 1 - 1e-9 <= effective_size(weights) <= len(weights) + 1e-6


@given(st.integers(0, 99))
def test_fewer_than_a_hundred_effective_requests_are_refused_with_a_reason(n: int) -> None:
    rows = [Logged(1.0, 0.5, 1.0)] * n + [Logged(None, 0.5, 1.0)] * 1_000
    for refused in (snips(rows), doubly_robust(rows)):
        assert isinstance(refused, Refused)
        assert "100 are needed" in refused.reason


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.05, 1), st.floats(0, 1)), min_size=300, max_size=300))
def test_snips_stays_within_the_rewards(rows: list[tuple[float, float, float]]) -> None:
    found = snips([Logged(*row) for row in rows], least=1.0)
    if isinstance(found, Estimated):
        assert -1e-9 <= found.value <= 1 + 1e-9
