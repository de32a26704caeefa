"""Do two answers to the same question say the same? A rule for where no judge is configured: it errs towards no, so that what cannot be
told counts as wrong. It refuses to know the question.
"""

from __future__ import annotations

from dataclasses import dataclass

from tutelage.routing.equivalence import Question, compare
from tutelage.scoring import matches

SHORT_WORDS = 8  # answers as short as this must be equal
LEAST_COSINE = 0.9


@dataclass(frozen=True)
class Agreement:
    same: bool
    reason: str


def agree(one: str, other: str, *, cosine: float) -> Agreement:
    """`cosine` of their embeddings, for answers too long to be equal word by word."""
    if matches(one, other):
        return Agreement(True, "the same words")
    a, b = Question(one), Question(other)
    if min(len(a.words), len(b.words)) <= SHORT_WORDS:
        return Agreement(False, "short answers that are not the same")
    found = compare(a, b)
    if found.numbers or found.opposite is not None:
        return Agreement(False, "their numbers differ" if found.numbers else f"one says {found.opposite}")
    return Agreement(cosine >= LEAST_COSINE, f"cosine {cosine:.2f}, {LEAST_COSINE} is asked for")
