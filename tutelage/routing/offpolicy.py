"""What would another policy have been worth? Estimated from what was logged, with the probability of each thing that was done.

`snips`: self-normalised inverse propensity scoring (Swaminathan and Joachims 2015), Σ w·r / Σ w with w = target / propensity; its
variance by linearisation, Σ w²(r - v)² / (Σ w)² (Owen, Monte Carlo theory, 9.2). `doubly_robust` (Dudík, Langford and Li 2011): the mean
over all requests of expected + w·(r - predicted), unbiased whatever the predictions are. Both refuse when Kish's effective sample size
(Σ w)² / Σ w² is too small: then a handful of requests would decide. Pure; it refuses to know what an action is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEAST_EFFECTIVE = 100.0
ONE_SIDED_95 = 1.6448536269514722  # of the standard normal: a change is decided by one bound


@dataclass(frozen=True)
class Logs:
    """Requests as they were logged; every array is float [n]. `reward`: nan where nobody looked. `propensity`: the probability that this
    was done and looked at; `target`: that the other policy does it. `predicted`: the reward expected of what was done, `expected`: of what
    the other policy does."""

    reward: np.ndarray
    propensity: np.ndarray
    target: np.ndarray
    predicted: np.ndarray
    expected: np.ndarray


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


def effective_size(weights: np.ndarray) -> float:
    """Kish (1965): (Σ w)² / Σ w²; 0 without weight."""
    squares = float((weights * weights).sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0


def snips(logs: Logs, *, least: float = LEAST_EFFECTIVE, z: float = ONE_SIDED_95) -> Estimated | Refused:
    """The other policy's mean reward, within the range of the rewards."""
    weights, rewards = _seen(logs)
    effective = effective_size(weights)
    if effective < least:
        return _refused(effective, len(weights), least)
    total = float(weights.sum())
    value = float((weights * rewards).sum()) / total
    error = float((weights**2 * (rewards - value) ** 2).sum()) ** 0.5 / total
    return Estimated(value, value - z * error, value + z * error, effective, len(weights))


def doubly_robust(logs: Logs, *, least: float = LEAST_EFFECTIVE, z: float = ONE_SIDED_95) -> Estimated | Refused:
    """The other policy's mean reward; requests at which nobody looked count as predicted."""
    weights, rewards = _seen(logs)
    effective = effective_size(weights)
    if effective < least:
        return _refused(effective, len(weights), least)
    terms = logs.expected + weights * (rewards - logs.predicted)
    value, error = float(terms.mean()), float(terms.std(ddof=1)) / len(terms) ** 0.5
    return Estimated(value, value - z * error, value + z * error, effective, len(terms))


def _seen(logs: Logs) -> tuple[np.ndarray, np.ndarray]:
    """Weights and rewards, both 0 where nobody looked."""
    import numpy as np

    seen = ~np.isnan(logs.reward)
    return np.where(seen, logs.target / logs.propensity, 0.0), np.where(seen, logs.reward, 0.0)


def _refused(effective: float, n: int, least: float) -> Refused:
    return Refused(f"{n} requests count as {effective:.0f} independent ones; {least:.0f} are needed", effective, n)
