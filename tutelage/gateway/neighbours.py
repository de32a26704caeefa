"""The questions that a tenant's kept answers belong to, and which of them lie near a new one: in this worker's memory, the newest only.

It refuses to know answers (`cache.py`) and whether a near question is the same (`routing/equivalence.py`).
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, NamedTuple

from tutelage.gateway.cache import CacheKey
from tutelage.routing.equivalence import Question

if TYPE_CHECKING:
    import numpy as np


class Kept(NamedTuple):
    """A question whose answer is in the cache at `place`, until `expires_at` (Unix seconds) at most."""

    question: Question
    place: CacheKey
    expires_at: float


class Neighbours:
    """One tenant's questions in a FAISS index, at most `most`; safe to share between threads."""

    def __init__(self, dimension: int, most: int) -> None:
        import faiss

        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
        self._most = most
        self._kept: dict[int, Kept] = {}  # oldest first
        self._ids: dict[CacheKey, int] = {}
        self._contexts: dict[str, set[int]] = {}
        self._next = 0
        self._soonest = math.inf  # when the first of them expires, or before
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, place: object) -> bool:
        return place in self._ids

    def knows(self, context: str) -> bool:
        """Whether anything was asked in this context."""
        return context in self._contexts

    def add(self, kept: list[Kept], embeddings: np.ndarray) -> None:
        """float32 [n, dimension], each row of length 1. What is there already takes its new end; too many make the oldest go."""
        import numpy as np

        with self._lock:
            self._remove([self._ids[one.place] for one in kept if one.place in self._ids])
            ids = np.arange(self._next, self._next + len(kept))
            self._next += len(kept)
            self._index.add_with_ids(embeddings, ids)
            for number, one in zip(ids.tolist(), kept, strict=True):
                self._kept[number] = one
                self._ids[one.place] = number
                self._soonest = min(self._soonest, one.expires_at)
                self._contexts.setdefault(one.question.context, set()).add(number)
            if len(self._kept) > self._most:  # a tenth at once: each removal moves the whole index
                self._remove([*self._kept][: len(self._kept) - self._most + self._most // 10])

    def near(self, embedding: np.ndarray, context: str, *, most: int) -> list[tuple[Kept, float]]:
        """The nearest in this context with their cosine, nearest first."""
        import faiss
        import numpy as np

        with self._lock:
            ids = self._contexts.get(context)
            if not ids:
                return []
            chosen = faiss.SearchParameters(sel=faiss.IDSelectorBatch(np.fromiter(ids, np.int64, len(ids))))  # type: ignore[call-arg]
            cosines, found = self._index.search(embedding[None], most, params=chosen)
            return [(self._kept[i], float(c)) for i, c in zip(found[0].tolist(), cosines[0], strict=True) if i >= 0]

    def drop(self, place: CacheKey) -> None:
        with self._lock:
            if place in self._ids:
                self._remove([self._ids[place]])

    def expire(self, now: float) -> None:
        """Forget the text of every question whose answer has expired."""
        if now < self._soonest:
            return
        with self._lock:
            self._remove([number for number, one in self._kept.items() if one.expires_at <= now])
            self._soonest = min((one.expires_at for one in self._kept.values()), default=math.inf)

    def _remove(self, ids: list[int]) -> None:
        import faiss
        import numpy as np

        if not ids:
            return
        self._index.remove_ids(faiss.IDSelectorBatch(np.array(ids, dtype=np.int64)))
        for number in ids:
            one = self._kept.pop(number)
            del self._ids[one.place]
            mates = self._contexts[one.question.context]
            mates.discard(number)
            if not mates:
                del self._contexts[one.question.context]
