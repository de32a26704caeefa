"""Which prompts ask the same thing in other words: MinHash over their words, cosine over their embeddings, clusters of both.

Near duplicates must also have the same answer, for templates ask very different things in nearly the same words ("12 + 35" and "13 + 34").
It refuses to know splits and what becomes of a duplicate.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from tutelage.scoring import canonical

if TYPE_CHECKING:
    import numpy as np

WORD = re.compile(r"\w+|[^\w\s]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
BOILERPLATE_SHARE = 0.5  # a word in so many of the texts says nothing of any of them
BOILERPLATE_LEAST = 20  # texts from which that can be told
SHORT_ANSWER = 6  # words; longer answers are hardly ever equal letter by letter, so the prompts alone decide
PERMUTATIONS = 128
SEED = 1


@dataclass(frozen=True)
class Asked:
    """One prompt as text, with the answer it wants."""

    text: str
    label: str


@dataclass(frozen=True)
class Thresholds:
    """From what similarity two prompts are one: Jaccard of their words and word pairs, cosine of their embeddings."""

    words: float
    cosine: float


@dataclass(frozen=True)
class Pair:
    """Two rows (i < j) that ask the same; `by`: "words" or "embedding"."""

    i: int
    j: int
    similarity: float
    by: str


def near_pairs(asked: Sequence[Asked], vectors: np.ndarray | None, least: Thresholds) -> list[Pair]:
    """All pairs at least so similar whose answers agree, by either measure; without `vectors` (float32 [n, d], unit rows) by words alone.

    LSH proposes pairs of words and exact Jaccard decides, so that what it misses is all that is approximate.
    """
    found = {(p.i, p.j): p for p in _by_words(asked, least.words)}
    if vectors is not None:
        for pair in _by_embedding(asked, vectors, least.cosine):
            found.setdefault((pair.i, pair.j), pair)
    return [found[key] for key in sorted(found)]


def clusters(count: int, pairs: Iterable[Pair]) -> list[int]:
    """The cluster of each of `count` rows, named by its first row: rows that any chain of pairs connects are together."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for pair in pairs:
        low, high = sorted((root(pair.i), root(pair.j)))
        parent[high] = low
    return [root(i) for i in range(count)]


def shingles(texts: Sequence[str]) -> list[frozenset[str]]:
    """Words and pairs of neighbouring words of each text, without the words that most of the texts share."""
    words = [WORD.findall(text.casefold()) for text in texts]
    common: set[str] = set()
    if len(texts) >= BOILERPLATE_LEAST:
        seen = Counter(w for text in words for w in set(text))
        common = {w for w, n in seen.items() if n > BOILERPLATE_SHARE * len(texts)}
    return [_shingled([w for w in text if w not in common] or text) for text in words]


def same_answer(one: str, other: str) -> bool:
    """Equal as answers are compared, or both too long to ever be."""
    if len(one.split()) > SHORT_ANSWER and len(other.split()) > SHORT_ANSWER:
        return True
    return canonical(one) == canonical(other)


def _shingled(words: Sequence[str]) -> frozenset[str]:
    return frozenset([*words, *(f"{a} {b}" for a, b in pairwise(words))])


def _by_words(asked: Sequence[Asked], least: float) -> list[Pair]:
    from datasketch import MinHash, MinHashLSH

    sets = shingles([a.text for a in asked])
    hashes = MinHash.bulk([[s.encode() for s in sorted(members)] for members in sets], num_perm=PERMUTATIONS, seed=SEED)
    # Proposing at a lower similarity than asked for costs little and misses less.
    index = MinHashLSH(threshold=max(0.1, least - 0.3), num_perm=PERMUTATIONS)
    pairs = []
    for j, sketch in enumerate(hashes):
        for i in index.query(sketch):
            similarity = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
            if similarity >= least and same_answer(asked[i].label, asked[j].label):
                pairs.append(Pair(i, j, similarity, "words"))
        index.insert(j, sketch)
    return pairs


def _by_embedding(asked: Sequence[Asked], vectors: np.ndarray, least: float) -> list[Pair]:
    """Embeddings hardly see numbers, so prompts whose numbers differ are never called the same by them."""
    import faiss

    if not len(asked):
        return []
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    limits, similarities, neighbours = index.range_search(vectors, least)
    numbers = [Counter(NUMBER.findall(a.text)) for a in asked]
    pairs = []
    for i in range(len(asked)):
        for at in range(int(limits[i]), int(limits[i + 1])):
            j = int(neighbours[at])
            if i < j and numbers[i] == numbers[j] and same_answer(asked[i].label, asked[j].label):
                pairs.append(Pair(i, j, float(similarities[at]), "embedding"))
    return pairs


def members(of: Sequence[int]) -> dict[int, list[int]]:
    """The rows of each cluster."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, cluster in enumerate(of):
        rows[cluster].append(row)
    return dict(rows)
