"""The ladder as truth tables, and what no evidence may do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.evidence import Tally, e_value
from tutelage.evolution.promotion import Comparison, Cost, Evidence, PromotionSettings, better, demote, forgotten, good_enough, judge, worse
from tutelage.scoring import wilson

LADDER = PromotionSettings()
TALLIES = st.builds(Tally, st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))


def evidence(correct: int, n: int, *, majority: float = 0.2, confidence: float = 0.8) -> Evidence:
    rate = wilson(correct, n)
    return Evidence(
        n=n, correct=correct, wins=correct, accuracy=rate.rate, lower=rate.lo, upper=rate.hi, majority=majority,
        confidence=confidence, ece=0.05, learnable=True, learnable_reason="validation rose",
    )  # fmt: skip


def compared(pairs: Tally, *, price: float = 100.0, **domains: Tally) -> Comparison:
    """At the price of a champion that asks 100 micro-dollars; both are right equally often."""
    return Comparison(pairs, domains or {"sums": pairs}, Cost(price * pairs.n, pairs.n), Cost(100.0 * pairs.n, pairs.n))


@pytest.mark.parametrize(
    ("given", "action", "why"),
    [
        (evidence(95, 120), "promote", "clear the floors"),
        (evidence(29, 29), "keep", "30 needed"),
        (evidence(71, 120), "keep", "win rate 0.59"),
        (evidence(80, 120), "keep", "20 needed"),  # two thirds: above the floor, and not convincingly so
        (evidence(95, 120, confidence=0.74), "keep", "0.74 is below 0.75"),
        (evidence(30, 120, majority=0.2), "refuse", "majority answer (0.20)"),
        (replace(evidence(0, 120), learnable=False, learnable_reason="0 of 40 after 24 steps"), "refuse", "0 of 40 after 24 steps"),
        (replace(evidence(95, 120), comparison=compared(Tally(5, 110, 5))), "refuse", "not better than the champion"),
        (replace(evidence(95, 120), comparison=compared(Tally(2, 100, 18))), "refuse", "not better than the champion"),
        (replace(evidence(95, 120), comparison=compared(Tally(12, 105, 3))), "challenge", "challenges the champion"),
        (replace(evidence(95, 120), comparison=compared(Tally(5, 110, 5), price=50)), "challenge", "challenges the champion"),
        (
            replace(evidence(95, 120), kept={"canaries": Tally(1, 45, 4)}, comparison=compared(Tally(12, 105, 3))),
            "refuse",
            "6.0% of 50 canaries lost",
        ),
        (
            replace(evidence(95, 120), kept={"canaries": Tally(3, 44, 3)}, comparison=compared(Tally(12, 105, 3))),
            "challenge",
            "challenges the champion",
        ),
        (
            replace(evidence(95, 120), kept={"canaries": Tally(0, 20, 9)}, comparison=compared(Tally(12, 105, 3))),
            "challenge",
            "challenges the champion",
        ),
        (replace(evidence(60, 120), wins=110), "promote", "win rate 0.92"),
        (replace(evidence(120, 120), suspicion="it knows the canaries"), "refuse", "it knows the canaries"),
    ],
)
def test_the_verdict_and_its_reason(given: Evidence, action: str, why: str) -> None:
    verdict = judge(given, LADDER)

    assert verdict.action == action
    assert why in verdict.reason


def test_a_constant_answer_is_refused_however_often_it_is_right() -> None:
    """Nine items in ten have the same label: a student that says it always learned nothing."""
    assert judge(evidence(108, 120, majority=0.9), LADDER).action == "refuse"


def test_a_year_of_many_students_asks_each_for_more() -> None:
    """Evidence of 500 convinces of one student, not of one picked from very many."""
    assert judge(evidence(97, 120), LADDER, needed=20).action == "promote"
    assert judge(evidence(97, 120), LADDER, needed=1e9).action == "keep"


@given(n=st.integers(1, 200), data=st.data(), majority=st.floats(0, 1), confidence=st.floats(0, 1), needed=st.floats(20, 1e6))
def test_nothing_below_a_floor_is_ever_promoted(n: int, data: st.DataObject, majority: float, confidence: float, needed: float) -> None:
    given_evidence = evidence(data.draw(st.integers(0, n)), n, majority=majority, confidence=confidence)
    verdict = judge(given_evidence, LADDER, needed=needed)

    if verdict.action == "promote":
        assert n >= 30
        assert confidence >= 0.75
        assert given_evidence.wins / n >= 0.60
        assert given_evidence.lower > majority
        assert e_value(given_evidence.tally, null=0.60) >= needed
    assert verdict.tier == {"promote": "ta", "keep": "student", "refuse": None}[verdict.action]


def test_a_teacher_needs_more_of_everything_than_a_ta() -> None:
    wins = Tally(40, 0, 5)

    assert good_enough(wins, 0.9, LADDER.ta, needed=20).passed
    assert "50 needed" in good_enough(wins, 0.9, LADDER.teacher, needed=20).reason
    assert "0.80 is below 0.85" in good_enough(Tally(90, 0, 10), 0.8, LADDER.teacher, needed=20).reason


@pytest.mark.parametrize(
    ("comparison", "passed", "path", "why"),
    [
        (compared(Tally(60, 20, 20)), True, "superior", "win rate 0.70"),
        (compared(Tally(40, 20, 40)), False, "superior", "20 needed"),
        (compared(Tally(20, 0, 2)), False, "superior", "30 pairs needed"),
        (compared(Tally(20, 260, 20), price=50), True, "as-good-and-cheaper", "above 0.45"),
        (compared(Tally(20, 260, 20), price=95), False, "superior", "20 needed"),  # five percent is not cheap enough for less proof
        (compared(Tally(60, 20, 20), price=101), False, "superior", "a success costs"),
        (compared(Tally(60, 20, 20), sums=Tally(55, 5, 5), dates=Tally(5, 15, 15)), False, "superior", "domain dates loses"),
        (compared(Tally(60, 20, 20), sums=Tally(59, 20, 16), dates=Tally(1, 0, 4)), True, "superior", "win rate"),  # five tell nothing
    ],
)
def test_better_than_the_champion(comparison: Comparison, passed: bool, path: str, why: str) -> None:
    finding = better(comparison, LADDER, needed=20)

    assert (finding.passed, finding.path) == (passed, path)
    assert why in finding.reason


@given(TALLIES, st.floats(10, 200))
def test_nobody_is_both_better_and_worse(pairs: Tally, price: float) -> None:
    comparison = compared(pairs, price=price)

    assert not (better(comparison, LADDER, needed=20).passed and worse(comparison, LADDER).passed) or price <= 90


@given(TALLIES)
def test_being_better_means_evidence_and_no_loss_anywhere(pairs: Tally) -> None:
    if better(compared(pairs), LADDER, needed=20).passed:
        assert pairs.n >= 30
        assert pairs.lead > 0
        assert e_value(pairs, null=0.5) >= 20


def test_luck_alone_does_not_make_a_candidate_cheaper() -> None:
    """At the same price a candidate that wins more also pays less for a success; that must not give it the easier null."""
    pairs = Tally(83, 0, 62)
    lucky = Comparison(pairs, {"sums": pairs}, Cost(100 * pairs.n, pairs.wins), Cost(100 * pairs.n, pairs.losses))

    assert better(lucky, LADDER, needed=20).path == "superior"


def test_cost_per_success_counts_the_right_answers_only() -> None:
    assert Cost(100, 50).per_success == 2
    assert Cost(100, 0).per_success == float("inf")
    assert Cost().per_success == 0


@pytest.mark.parametrize(
    ("tier", "wins", "left"),
    [
        ("teacher", Tally(30, 0, 40), "ta"),
        ("ta", Tally(20, 0, 50), "student"),
        ("ta", Tally(38, 0, 32), "ta"),
        ("student", Tally(0, 0, 90), "student"),
    ],
)
def test_a_tier_is_lost_by_the_evidence_that_wins_it(tier: str, wins: Tally, left: str) -> None:
    verdict = demote(tier, wins, LADDER)  # type: ignore[arg-type]

    assert verdict.tier == left
    assert verdict.action == ("keep" if left == tier else "demote")


def test_what_is_forgotten_is_told_by_where_it_is_from_and_a_gain_elsewhere_makes_up_for_nothing() -> None:
    kept = {"canaries": Tally(0, 47, 3), "items of the champion's time": Tally(20, 80, 0)}

    assert forgotten(kept, LADDER) == "6.0% of 50 canaries lost against the champion; 2% allowed"
    assert forgotten({"items of the champion's time": Tally(20, 80, 0)}, LADDER) == ""
