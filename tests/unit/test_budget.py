"""How much a tenant's error budget lets through, and that it holds at every look."""

from __future__ import annotations

import random
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.routing.budget import CONFIDENCE, LEVELS, NEWEST, Label, allowance, evidence

BUDGETS = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.3])


@settings(deadline=None)  # the first call imports scipy
@given(BUDGETS, st.integers(1, 60), st.floats(0, 1))
def test_the_evidence_is_at_most_one_on_average_under_any_error_beyond_the_budget(budget: float, n: int, beyond: float) -> None:
    error = budget + beyond * (0.999 - budget)
    mean = sum(comb(n, k) * error**k * (1 - error) ** (n - k) * evidence(n, k, budget=budget) for k in range(n + 1))
    assert mean <= 1 + 1e-6


@settings(deadline=None)  # the first call imports scipy
@given(BUDGETS, st.integers(0, 500), st.integers(0, 500))
def test_one_more_right_answer_never_lessens_the_evidence_nor_a_wrong_one_adds_to_it(budget: float, n: int, wrong: int) -> None:
    wrong = min(n, wrong)
    now = evidence(n, wrong, budget=budget)
    assert evidence(n + 1, wrong + 1, budget=budget) <= now * (1 + 1e-9)
    assert evidence(n + 1, 0, budget=budget) >= evidence(n, 0, budget=budget) * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_a_verifier_that_is_wrong_beyond_the_budget_is_hardly_ever_let_through_at_any_of_many_looks(seed: int) -> None:
    chance = random.Random(seed)
    let_through = 0
    for _ in range(20):
        labels: list[Label] = []
        for _ in range(12):
            labels += [Label(chance.uniform(0.8, 1), chance.random() >= 0.1) for _ in range(25)]
            if allowance(labels, budget=0.1).least is not None:
                let_through += 1
                break
    assert let_through <= 6  # of 20; each with a probability of 1 - CONFIDENCE at most


@pytest.mark.parametrize(("budget", "labels"), [(0.02, 307), (0.05, 121), (0.1, 59)])
def test_so_many_labels_without_an_error_earn_a_budget(budget: float, labels: int) -> None:
    assert allowance([Label(1.0, True)] * labels, budget=budget).least == min(LEVELS)
    few = allowance([Label(1.0, True)] * (labels - 1), budget=budget)
    assert few.least is None
    assert "not surely" in few.reason


def test_errors_below_a_level_do_not_count_against_it() -> None:
    labels = [Label(0.96, True)] * 200 + [Label(0.85, False)] * 60
    assert allowance(labels, budget=0.05).least == 0.9


def test_no_budget_lets_nothing_through_and_old_labels_do_not_count() -> None:
    assert allowance([Label(1.0, True)] * 1000, budget=0.0).least is None
    assert allowance([Label(1.0, True)] * 1000 + [Label(1.0, False)] * NEWEST, budget=0.05).least is None
    assert 0.5 < CONFIDENCE < 1
