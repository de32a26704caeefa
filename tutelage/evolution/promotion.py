"""Is a student good enough to serve its domain? The published floors, and a lower confidence bound above the majority answer.

A pure rule: evidence in, verdict out. It refuses to know how the evidence was measured or what a verdict sets in motion.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from tutelage.records import Tier
from tutelage.settings import Strict


class PromotionSettings(Strict):
    """The floors from student to TA (`promotion.yaml`): necessary, each of them."""

    min_queries: int = Field(default=30, ge=1)
    min_confidence: float = Field(default=0.75, ge=0, le=1)
    min_win_rate: float = Field(default=0.60, ge=0, le=1)


@dataclass(frozen=True)
class Evidence:
    """What is known of a candidate from frozen held-out items it never saw.

    `wins`: answers judged at least as good as the teacher's. `lower`, `upper`: 95 % Wilson bounds of the share right.
    `majority`: share right of always giving the most frequent answer. `champion_accuracy`: of who answers the domain now,
    on the same items. `learnable` False: the probe ended the training early, for `learnable_reason`.
    """

    n: int
    correct: int
    wins: int
    accuracy: float
    lower: float
    upper: float
    majority: float
    confidence: float
    ece: float | None
    learnable: bool
    learnable_reason: str
    before: float | None = None
    champion_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """`promote`: to TA. `keep`: stays a student, answering only where its confidence clears the threshold. `refuse`: never answers."""

    action: Literal["promote", "keep", "refuse"]
    tier: Tier | None
    reason: str


def judge(evidence: Evidence, floors: PromotionSettings) -> Verdict:
    """Refuse what learned nothing or is worse than the champion, keep what is useful in part, promote what clears every floor."""
    bounds = f"95 % [{evidence.lower:.2f}, {evidence.upper:.2f}]"
    held_out = f"{evidence.correct} of {evidence.n} held-out items right ({evidence.accuracy:.2f}, {bounds})"
    if not evidence.learnable:
        return Verdict("refuse", None, f"not learnable: {evidence.learnable_reason}; {held_out}, majority {evidence.majority:.2f}")
    if evidence.n == 0 or evidence.lower <= evidence.majority:
        return Verdict("refuse", None, f"{held_out}: not above always giving the majority answer ({evidence.majority:.2f})")
    if evidence.champion_accuracy is not None and evidence.accuracy <= evidence.champion_accuracy:
        return Verdict("refuse", None, f"{held_out}: not better than the champion it would replace ({evidence.champion_accuracy:.2f})")
    missed = _missed(evidence, floors)
    if missed:
        return Verdict("keep", "student", f"{held_out}, majority {evidence.majority:.2f}; stays a student: {'; '.join(missed)}")
    won = f"win rate {evidence.wins / evidence.n:.2f}, calibrated confidence {evidence.confidence:.2f}"
    return Verdict("promote", "ta", f"{held_out}, majority {evidence.majority:.2f}; {won} clear the floors")


def _missed(evidence: Evidence, floors: PromotionSettings) -> list[str]:
    missed = []
    if evidence.n < floors.min_queries:
        missed.append(f"{evidence.n} held-out queries, {floors.min_queries} needed")
    if evidence.confidence < floors.min_confidence:
        missed.append(f"calibrated confidence {evidence.confidence:.2f} is below {floors.min_confidence:.2f}")
    if evidence.wins < floors.min_win_rate * evidence.n:
        missed.append(f"win rate {evidence.wins / evidence.n:.2f} is below {floors.min_win_rate:.2f}")
    return missed
