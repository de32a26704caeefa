"""False promotions over a year: what e-LOND asks of each test."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.discovery import needed

ALPHA = 0.05


def test_all_tests_of_a_year_together_spend_no_more_than_alpha() -> None:
    spent = sum(1 / needed(number, 0, alpha=ALPHA, half=20, least=1) for number in range(1, 100_000))

    assert spent <= ALPHA
    assert spent == pytest.approx(ALPHA, rel=1e-3)


def test_half_of_alpha_goes_to_the_first_tests() -> None:
    assert sum(1 / needed(number, 0, alpha=ALPHA, half=20, least=1) for number in range(1, 21)) == pytest.approx(ALPHA / 2)


@given(number=st.integers(1, 5000), passed=st.integers(0, 5000))
def test_later_tests_need_more_and_every_passed_one_makes_the_rest_easier(number: int, passed: int) -> None:
    def asked(t: int, r: int) -> float:
        return needed(t, r, alpha=ALPHA, half=20, least=20)

    assert asked(number + 1, passed) >= asked(number, passed) >= asked(number, passed + 1) >= 20


@pytest.mark.parametrize(("number", "passed"), [(0, 0), (1, -1)])
def test_tests_are_numbered_from_one(number: int, passed: int) -> None:
    with pytest.raises(ValueError, match="numbered from 1"):
        needed(number, passed, alpha=ALPHA, half=20, least=20)
