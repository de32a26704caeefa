"""Earlier answers to similar requests: the knowledge that is on record, found by embedding and given to a model in its context.

Pure but for the index it holds in memory. It refuses to know whose answers they are: one index holds one tenant's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 8  # of one request's neighbours that are ever looked at


@dataclass(frozen=True)
class Recalled:
    """An earlier request of the tenant with the answer that was accepted; `similarity` is the cosine to the one asked now."""

    prompt: str
    answer: str
    similarity: float = 1.0


class Recall:
    """An exact inner-product index (FAISS) over accepted answers; `embeddings` has shape [answers, dimensions], unit length, float32."""

    def __init__(self, answers: Sequence[Recalled], embeddings: Any) -> None:
        import faiss

        if len(answers) != len(embeddings):
            raise ValueError(f"{len(answers)} answers for {len(embeddings)} embeddings; pass one embedding for each answer")
        self._answers = list(answers)
        self._index = faiss.IndexFlatIP(embeddings.shape[1]) if len(answers) else None
        if self._index is not None:
            self._index.add(embeddings)

    def nearest(self, embedding: Any, *, most: int = 3, least: float = 0.6, but_not: int | None = None) -> list[Recalled]:
        """The `most` similar ones (at most 8) from a similarity of `least` on, most similar first; never answer number `but_not`."""
        if self._index is None:
            return []
        similar, places = self._index.search(embedding.reshape(1, -1), min(MOST + 1, len(self._answers)))
        found = [
            Recalled(self._answers[place].prompt, self._answers[place].answer, float(similarity))
            for similarity, place in zip(similar[0], places[0], strict=True)
            if place != but_not and similarity >= least
        ]
        return found[: min(most, MOST)]


def in_context(messages: Sequence[Mapping[str, Any]], found: Sequence[Recalled]) -> list[dict[str, Any]]:
    """The request with what was recalled as earlier turns before its last message, least similar first; unchanged where nothing was."""
    turns: list[dict[str, Any]] = []
    for recalled in reversed(found):
        turns += [{"role": "user", "content": recalled.prompt}, {"role": "assistant", "content": recalled.answer}]
    return [*map(dict, messages[:-1]), *turns, *map(dict, messages[-1:])]
