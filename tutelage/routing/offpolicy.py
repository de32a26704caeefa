"""What would another policy have been worth? Estimated from what was logged, with the probability of each thing that was done.

`snips`: self-normalised inverse propensity scoring (Swaminathan and Joachims 2015), Σ w·r / Σ w with w = target / propensity; its
variance by linearisation, Σ w²(r - v)² / (Σ w)² (Owen, Monte Carlo theory, 9.2). `doubly_robust` (Dudík, Langford and Li 2011): the mean
over all requests of expected + w·(r - predicted), unbiased whatever the predictions are. Both refuse when Kish's effective sample size
(Σ w)² / Σ w² is too small: then a handful of requests would decide. Pure; it refuses to know what an action is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_EFFECTIVE = 100.0
ONE_SIDED_95 = 1.6448536269514722  # of the standard normal: a change is decided by one bound


@dataclass(frozen=True)
class Logged:
    """One request. `reward`: None where nobody looked. `propensity`: probability that this was done and looked at; `target`: that the
    other policy does it. `predicted`: the reward expected of what was done, `expected`: of what the other policy does."""

    reward: float | None
    propensity: float
    target: float
    predicted: float = 0.0
    expected: float = 0.0

    @property
    def weight(self) -> float:
        return 0.0 if self.reward is None else self.target / self.propensity


@dataclass(frozen=True)
class Estimated:
    """A mean reward with bounds that each hold with 95 %. `effective`: sample size by Kish, of `n` requests."""

    value: float
    lo: float
    hi: float
    effective: float
    n: int


@dataclass(frozen=True)
class Refused:
    """Too little is known to tell."""

    reason: str
    effective: float
    n: int


def effective_size(weights: Sequence[float]) -> float:
    """Kish (1965): (Σ w)² / Σ w²; 0 without weight."""
    squares = math.fsum(w * w for w in weights)
    return math.fsum(weights) ** 2 / squares if squares else 0.0


def snips(rows: Sequence[Logged], *, least: float = LEAST_EFFECTIVE, z: float = ONE_SIDED_95) -> Estimated | Refused:
    """The other policy's mean reward, within the range of the rewards."""
    seen = [(row.weight, row.reward) for row in rows if row.reward is not None]
    refused = _refused([weight for weight, _ in seen], len(rows), least)
    if refused is not None:
        return refused
    total = math.fsum(weight for weight, _ in seen)
    value = math.fsum(weight * reward for weight, reward in seen) / total
    error = math.sqrt(math.fsum((weight * (reward - value)) ** 2 for weight, reward in seen)) / total
    return Estimated(value, value - z * error, value + z * error, effective_size([w for w, _ in seen]), len(rows))


def doubly_robust(rows: Sequence[Logged], *, least: float = LEAST_EFFECTIVE, z: float = ONE_SIDED_95) -> Estimated | Refused:
    """The other policy's mean reward; requests at which nobody looked count as predicted."""
    refused = _refused([row.weight for row in rows], len(rows), least)
    if refused is not None:
        return refused
    terms = [row.expected + row.weight * ((row.reward or 0.0) - row.predicted) for row in rows]
    value = math.fsum(terms) / len(terms)
    spread = math.fsum((term - value) ** 2 for term in terms) / max(1, len(terms) - 1)
    error = math.sqrt(spread / len(terms))
    return Estimated(value, value - z * error, value + z * error, effective_size([row.weight for row in rows]), len(rows))


def _refused(weights: Sequence[float], n: int, least: float) -> Refused | None:
    effective = effective_size(weights)
    if effective >= least:
        return None
    return Refused(f"{n} requests count as {effective:.0f} independent ones; {least:.0f} are needed", effective, n)
