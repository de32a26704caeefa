"""Several models answered the same question: which answer is given? The one that most of them agree on. Pure; it knows no models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tutelage.scoring import canonical


@dataclass(frozen=True)
class Agreed:
    """The place of the answer that is given, and how many gave it."""

    index: int
    votes: int
    reason: str


def agree(texts: Sequence[str], worths: Sequence[float]) -> Agreed:
    """The answer of most models, by `scoring.canonical`; among answers of as many, that of the highest worth, then the first.

    Raises ValueError without answers.
    """
    if not len(texts) == len(worths) > 0:
        raise ValueError(f"{len(texts)} answers of {len(worths)} models; pass as many, at least one")
    said = [canonical(text) for text in texts]
    votes = Counter(said)
    index = max(range(len(texts)), key=lambda i: (votes[said[i]], worths[i], -i))
    count = votes[said[index]]
    told = f"{count} of {len(texts)} answers agree" if count > 1 else f"no two of {len(texts)} answers agree: the most trusted is given"
    return Agreed(index, count, told if len(texts) > 1 else "only one answered")
