"""The cascade's two questions: which student may try a request, and is its answer good enough to give?

Pure rules: values in, a frozen record with its reason out. Knows nothing of HTTP, tiers, prices or how an answer was made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tutelage.routing.confidence import Calibrator
from tutelage.routing.signs import MAX_SCORE, Signs

Tier = Literal["student", "ta", "teacher"]
_RANK: dict[Tier, int] = {"student": 0, "ta": 1, "teacher": 2}


@dataclass(frozen=True)
class Policy:
    """The numbers that routing goes by, for one tenant. `threshold`: the confidence from which a student's answer is given.
    `similarity`: to what is known, from which estimates of similar queries are trusted. Version 0 is what is configured."""

    version: int
    threshold: float
    similarity: float


@dataclass(frozen=True)
class StudentSnapshot:
    """One served version of a student, as the gateway last heard of it; `threshold` is its own least confidence."""

    name: str
    version: int
    tier: Tier
    domain: str
    digest: str
    calibrator: Calibrator
    threshold: float


@dataclass(frozen=True)
class Choice:
    """The student that tries first; None sends the request to the teacher at once."""

    student: StudentSnapshot | None
    reason: str


@dataclass(frozen=True)
class Acceptance:
    """Whether a student's answer is given to the client, with its calibrated probability of being right."""

    accepted: bool
    confidence: float
    reason: str


def choose_student(domain: str | None, students: Sequence[StudentSnapshot], *, quality_floor: float) -> Choice:
    """The highest tier, then newest version, in this domain that could ever be sure enough.

    A student whose calibrator cannot reach the least confidence asked of it (the higher of `quality_floor` and its own
    threshold) is not tried: its answer would only delay the teacher's. Names break ties, so the order does not matter.
    """
    if domain is None:
        return Choice(None, "the request belongs to no known domain")
    here = [student for student in students if student.domain == domain]
    if not here:
        return Choice(None, f"domain {domain} has no student")
    able = [s for s in here if s.calibrator.probability(MAX_SCORE) >= max(s.threshold, quality_floor)]
    if not able:
        return Choice(None, f"no student of domain {domain} has enough verified outcomes to be sure enough")
    best = max(able, key=lambda s: (_RANK[s.tier], s.version, s.name))
    return Choice(best, f"{best.name} v{best.version} is the {best.tier} of domain {domain}")


def accept(student: StudentSnapshot, score: float, *, threshold: float) -> Acceptance:
    """Give the answer if its calibrated probability reaches both `threshold` and the student's own."""
    return judge(student, score, needed=max(threshold, student.threshold))


def judge(student: StudentSnapshot, score: float, *, needed: float, promised: float | None = None) -> Acceptance:
    """As `accept`, by `needed` alone: what a plan has made of both. `promised`: the quality that answers as sure as this one must surely
    have, by outcomes that the calibrator did not learn from; None: nobody asked."""
    confidence, assured = student.calibrator.probability(score), student.calibrator.assured(score)
    if confidence >= needed and promised is not None:
        told = f"answers as sure as this ({confidence:.3f}) surely are right in {assured:.3f}, {promised:.3f} is promised"
        return Acceptance(assured >= promised, confidence, told)
    if confidence >= needed:
        return Acceptance(True, confidence, f"confidence {confidence:.3f} reaches {needed:.3f}")
    if student.calibrator.kind == "unknown":
        return Acceptance(False, confidence, f"only {student.calibrator.n} verified outcomes: confidence is unknown")
    return Acceptance(False, confidence, f"confidence {confidence:.3f} is below {needed:.3f}")


def again(student: StudentSnapshot, signs: Signs, *, needed: float, promised: float | None) -> StudentSnapshot | None:
    """The student as it is judged when it is asked again, where an answer that fell short could still be given if all of those agreed; None
    where it could not, or agreement is not proven to tell anything."""
    second = student.calibrator.second
    if second is None:
        return None
    surer = replace(student, calibrator=second)
    return surer if judge(surer, score_again(surer, signs, 1.0), needed=needed, promised=promised).accepted else None


def score_again(surer: StudentSnapshot, signs: Signs, agreement: float) -> float:
    """The score of an answer that so large a share of further ones agreed with."""
    return surer.calibrator.reading.score(signs._replace(agreement=agreement))
