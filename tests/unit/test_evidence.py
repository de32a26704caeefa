"""E-processes: the formula, and that no number of looks makes them lie."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from tutelage.evolution.evidence import Tally, e_value, log_e

COUNTS = st.integers(0, 60)
NULLS = st.sampled_from([0.3, 0.45, 0.5, 0.6, 0.7])


def integral(tally: Tally, null: float) -> float:
    """The mixture over all bettors, by adaptive quadrature instead of 48 of them."""

    def capital(q: float) -> float:
        stake = (q - null) / (null * (1 - null))
        grown = (1 + stake * (1 - null)) ** tally.wins * (1 + stake * (0.5 - null)) ** tally.ties * (1 - stake * null) ** tally.losses
        return 2 * (1 - q) / (1 - null) ** 2 * grown

    return float(quad(capital, null, 1, limit=200)[0])


@given(st.builds(Tally, COUNTS, COUNTS, COUNTS), NULLS)
def test_the_bettors_together_hold_what_the_integral_over_all_bettors_holds(tally: Tally, null: float) -> None:
    assert e_value(tally, null=null) == pytest.approx(integral(tally, null), rel=1e-4, abs=1e-9)


@given(st.builds(Tally, COUNTS, COUNTS, COUNTS), NULLS, st.floats(0, 1))
def test_the_next_outcome_is_a_fair_bet_while_the_win_rate_is_the_null(tally: Tally, null: float, tied: float) -> None:
    """The expected e-value after one more outcome is today's: that is what makes looking free."""
    ties = tied * 2 * min(null, 1 - null)
    wins = null - ties / 2
    after = [e_value(tally + more, null=null) for more in (Tally(1), Tally(0, 1), Tally(0, 0, 1))]

    expected = wins * after[0] + ties * after[1] + (1 - wins - ties) * after[2]
    assert expected == pytest.approx(e_value(tally, null=null), rel=1e-9)


@given(st.builds(Tally, COUNTS, COUNTS, COUNTS), NULLS)
def test_a_win_instead_of_a_loss_is_always_more_evidence(tally: Tally, null: float) -> None:
    assert e_value(tally + Tally(1), null=null) > e_value(tally + Tally(0, 0, 1), null=null)


def test_a_tie_says_nothing_of_superiority_and_something_of_being_no_worse() -> None:
    some, more = Tally(12, 0, 10), Tally(12, 50, 10)

    assert e_value(more, null=0.5) == pytest.approx(e_value(some, null=0.5))
    assert e_value(more, null=0.45) > e_value(some, null=0.45)


def test_arrays_of_counts_give_what_single_counts_give() -> None:
    wins, ties, losses = np.array([[3, 20], [0, 7]]), np.array([[1, 0], [0, 9]]), np.array([[2, 5], [0, 11]])

    together = log_e(wins, ties, losses, null=0.6)
    assert together.shape == (2, 2)
    for place in np.ndindex(2, 2):
        assert together[place] == pytest.approx(log_e(int(wins[place]), int(ties[place]), int(losses[place]), null=0.6))


def test_no_outcomes_are_no_evidence_and_very_many_are_no_overflow() -> None:
    assert e_value(Tally(), null=0.5) == pytest.approx(1)
    assert math.isfinite(e_value(Tally(10**6), null=0.5))


@pytest.mark.parametrize("null", [0.0, 1.0, -0.1])
def test_a_null_without_room_on_both_sides_is_refused(null: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        log_e(1, 0, 0, null=null)


def test_a_tally_counts_ties_half_and_turns_round() -> None:
    tally = Tally(6, 2, 2)

    assert (tally.n, tally.rate, tally.lead) == (10, 0.7, 0.4)
    assert tally.reversed() == Tally(2, 2, 6)
    assert Tally().rate == 0
