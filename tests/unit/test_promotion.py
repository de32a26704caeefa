"""The gate as a truth table, and what no evidence may do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.promotion import Evidence, PromotionSettings, judge
from tutelage.scoring import wilson

FLOORS = PromotionSettings()


def evidence(correct: int, n: int, *, majority: float = 0.2, confidence: float = 0.8) -> Evidence:
    rate = wilson(correct, n)
    return Evidence(
        n=n, correct=correct, wins=correct, accuracy=rate.rate, lower=rate.lo, upper=rate.hi, majority=majority,
        confidence=confidence, ece=0.05, learnable=True, learnable_reason="validation rose",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "action", "why"),
    [
        (evidence(95, 120), "promote", "clear the floors"),
        (evidence(29, 29), "keep", "30 needed"),
        (evidence(71, 120), "keep", "win rate 0.59"),
        (evidence(95, 120, confidence=0.74), "keep", "0.74 is below 0.75"),
        (evidence(30, 120, majority=0.2), "refuse", "majority answer (0.20)"),
        (replace(evidence(0, 120), learnable=False, learnable_reason="0 of 40 after 24 steps"), "refuse", "0 of 40 after 24 steps"),
        (replace(evidence(95, 120), champion_accuracy=0.8), "refuse", "not better than the champion"),
        (replace(evidence(95, 120), champion_accuracy=0.7), "promote", "clear the floors"),
        (replace(evidence(60, 120), wins=110), "promote", "win rate 0.92"),
    ],
)
def test_the_verdict_and_its_reason(given: Evidence, action: str, why: str) -> None:
    verdict = judge(given, FLOORS)

    assert verdict.action == action
    assert why in verdict.reason


def test_a_constant_answer_is_refused_however_often_it_is_right() -> None:
    """Nine items in ten have the same label: a student that says it always learned nothing."""
    assert judge(evidence(108, 120, majority=0.9), FLOORS).action == "refuse"


@given(n=st.integers(1, 200), data=st.data(), majority=st.floats(0, 1), confidence=st.floats(0, 1))
def test_nothing_below_a_floor_is_ever_promoted(n: int, data: st.DataObject, majority: float, confidence: float) -> None:
    given_evidence = evidence(data.draw(st.integers(0, n)), n, majority=majority, confidence=confidence)
    verdict = judge(given_evidence, FLOORS)

    if verdict.action == "promote":
        assert n >= 30
        assert confidence >= 0.75
        assert given_evidence.wins / n >= 0.60
        assert given_evidence.lower > majority
    assert verdict.tier == {"promote": "ta", "keep": "student", "refuse": None}[verdict.action]
