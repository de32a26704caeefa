"""Has a version become worse than it was when it was trusted? An e-detector on outcomes that are good or not.

Pure: outcomes in, an alarm with its reason out. It refuses to know what is done about it.

Shiryaev-Roberts e-detector (Shin, Ramdas and Rinaldo 2024, "E-detectors", NEJSDS): M ← (M + 1) L at each outcome, where L is the likelihood
ratio of a lower rate against the frozen `baseline`; the detector is a mixture of several lower rates. While the rate is not below the
baseline, M − t is a supermartingale, so the mean number of outcomes before an alarm at M ≥ A is at least A, whenever one looks. No test
with that many can know a loss from 0.90 to 0.75 in much less than log(A) / KL(0.75, 0.90) outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from tutelage.settings import Strict

WORSE = (2.0, 3.0, 5.0)  # by how much the odds of a bad outcome may have grown: each is a detector, all are mixed evenly
MOST, LEAST = 0.995, 0.05  # baselines beyond these are read as these: rates of 0 and 1 cannot be told from a handful of outcomes

Signal = Literal["acceptance", "agreement", "error", "truncation", "latency"]
FROZEN: tuple[Signal, ...] = ("acceptance", "agreement")  # users' verdicts, the teacher's answers: held to what they were at first


class WatchSettings(Strict):
    """`watch.yaml`: outcomes between false alarms, on the mean and at least; the service levels, each a share of requests that may miss it.

    `baseline_outcomes`: outcomes after which a champion's acceptance, or its agreement with the teacher, is frozen as what it is held to.
    """

    outcomes_between_false_alarms: int = Field(default=100_000, ge=100)
    requests_between_false_alarms: int = Field(default=1_000_000, ge=100)
    baseline_outcomes: int = Field(default=200, ge=20)
    errors: float = Field(default=0.01, gt=0, lt=1)
    truncations: float = Field(default=0.05, gt=0, lt=1)
    slow: float = Field(default=0.05, gt=0, lt=1)
    slow_ms: int = Field(default=5_000, gt=0)

    def detector(self, signal: Signal, frozen: float) -> Detector:
        """What watches a signal: FROZEN ones against their frozen share, the others against their service levels."""
        if signal in FROZEN:
            return Detector(frozen, self.outcomes_between_false_alarms)
        allowed = {"error": self.errors, "truncation": self.truncations, "latency": self.slow}[signal]
        return Detector(1 - allowed, self.requests_between_false_alarms)


@dataclass(frozen=True)
class Detector:
    """Watches a share of good outcomes that was `baseline`; alarms at `limit`, the least mean number of outcomes before a false one."""

    baseline: float
    limit: float

    def start(self) -> tuple[float, ...]:
        """The state before the first outcome."""
        return (0.0,) * len(WORSE)

    def after(self, state: Any, good: Any) -> Any:
        """The state after one outcome: of one watch (`state` of shape [k], `good` a bool), or of many at once ([n, k] and [n])."""
        import numpy as np

        if_good, if_bad = _ratios(self.baseline)
        return (np.asarray(state) + 1) * np.where(np.asarray(good)[..., None], if_good, if_bad)

    def value(self, state: Any) -> Any:
        """How strong the evidence of a loss is; an alarm from `limit` on."""
        import numpy as np

        mean = np.asarray(state).mean(axis=-1)
        return float(mean) if np.ndim(mean) == 0 else mean


@dataclass(frozen=True)
class Watched:
    """One signal of one version so far; `state` is kept between calls, `alarm` is final."""

    signal: Signal
    state: tuple[float, ...]
    seen: int
    bad: int
    alarm: bool
    reason: str


def follow(signal: Signal, detector: Detector, outcomes: Sequence[bool], before: Watched | None = None) -> Watched:
    """Take in outcomes in their order (True: good), and say whether the version is to be rolled back.

    Nothing after the first alarm is looked at: what an alarm set in motion is not undone by later luck.
    """
    state = before.state if before else detector.start()
    seen, bad, alarm = (before.seen, before.bad, before.alarm) if before else (0, 0, False)
    for good in outcomes:
        if alarm:
            break
        state = detector.after(state, good)
        seen, bad = seen + 1, bad + (not good)
        alarm = bool(detector.value(state) >= detector.limit)
    value = detector.value(state)
    against = f"{bad} of {seen} outcomes bad since the watch began, {1 - detector.baseline:.1%} expected"
    reason = f"{signal}: {against}; evidence {value:.3g} of {detector.limit:.3g}" + (", alarm" if alarm else "")
    return Watched(signal, tuple(float(part) for part in state), seen, bad, alarm, reason)


@lru_cache(maxsize=64)
def _ratios(baseline: float) -> tuple[Any, Any]:
    """Likelihood ratios of each lower rate against the baseline, at a good and at a bad outcome."""
    import numpy as np

    rate = min(max(baseline, LEAST), MOST)
    odds = np.asarray(WORSE) * (1 - rate) / rate
    bad = odds / (1 + odds)
    return (1 - bad) / rate, bad / (1 - rate)
