"""What a user's verdict says of the versions that answered: right or wrong, at least as good as the teacher or not, better than another.

Pure rules on texts and verdicts. They refuse to know where these are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tutelage.evolution.evidence import Tally
from tutelage.scoring import matches

RIGHT_FROM = 0.5  # a score that a user gives: from here on the answer was right


@dataclass(frozen=True)
class Outcome:
    """One version's answer to one request, verified. `win`: at least as good as the teacher's."""

    right: bool
    win: bool


def verify(answer: str, *, served: bool, label: str | None, score: float, teacher: str | None) -> Outcome | None:
    """What is known of `answer`: by the user's own label if they gave one, by their score if it was the answer they got; else None."""
    if label is not None:
        right = matches(answer, label)
        return Outcome(right, right or (teacher is not None and not matches(teacher, label)))
    return Outcome(score >= RIGHT_FROM, score >= RIGHT_FROM) if served else None


def contest(candidate: bool, champion: bool) -> Tally:
    """Two versions' answers to one request, right or wrong, as the candidate sees it."""
    return Tally(int(candidate and not champion), int(candidate == champion), int(champion and not candidate))


def pair_up(candidate: Sequence[bool], champion: Sequence[bool]) -> tuple[Tally, list[bool], list[bool]]:
    """Outcomes on different requests, paired in their order, and what is left over of each side.

    Requests fall to one version or the other by a hash, so the k-th outcomes of both are as good as drawn together: while the versions
    are equally good, either side wins such a pair equally often.
    """
    together = min(len(candidate), len(champion))
    tally = Tally()
    for one, other in zip(candidate[:together], champion[:together], strict=True):
        tally += contest(one, other)
    return tally, list(candidate[together:]), list(champion[together:])
