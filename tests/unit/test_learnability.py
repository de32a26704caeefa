"""The probe's rule: when the rest of a training is worth spending."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.learnability import judge


def test_nothing_right_of_forty_is_not_learnable_and_says_why() -> None:
    verdict = judge(0, 40, majority=0.0, untrained=0.0, steps=24)
    assert not verdict.learnable
    assert "after 24 steps 0 of 40 right" in verdict.reason
    assert "not learnable by this base at this budget" in verdict.reason


@pytest.mark.parametrize("right", [4, 15, 40])
def test_a_share_that_could_pass_the_needed_one_goes_on(right: int) -> None:
    assert judge(right, 40, majority=0.02, untrained=0.0, steps=24).learnable


def test_a_slow_beginning_is_told_from_a_hopeless_one_by_how_likely_the_right_tokens_are() -> None:
    """The figures of family_relationships and spell_backward after a minute of training."""
    slow = judge(5, 37, majority=0.22, untrained=0.0, steps=21, token_probability=0.24)
    hopeless = judge(0, 40, majority=0.02, untrained=0.0, steps=22, token_probability=0.02)

    assert (slow.learnable, hopeless.learnable) == (True, False)
    assert "0.02 likely" in hopeless.reason


def test_answering_what_is_most_frequent_is_no_learning() -> None:
    assert not judge(30, 40, majority=0.80, untrained=0.0, steps=24).learnable
    assert judge(30, 40, majority=0.40, untrained=0.0, steps=24).learnable


def test_what_the_untrained_base_can_do_already_is_no_learning() -> None:
    assert not judge(16, 40, majority=0.0, untrained=0.55, steps=24).learnable


def test_a_high_majority_can_still_be_beaten() -> None:
    assert judge(40, 40, majority=0.95, untrained=0.0, steps=24).learnable


def test_few_items_give_the_benefit_of_the_doubt() -> None:
    assert judge(0, 4, majority=0.0, untrained=0.0, steps=24).learnable


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0, 1), st.floats(0, 1))
def test_more_right_answers_never_turn_a_yes_into_a_no(a: int, b: int, majority: float, untrained: float) -> None:
    few, many = sorted((a, b))
    less = judge(few, 60, majority=majority, untrained=untrained, steps=1)
    more = judge(many, 60, majority=majority, untrained=untrained, steps=1)
    assert more.learnable >= less.learnable
