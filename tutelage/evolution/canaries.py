"""Held-out items that nobody trains on, and the alarm when a student seems to have seen them.

Pure rules over keys and counts. They refuse to know texts, files and students.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.evolution.evidence import Tally

SLICE = 2  # of a hundred prompts are canaries or may become ones: drawn by hash, so no cycle ever trains on them
DOUBT = 1e-3  # a chance this small, or smaller, of so large a difference is no chance


@dataclass(frozen=True)
class Suspicion:
    """Whether a score is too good where it could be known beforehand; `chance` is the probability of so much by luck alone."""

    alarm: bool
    chance: float
    reason: str


def inflated(exposed: Tally, fresh: Tally, *, what: str = "held-out items") -> Suspicion:
    """Compare a share right where answers could leak or a judge be pleased (`exposed`) with one where they could not (`fresh`).

    Fisher's exact test, one-sided. A student trained on the evaluation set knows its items and not what came after; one that learned
    to please the judge wins its verdicts and not the users'.
    """
    from scipy.stats import hypergeom

    n, right = exposed.n + fresh.n, exposed.wins + fresh.wins
    chance = float(hypergeom.sf(exposed.wins - 1, n, right, exposed.n)) if exposed.n and fresh.n else 1.0
    seen = f"{exposed.wins} of {exposed.n} {what} right, but {fresh.wins} of {fresh.n} that it cannot have seen (chance {chance:.2g})"
    return Suspicion(chance <= DOUBT, chance, seen)


@dataclass(frozen=True)
class Canary:
    """One held-out item: the hash of its prompt, its embedding (unit length) and the quarter (year × 4 + quarter) it came in."""

    key: bytes
    embedding: Any
    quarter: int


def key_of(prompt: str) -> bytes:
    """What a canary is known by: it tells nothing of the prompt to whom has only the key."""
    return hashlib.sha256(" ".join(prompt.casefold().split()).encode()).digest()


def drawn(key: bytes) -> bool:
    """Whether a prompt is of the slice that canaries are taken from, and so is never trained on: now and in every later cycle."""
    return int.from_bytes(key[:8]) % 100 < SLICE


def rotate(held: Sequence[Canary], candidates: Sequence[Canary], *, size: int, quarter: int, share: float = 0.2) -> list[Canary]:
    """The canaries of a quarter: at most `size`; once full, the oldest `share` of them make room for new ones, once a quarter.

    Which ones is decided by their keys alone, so every run chooses alike. New ones are `candidates` not held already.
    """
    known = {canary.key for canary in held}
    fresh = sorted((c for c in candidates if c.key not in known), key=lambda c: hashlib.sha256(c.key).digest())
    kept = sorted(held, key=lambda c: (-c.quarter, c.key))
    if kept and len(kept) >= size and kept[0].quarter < quarter:
        kept = kept[: max(size - round(size * share), size - len(fresh))]
    room = max(size - len(kept), 0)
    return [*kept[:size], *(Canary(c.key, c.embedding, quarter) for c in fresh[:room])]


def blocked(keys: Sequence[bytes], embeddings: Any, canaries: Iterable[Canary], *, similar: float) -> list[bool]:
    """Which rows must not be trained on: those whose prompt is a canary, or as similar to one as `similar` (cosine) or more.

    `embeddings`: shape [rows, dimensions], unit length.
    """
    import numpy as np

    held = list(canaries)
    if not held or not keys:
        return [False] * len(keys)
    names = {canary.key for canary in held}
    nearest = (np.asarray(embeddings) @ np.stack([canary.embedding for canary in held]).T).max(axis=1)
    return [key in names or bool(closest >= similar) for key, closest in zip(keys, nearest, strict=True)]
