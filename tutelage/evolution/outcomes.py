"""What a user's verdict says of the versions that answered: right or wrong, at least as good as the teacher or not, better than another.

Pure rules on texts and verdicts. They refuse to know where these are recorded.
"""

from __future__ import annotations

import hashlib
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


def sampled(request_id: str, observed: float, share: float) -> bool:
    """Whether a comparison belongs to the even sample, `share` of a version's requests. `observed`: the probability that it was made.

    Answers that were not given are compared for nothing and always, those that were given now and then: counted as they come, they would
    make every student look as if it were unsure all the time. Each is kept with probability share / observed, drawn by its request.
    """
    drawn = hashlib.blake2b(request_id.encode(), digest_size=8, key=b"sampled").digest()
    return int.from_bytes(drawn) < share / observed * 2**64


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
