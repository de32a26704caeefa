"""Does a student still keep what its calibrator promises? Newer outcomes lower its confidence, and raise it again when it recovers.

A version is judged on frozen items once; what it meets later may be harder, and nobody may notice: its scores look as they did. So each
outcome of live traffic is held against the probability that was promised for it. Pure: outcomes in, a calibrator and its reason out. It
refuses to know where outcomes come from and who takes the student out of service.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tutelage.routing.confidence import Calibrator
from tutelage.scoring import Rate

HALF_LIFE = 30  # outcomes after which an outcome counts half
PRIOR = 5.0  # outcomes as promised that stand against a run of bad luck
LEAST_PROMISED = 0.7  # what was promised less has no say: it is never given, and what was given is what must hold
LEAST_OUTCOMES = 10  # fewer are chance: one wrong answer is no drift
LEAST_DOUBT = 0.5  # standard errors below the promise from which it counts as broken
LEAST_MEASURE = 0.9  # no teacher counts as right more seldom
SUSPICION = 5.0  # times as many answers of a doubted student are looked at: either it is cleared soon or it is out


@dataclass(frozen=True)
class Kept:
    """The calibrator to go by now. `expected` and `seen` are right answers among the discounted newest `n` outcomes."""

    calibrator: Calibrator
    n: float
    expected: float
    seen: float
    reason: str


def watch(calibrator: Calibrator, outcomes: Sequence[tuple[float, float]], *, half_life: float = HALF_LIFE, prior: float = PRIOR) -> Kept:
    """Hold outcomes, (score, value in 0..1) oldest first, against what the calibrator promised for their scores.

    Reliability is (Σ w·value + prior) / (Σ w·promised + prior) with w = 2^(-age / half_life), never above 1: the ratio of observed to
    expected (the standardised ratio of Breslow and Day 1987, shrunk to 1). Within LEAST_DOUBT standard errors of the promise, and before
    LEAST_OUTCOMES, it stays 1.
    """
    if calibrator.kind == "unknown":
        return Kept(calibrator, 0.0, 0.0, 0.0, "nothing was promised yet")
    trained = replace(calibrator, reliability=1.0)
    n = expected = seen = variance = 0.0
    count = 0
    fade = 0.5 ** (1 / half_life)
    for score, value in outcomes:
        promised = trained.probability(score)
        if promised < LEAST_PROMISED:
            continue
        count += 1
        n, expected, seen = n * fade + 1, expected * fade + promised, seen * fade + value
        variance = variance * fade**2 + promised * (1 - promised)
    if count < LEAST_OUTCOMES:
        return Kept(trained, n, expected, seen, f"{count} outcomes are too few to tell")
    reliability = min(1.0, (seen + prior) / (expected + prior))
    told = f"{seen:.1f} of {expected:.1f} promised answers among the last {n:.0f} outcomes were right"
    if expected - seen <= LEAST_DOUBT * variance**0.5:
        return Kept(trained, n, expected, seen, f"{told}: as promised")
    return Kept(replace(trained, reliability=reliability), n, expected, seen, f"{told}: confidence counts {reliability:.3f} of what it was")


def as_right(agreed: float, teacher: Rate) -> float:
    """What saying the same as a teacher counts as being right, where the teacher is right so often by users' verdicts: who is always right
    agrees with one that errs in every twentieth answer in 0.95, and keeps its promise.

    The chance of agreeing is the chance of being right times the teacher's (Rogan and Gladen 1978, without errors shared). The teacher's is
    taken at its upper 95 % bound, so without verdicts as 1, and never below LEAST_MEASURE: where only bad answers are judged, all look bad.
    """
    return agreed / max(teacher.hi, LEAST_MEASURE)


def looked_at(share: float, calibrator: Calibrator) -> float:
    """The share of a student's given answers that are compared with the teacher's: more while its promise is in doubt."""
    return min(1.0, share * SUSPICION) if calibrator.reliability < 1 else share
