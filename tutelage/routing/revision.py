"""Carry a set of domains on with new traffic: they move with it, one may split, two may merge, new ones appear; names stay.

Incremental: what is known of old requests is in the domains' centroids, so only the new ones are read. Pure: domains and requests in,
domains and what changed out. `domains` finds domains from nothing; this never looks at more than one tenant's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from tutelage.routing import domains
from tutelage.routing.domains import DiscoverySettings, Domain, DomainIndex

if TYPE_CHECKING:
    import numpy as np


DEFAULTS = DiscoverySettings()


@dataclass(frozen=True)
class Change:
    """One domain that is not what it was: `name` is the domain, `of` those it came from, empty for a new one."""

    kind: Literal["new", "split", "merged"]
    name: str
    of: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Revision:
    """The domains now, largest first, and how they differ from before; `novel` counts new requests that belong to none."""

    domains: tuple[Domain, ...]
    changes: tuple[Change, ...]
    novel: int


def revise(
    known: Sequence[Domain],
    embeddings: np.ndarray,
    texts: Sequence[str],
    *,
    seed: int,
    labels: Sequence[str | None] | None = None,
    keep: Collection[str] = (),
    settings: DiscoverySettings = DEFAULTS,
) -> Revision:
    """Read new requests, embeddings float32 [n, dimension] of length 1, their texts and labels where given, into known domains.

    Each request joins the domain its client named, or else the one it resembles; a new label founds a domain once `min_size` requests
    carry it, and counts as none before. A found domain whose new requests fall into groups less alike than one domain may be is split: the
    group nearest to what it was keeps the name. Two found domains that point the same way merge under the larger's name, or under that of
    the one in `keep`, never away from it: its students serve. A domain that clients named is neither split nor merged. Requests that fit
    nowhere may form domains of their own. Raises ValueError on unequal lengths.
    """
    labels = [None] * len(texts) if labels is None else labels
    if not len(embeddings) == len(texts) == len(labels):
        raise ValueError(f"{len(embeddings)} embeddings, {len(texts)} texts, {len(labels)} labels; pass as many of each")
    named = {label for label, count in Counter(labels).items() if label is not None and count >= settings.min_size}
    known = [replace(domain, given=True) if domain.name in named else domain for domain in known]
    taken = [domain.name for domain in known]
    placed = [
        label if label in named or label in taken else assignment.domain
        for label, assignment in zip(labels, DomainIndex(known).assign_all(embeddings), strict=True)
    ]
    loose = [row for row, domain in enumerate(placed) if domain is None]
    rows = {name: [row for row, domain in enumerate(placed) if domain == name] for name in [*taken, *sorted(named - {*taken})]}
    changes: list[Change] = []
    revised: list[Domain] = []
    for name in [name for name in rows if name not in taken]:
        taken.append(name)
        revised.append(replace(domains.describe(name, embeddings, rows[name], seed, settings), given=True))
        changes.append(Change("new", name, (), f"clients named {len(rows[name])} requests so"))
    for domain in known:
        groups = [rows[domain.name]] if domain.given else _groups(embeddings, rows[domain.name], seed, settings)
        nearest = max(range(len(groups)), key=lambda i: _likeness(domain, embeddings, groups[i]))
        revised.append(_moved(domain, embeddings, groups[nearest], seed, settings, alone=len(groups) > 1))
        for group in groups[:nearest] + groups[nearest + 1 :]:
            part = _born(embeddings, texts, group, taken, seed, settings)
            taken.append(part.name)
            revised.append(part)
            reason = f"{len(group)} new requests of {domain.name} are less alike to its others than {settings.min_similarity:.2f}"
            changes.append(Change("split", part.name, (domain.name,), reason))
    for group in _large(_groups(embeddings, loose, seed, settings), settings):
        found = _born(embeddings, texts, group, taken, seed, settings)
        taken.append(found.name)
        revised.append(found)
        changes.append(Change("new", found.name, (), f"{len(group)} requests that fitted nowhere resemble each other"))
    split = {name for change in changes for name in (change.name, *change.of)}
    merged, joined = _merged(revised, split, keep, settings)
    index = DomainIndex(merged)
    novel = sum(assignment.domain is None for assignment in index.assign_all(embeddings))
    return Revision(tuple(sorted(merged, key=lambda d: (-d.size, d.name))), (*changes, *joined), novel)


def _groups(embeddings: np.ndarray, rows: list[int], seed: int, settings: DiscoverySettings) -> list[list[int]]:
    """The rows by likeness; small groups stay with the largest, for a few odd requests split no domain."""
    found = domains.agglomerate(embeddings, domains.sample(rows, settings.max_rows, seed), settings.min_similarity)
    large = _large(found, settings)
    if len(large) < 2:
        return [rows] if rows and not large else large or [[]]
    return large


def _large(groups: Sequence[list[int]], settings: DiscoverySettings) -> list[list[int]]:
    return sorted((group for group in groups if len(group) >= settings.min_size), key=len, reverse=True)


def _likeness(domain: Domain, embeddings: np.ndarray, rows: list[int]) -> float:
    return float((embeddings[rows] @ domain.centroids.T).max(axis=1).mean()) if rows else 0.0


def _moved(domain: Domain, embeddings: np.ndarray, rows: list[int], seed: int, settings: DiscoverySettings, *, alone: bool) -> Domain:
    """The domain with new requests read in; after a split (`alone`) only these describe it."""
    import numpy as np

    if not rows:
        return domain
    fresh = domains.describe(domain.name, embeddings, rows, seed, settings)
    if alone:
        return replace(fresh, given=domain.given)
    if len(rows) < settings.min_size:  # too few to move it
        return replace(domain, size=domain.size + len(rows))
    # As many parts as ever describe old and new traffic together, each weighing as many requests as it stands for.
    centroids = np.concatenate([domain.centroids, fresh.centroids])
    weights = np.concatenate([np.full(len(d.centroids), d.size / len(d.centroids)) for d in (domain, fresh)])
    size = domain.size + len(rows)
    limit = max(min(size // settings.part_size, settings.max_parts), 1)
    return replace(domain, centroids=_condensed(centroids, weights, limit), size=size, threshold=min(domain.threshold, fresh.threshold))


def _condensed(centroids: np.ndarray, weights: np.ndarray, limit: int) -> np.ndarray:
    """Join the most similar two centroids, by weight, until `limit` are left."""
    import numpy as np

    left, heavy = [row.astype(float) for row in centroids], [float(weight) for weight in weights]
    while len(left) > limit:
        i, j = max(combinations(range(len(left)), 2), key=lambda pair: float(left[pair[0]] @ left[pair[1]]))
        left[i] = domains.unit(heavy[i] * left[i] + heavy[j] * left[j]).astype(float)
        heavy[i] += heavy[j]
        del left[j], heavy[j]
    return np.stack(left).astype(np.float32)


def _born(
    embeddings: np.ndarray, texts: Sequence[str], rows: list[int], taken: Sequence[str], seed: int, settings: DiscoverySettings
) -> Domain:
    """A domain of these rows, named by the words that set them apart from the other new requests."""
    inside = set(rows)
    others = [row for row in range(len(texts)) if row not in inside]
    read = [domains.sample(others, domains.NAME_ROWS, seed), domains.sample(rows, domains.NAME_ROWS, seed)]
    (name,) = domains.term_names(texts, read[1:], read if others else read[1:], reserved=taken)
    return domains.describe(name, embeddings, rows, seed, settings)


def _merged(
    found: Sequence[Domain], split: set[str], keep: Collection[str], settings: DiscoverySettings
) -> tuple[list[Domain], list[Change]]:
    """Join found domains that are one: mean direction alike, and their requests as alike as within one domain."""
    left, changes = list(found), list[Change]()
    while True:
        pairs = [
            (domains.likeness(one, other), one, other)
            for one, other in combinations(left, 2)
            if not (one.given or other.given or {one.name, other.name} <= split or {one.name, other.name} <= {*keep})
        ]
        close = [pair for pair in pairs if pair[0] >= domains.SAME_DOMAIN]
        if not close:
            return left, changes
        similarity, one, other = max(close, key=lambda pair: pair[0])
        first = (one.name in keep, one.size, other.name) >= (other.name in keep, other.size, one.name)
        host, guest = (one, other) if first else (other, one)
        left = [domain for domain in left if domain is not guest]
        left[left.index(host)] = _joined(host, guest, settings)
        changes.append(Change("merged", host.name, (host.name, guest.name), f"their directions have a cosine of {similarity:.2f}"))


def _joined(host: Domain, guest: Domain, settings: DiscoverySettings) -> Domain:
    import numpy as np

    weights = np.concatenate([np.full(len(d.centroids), d.size / len(d.centroids)) for d in (host, guest)])
    size = host.size + guest.size
    limit = max(min(size // settings.part_size, settings.max_parts), 1)
    centroids = _condensed(np.concatenate([host.centroids, guest.centroids]), weights, limit)
    return replace(host, centroids=centroids, size=size, threshold=min(host.threshold, guest.threshold))
