from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tutelage.routing.offpolicy import Estimated, Logs, Refused, doubly_robust, effective_size, snips


def logged(random: np.random.Generator, n: int, *, right: bool = True, noise: float = 1.0) -> tuple[Logs, float]:
    """Requests at which a policy that prefers action 0 was logged, for one that prefers action 1; and what the other is worth.
    `right`: what is predicted is what is so; `noise` 1: rewards are 0 or 1, 0: what they are on the average."""
    x = random.random(n)
    explored, target = 0.1 + 0.3 * x, 0.2 + 0.7 * (x > 0.5)  # probability of action 1, of either policy
    worth = np.stack([0.6 - 0.2 * x, 0.3 + 0.6 * x])
    predicted = worth if right else np.stack([np.full(n, 0.9), np.full(n, 0.1)])
    action = (random.random(n) < explored).astype(int)
    mean = worth[action, np.arange(n)]
    reward = noise * (random.random(n) < mean) + (1 - noise) * mean
    logs = Logs(
        reward,
        np.where(action == 1, explored, 1 - explored),
        np.where(action == 1, target, 1 - target),
        predicted[action, np.arange(n)],
        target * predicted[1] + (1 - target) * predicted[0],
    )
    grid = (np.arange(100_000) + 0.5) / 100_000
    pi = 0.2 + 0.7 * (grid > 0.5)
    return logs, float(np.mean(pi * (0.3 + 0.6 * grid) + (1 - pi) * (0.6 - 0.2 * grid)))


@pytest.mark.parametrize("right", [True, False])
def test_both_estimates_are_unbiased_and_their_bounds_hold_as_often_as_they_say(right: bool) -> None:
    runs = 400
    found: dict[str, list[Estimated]] = {"snips": [], "doubly robust": []}
    for seed in range(runs):
        logs, truth = logged(np.random.default_rng(seed), 600, right=right)
        for name, estimate in (("snips", snips(logs)), ("doubly robust", doubly_robust(logs))):
            assert isinstance(estimate, Estimated)
            found[name].append(estimate)
    for estimates in found.values():
        values = np.array([e.value for e in estimates])
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(runs) + 0.002
        assert np.mean([e.lo <= truth for e in estimates]) == pytest.approx(0.95, abs=0.04)
        assert np.mean([e.hi >= truth for e in estimates]) == pytest.approx(0.95, abs=0.04)


def test_what_is_known_of_rewards_makes_the_doubly_robust_estimate_the_tighter_one() -> None:
    logs, _ = logged(np.random.default_rng(1), 2_000, noise=0.2)
    robust, ratio = doubly_robust(logs), snips(logs)
    assert isinstance(robust, Estimated) and isinstance(ratio, Estimated)
    assert robust.hi - robust.lo < ratio.hi - ratio.lo


def test_rewards_that_nobody_saw_are_made_up_for_by_the_probability_of_looking() -> None:
    means = []
    for seed in range(300):
        random = np.random.default_rng(seed)
        context = random.random(800)
        likely = 0.2 + 0.6 * context  # it is looked where it is better
        reward = np.where(random.random(800) < likely, random.random(800) < context, np.nan)
        estimate = snips(Logs(reward, likely, np.ones(800), context, context))
        assert isinstance(estimate, Estimated)
        means.append(estimate.value)
    assert np.mean(means) == pytest.approx(0.5, abs=0.01)


@given(arrays(float, st.integers(1, 50), elements=st.floats(0.01, 100)))
def test_the_effective_size_is_between_one_and_all(weights: np.ndarray) -> None:
    assert 1 - 1e-9 <= effective_size(weights) <= len(weights) + 1e-6


@given(st.integers(0, 99))
def test_fewer_than_a_hundred_effective_requests_are_refused_with_a_reason(n: int) -> None:
    reward = np.array([1.0] * n + [np.nan] * 1_000)
    same = np.ones_like(reward)
    for refused in (snips(Logs(reward, same / 2, same, same, same)), doubly_robust(Logs(reward, same / 2, same, same, same))):
        assert isinstance(refused, Refused)
        assert "100 are needed" in refused.reason


@given(arrays(float, (3, 40), elements=st.floats(0.05, 1)))
def test_snips_stays_within_the_rewards(values: np.ndarray) -> None:
    found = snips(Logs(values[0], values[1], values[2], values[0], values[0]), least=1.0)
    assert isinstance(found, Estimated)
    assert values[0].min() - 1e-9 <= found.value <= values[0].max() + 1e-9
