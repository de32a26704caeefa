"""How strong evidence is, however often it is looked at: e-processes over wins, ties and losses.

Pure counting. It refuses to know what a win is, what is decided from it and how many other things are tested beside it.

A bettor starts with 1 and stakes a fixed share of the capital on each outcome x in [0, 1] being above `null`:
K(λ) = Π (1 + λ (xᵢ − null)), 0 ≤ λ < 1/null. While the mean of x, given the past, is at most `null`, K is a supermartingale that stays
above 0 (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B), and so is a mixture of
such bettors. By Ville's inequality its highest value ever reaches 1/α with probability at most α: checking after every query is free.
λ = (q − null) / (null (1 − null)) makes K the likelihood ratio of a win rate q against `null`. The bettors' q lie between null and 1, at
Gauss-Legendre nodes, with first capital falling linearly towards 1: most students that are better are a little better, and a rate near 1
shows itself soon anyway. Ties count half a win.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

NODES = 48  # each is a bettor: any number of them gives a valid e-process, more of them only lose less


@dataclass(frozen=True)
class Tally:
    """Outcomes of one side: of a student against a standard, or of a candidate against a champion on the same prompts."""

    wins: int = 0
    ties: int = 0
    losses: int = 0

    @property
    def n(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        """The win rate, ties half; 0 without outcomes."""
        return (self.wins + 0.5 * self.ties) / self.n if self.n else 0.0

    @property
    def lead(self) -> float:
        """How much larger the share of wins is than that of losses: the difference in the share right. 0 without outcomes."""
        return (self.wins - self.losses) / self.n if self.n else 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.wins + other.wins, self.ties + other.ties, self.losses + other.losses)

    def reversed(self) -> Tally:
        """The same outcomes as the other side sees them."""
        return Tally(self.losses, self.ties, self.wins)


def log_e(wins: Any, ties: Any, losses: Any, *, null: float) -> Any:
    """Natural logarithm of the e-value against "the win rate is at most `null`", from counts or arrays of counts of one shape.

    Raises ValueError unless 0 < null < 1.
    """
    import numpy as np

    won, tied, lost, weight = _bettors(null)
    counts = np.multiply.outer(wins, won) + np.multiply.outer(ties, tied) + np.multiply.outer(losses, lost)
    top = counts.max(axis=-1)
    total = top + np.log(np.exp(counts - top[..., None]) @ weight)
    return float(total) if np.ndim(total) == 0 else total


def e_value(tally: Tally, *, null: float) -> float:
    """The e-value against "the win rate is at most `null`"; 1 without outcomes, and at most 1e300."""
    import math

    return math.exp(min(log_e(tally.wins, tally.ties, tally.losses, null=null), math.log(1e300)))


@lru_cache(maxsize=64)
def _bettors(null: float) -> tuple[Any, Any, Any, Any]:
    """Log growth of each bettor's capital at a win, a tie and a loss, and each one's share of the first capital."""
    import numpy as np

    if not 0 < null < 1:
        raise ValueError(f"a null win rate of {null!r} cannot be tested; it lies between 0 and 1, without them")
    points, weights = np.polynomial.legendre.leggauss(NODES)
    rates = null + (1 - null) * (points + 1) / 2
    capital = weights * (1 - rates)
    stakes = (rates - null) / (null * (1 - null))
    return np.log1p(stakes * (1 - null)), np.log1p(stakes * (0.5 - null)), np.log1p(-stakes * null), capital / capital.sum()
