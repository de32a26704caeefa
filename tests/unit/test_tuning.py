from __future__ import annotations

import numpy as np
import pytest

from tutelage.routing.tuning import Choice, Try, propose_similarity, propose_threshold


def tries(seed: int, n: int, *, shift: float = 0.0, old: float = 0.85, shadow: float = 0.1, explore: float = 0.03) -> list[Try]:
    """As the gateway logs them: what is not given is compared, of what is given the shadow share. `shift`: how much less than its
    confidence an answer is right."""
    random = np.random.default_rng(seed)
    found = []
    for confidence in random.beta(6, 1.2, n):
        give = 1 - explore / 3 if confidence >= old else explore / 3 if confidence >= 0.7 else 0.0
        looked = 1 - give * (1 - shadow)
        value = float(random.random() < max(0.0, confidence - shift))
        seen = random.random() >= give or random.random() < shadow
        found.append(Try(float(confidence), value if seen else None, looked))
    return found


def true_loss(cut: float, *, shift: float = 0.0) -> float:
    confidences = np.random.default_rng(0).beta(6, 1.2, 200_000)
    return float(np.mean(np.where(confidences >= cut, 1 - np.maximum(0, confidences - shift), 0)))


def test_a_threshold_stricter_than_the_promise_needs_is_lowered_and_the_promise_is_kept() -> None:
    found = propose_threshold(tries(1, 8_000), old=0.95, floor=0.7, promised_loss=0.08)
    assert found.changes and found.new < 0.95
    assert "lower the threshold" in found.reason
    assert true_loss(found.new) <= 0.08
    assert found.evidence["at_new"]["loss_at_most"] <= 0.08


def test_a_broken_promise_raises_the_threshold() -> None:
    found = propose_threshold(tries(2, 8_000, shift=0.15), old=0.85, floor=0.7, promised_loss=0.05)
    assert found.new > 0.85
    assert "raise" in found.reason


def test_too_few_outcomes_change_nothing_and_say_so() -> None:
    found = propose_threshold(tries(3, 120), old=0.85, floor=0.7, promised_loss=0.05)
    assert not found.changes
    assert "100 are needed" in found.reason


def test_nothing_is_proposed_below_what_was_ever_given() -> None:
    perfect = [Try(0.5 + i / 10_000, 1.0, 0.5) for i in range(5_000)]
    assert propose_threshold(perfect, old=0.85, floor=0.7, promised_loss=0.05).new == pytest.approx(0.7)


def test_a_threshold_that_surely_would_break_the_promise_is_chosen_in_few_of_many_weeks() -> None:
    broken = 0
    for seed in range(100):
        found = propose_threshold(tries(seed, 3_000), old=0.95, floor=0.7, promised_loss=0.06)
        broken += true_loss(found.new) > 0.06
    assert broken <= 10, f"the promise was broken in {broken} of 100 weeks"


def choices(seed: int, n: int) -> list[Choice]:
    """Queries at least 0.6 like known ones go to the cheap model, the others to the teacher; a tenth is drawn."""
    random = np.random.default_rng(seed)
    found = []
    for similarity in random.random(n):
        usual = similarity >= 0.6
        cheap = bool(usual) != (random.random() < 0.05)
        propensity = 0.95 if cheap == usual else 0.05
        value = float(random.random() < (0.97 if similarity > 0.4 else 0.3))
        found.append(
            Choice(float(similarity), cheap, value if cheap and random.random() < 0.5 else None, 0.5 if cheap else 1.0, propensity)
        )
    return found


def test_a_similarity_cut_off_moves_to_where_the_cheap_model_still_keeps_the_promise() -> None:
    found = propose_similarity(choices(4, 60_000), old=0.6, promised_loss=0.05)
    assert 0.3 < found.new < 0.6
    assert "lower the similarity" in found.reason
