"""From which probability on may a kept answer be given, if at most a stated share of such answers may be wrong? What shadow
re-verifications say so far, with confidence; too few of them say: none.

The bound holds at every look, however often one looks: it is a test martingale. A pure rule. It refuses to know where labels come from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

CONFIDENCE = 0.95
# Each has its share of the doubt. Fixed before any label is seen.
LEVELS = (0.95, 0.9, 0.8, 0.7)
NEWEST = 2_000  # labels that count: older ones tell of other traffic


class Label(NamedTuple):
    """One would-be hit that was asked all the same: what its probability was before that, and whether the kept answer was right."""

    probability: float
    right: bool


@dataclass(frozen=True)
class Allowance:
    """`least`: the probability from which on answers are within the budget; None: no answer may be given yet."""

    least: float | None
    labels: int
    wrong: int
    reason: str


def allowance(labels: Iterable[Label], *, budget: float) -> Allowance:
    """`budget`: the largest tolerable share of wrong answers among those given, in 0..1; 0 gives none.

    Serving begins at the lowest of LEVELS whose labels show, with CONFIDENCE over all levels and all looks together, that less than
    `budget` of its answers are wrong. Probabilities must have been stated before their label was known.
    """
    newest = list(labels)[-NEWEST:]
    if budget <= 0:
        return Allowance(None, len(newest), 0, "no error is tolerable, so none is risked")
    told = Allowance(None, len(newest), sum(not label.right for label in newest), "")
    for level in sorted(LEVELS):
        above = [label.right for label in newest if label.probability >= level]
        wrong = above.count(False)
        if evidence(len(above), wrong, budget=budget) >= len(LEVELS) / (1 - CONFIDENCE):
            return Allowance(
                level, len(above), wrong, f"{wrong} of {len(above)} re-verified at {level} or more were wrong: within {budget:g}"
            )
    return Allowance(
        None, told.labels, told.wrong, f"{told.wrong} of {told.labels} re-verified were wrong: not surely within {budget:g} yet"
    )


def evidence(n: int, wrong: int, *, budget: float) -> float:
    """How many times likelier `wrong` of `n` are under some error below `budget` (uniformly drawn) than under the budget itself.

    Under any true error of `budget` or more this is a nonnegative supermartingale that begins at 1, so by Ville's inequality it ever
    reaches x with a probability of at most 1/x (Ramdas et al. 2023, "Game-theoretic statistics and safe anytime-valid inference",
    section 3). Of all calls beyond the budget: 0 to infinity.
    """
    import math

    from scipy.special import betainc, betaln

    if n == 0:
        return 1.0
    below = float(betainc(1 + wrong, 1 + n - wrong, budget))
    if below <= 0.0:
        return 0.0
    log_mixture = float(betaln(1 + wrong, 1 + n - wrong)) + math.log(below) - math.log(budget)
    log_budget = wrong * math.log(budget) + (n - wrong) * math.log1p(-budget)
    return math.exp(min(log_mixture - log_budget, 700.0))
