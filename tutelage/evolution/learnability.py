"""Whether a gap can be learned at all by this base at this budget, decided from a short probe of the training.

A pure rule on counts. It refuses to know models and data; it only says when going on would waste the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from tutelage.scoring import wilson


@dataclass(frozen=True)
class Learnability:
    """The probe's verdict: `upper` is the most that the student may know by now, `needed` what would justify going on."""

    learnable: bool
    reason: str
    upper: float
    needed: float


PROMISING = 0.15


def judge(
    right: int, n: int, *, majority: float, untrained: float, steps: int, least_gain: float = 0.15, token_probability: float = 0.0
) -> Learnability:
    """Judge `right` of `n` unseen items after `steps` optimiser steps.

    What a constant answer (`majority`) or the untrained base already reaches is no learning, so the one-sided 95 % upper
    bound of the share right must reach `least_gain` beyond the better of the two, or half of what is missing to 1. A task that
    begins slowly is told from a hopeless one by `token_probability`, the typical (geometric mean) probability of a token of the
    right answers: from `PROMISING` on, training goes on. Measured after a minute: family_relationships 0.24, spell_backward 0.02.
    """
    known = max(majority, untrained)
    needed = known + min(least_gain, (1 - known) / 2)
    upper = wilson(right, n, confidence=0.90).hi
    seen = f"after {steps} steps {right} of {n} right, majority {majority:.2f}, untrained {untrained:.2f}, upper bound {upper:.2f}"
    if upper < needed and token_probability >= PROMISING:
        return Learnability(True, f"{seen}, but its tokens are typically {token_probability:.2f} likely: worth going on", upper, needed)
    if upper < needed:
        token = f", tokens of the right answer typically {token_probability:.2f} likely" if token_probability else ""
        return Learnability(False, f"{seen}, needed {needed:.2f}{token}: not learnable by this base at this budget", upper, needed)
    return Learnability(True, f"{seen}, needed {needed:.2f}: worth the full training", upper, needed)
