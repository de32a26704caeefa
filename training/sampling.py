"""Which rows to keep when there are more than wanted: every domain and every difficulty alike, and nobody more than their share.

Pure functions of counts and keys; which rows come first is the caller's order. It refuses to know where a difficulty comes from.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
BINS = 5


def balanced(domains: Sequence[str], difficulty: Sequence[float | None], most: int) -> list[int]:
    """At most `most` rows (their numbers, ascending): domains share evenly, and within a domain easy and hard rows do.

    `difficulty` is any number that grows with it; rows are binned by its rank within their domain, those without one are a bin of their
    own. A domain or a bin that has less than its share leaves the rest to the others.
    """
    if len(domains) <= most:
        return list(range(len(domains)))
    by_domain: dict[str, list[int]] = defaultdict(list)
    for row, domain in enumerate(domains):
        by_domain[domain].append(row)
    shares = divide(most, {domain: len(rows) for domain, rows in by_domain.items()})
    kept: list[int] = []
    for domain, rows in by_domain.items():
        bins = _bins(rows, difficulty)
        of_bin = divide(shares[domain], {name: len(bin_) for name, bin_ in bins.items()})
        kept += [row for name, bin_ in bins.items() for row in bin_[: of_bin[name]]]
    return sorted(kept)


def divide(total: int, sizes: Mapping[Name, int]) -> dict[Name, int]:
    """`total` split evenly between groups, none over its size; what small groups leave goes to the others."""
    shares: dict[Name, int] = {}
    left = total
    waiting = sorted(sizes, key=lambda name: (sizes[name], str(name)))
    for at, name in enumerate(waiting):
        shares[name] = min(sizes[name], left // (len(waiting) - at))
        left -= shares[name]
    return shares


def within_share(groups: Sequence[str], capped: Sequence[str], share: float) -> list[int]:
    """The rows (their numbers) left when each group in `capped` may make up at most `share` of what is left; a group that is alone stays.

    For one capped group of n among m others that is n <= share * (n + m): the last rows of a group that is too large go first.
    """
    sizes = Counter(groups)
    allowed = dict(sizes)
    for _ in range(len(set(capped)) + 1):  # a group cut smaller makes the whole smaller, so look again
        whole = sum(allowed.values())
        for name in sorted(set(capped)):
            others = whole - allowed.get(name, 0)
            if others and allowed.get(name, 0) > share * whole:
                allowed[name] = int(share * others / (1 - share)) if share < 1 else allowed[name]
                whole = others + allowed[name]
    taken: Counter[str] = Counter()
    kept = []
    for row, name in enumerate(groups):
        if taken[name] < allowed[name]:
            taken[name] += 1
            kept.append(row)
    return kept


def _bins(rows: Sequence[int], difficulty: Sequence[float | None]) -> dict[Hashable, list[int]]:
    known = sorted((row for row in rows if difficulty[row] is not None), key=lambda row: (difficulty[row], row))
    bins: dict[Hashable, list[int]] = {}
    for rank, row in enumerate(known):
        bins.setdefault(rank * BINS // len(known), []).append(row)
    unknown = [row for row in rows if difficulty[row] is None]
    if unknown:
        bins["unknown"] = unknown
    return {name: sorted(bin_) for name, bin_ in bins.items()}
