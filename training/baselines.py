"""What a student must beat to be worth training: the nearest training example's answer, and the untrained base shown such examples.

Neighbours are found by words (TF-IDF), which needs no model and always gives the same. It refuses to know what an answer is judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from training.examples import Example


@dataclass(frozen=True)
class Neighbours:
    """The training examples and their words, ready to be asked."""

    rows: Sequence[Example]
    vectorizer: Any
    matrix: Any

    @classmethod
    def of(cls, rows: Sequence[Example]) -> Neighbours:
        from sklearn.feature_extraction.text import TfidfVectorizer

        pattern = r"(?u)\w+|[^\w\s]"
        vectorizer = TfidfVectorizer(token_pattern=pattern, ngram_range=(1, 2), sublinear_tf=True)
        return cls(rows, vectorizer, vectorizer.fit_transform([row.text for row in rows]))

    def nearest(self, items: Sequence[Example], count: int) -> list[list[Example]]:
        """For each item its `count` most similar examples, the most similar first; of equals the first in the file."""
        import numpy as np

        similarity = (self.vectorizer.transform([item.text for item in items]) @ self.matrix.T).toarray()
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
        return [[self.rows[at] for at in found] for found in order]


def copied(items: Sequence[Example], neighbours: Neighbours) -> list[str]:
    """The answer of each item's nearest training example: what a lookup would say."""
    return [found[0].answer for found in neighbours.nearest(items, 1)]


def in_context(items: Sequence[Example], neighbours: Neighbours, examples: int, fits: Callable[[Example], bool]) -> list[Example]:
    """The items with their nearest examples as earlier turns, the most similar one last; as many of them as fit, at most `examples`."""
    shown = []
    for item, found in zip(items, neighbours.nearest(items, examples), strict=True):
        tries = (_after(item, found[:count]) for count in range(len(found), 0, -1))
        shown.append(next((tried for tried in tries if fits(tried)), item))
    return shown


def _after(item: Example, found: Sequence[Example]) -> Example:
    turns = [turn for row in reversed(found) for turn in (row.prompt[-1], {"role": "assistant", "content": row.answer})]
    return replace(item, prompt=(*item.prompt[:-1], *turns, item.prompt[-1]))
