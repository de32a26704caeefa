"""Find the domains in traffic, recognise them in new requests, and keep their names from cycle to cycle.

A domain is a group of requests that resemble each other enough for one student to learn them. Works on sentence
embeddings of length 1, so every similarity here is a cosine. Knows nothing of the encoder, of students or of outcomes.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# A word names a domain only when it is in this share more of its requests than of others': one customer's name must never
# become a label.
MIN_TERM_SHARE = 0.1
NAME_TERMS = 2
NAME_ROWS = 500  # requests of a domain read for its name
# Cosine of mean directions; measured 0.96 and more between two samples of one task, 0.77 between the closest kinds of task.
SAME_DOMAIN = 0.8


@dataclass(frozen=True)
class DiscoverySettings:
    """What makes a group of requests a domain. Similarities are cosines of MiniLM embeddings.

    The defaults were measured: tasks with a template of their own have mean similarities of about 0.45 between their most
    different groups and 0.33 to the next task (0.35 at most); real headlines about one subject have 0.46 inside.
    """

    min_size: int = 30  # requests; fewer are no domain yet
    min_share: float = 0.01  # of the requests looked at; less is not worth a student
    min_similarity: float = 0.36  # mean similarity at which two groups still are one domain
    part_size: int = 50  # requests for each centroid of a domain
    max_parts: int = 16  # centroids of a domain
    novel_percentile: float = 1.0  # of its own requests' similarities; less than this minus the margin is novel
    novel_margin: float = 0.05
    directions: int | None = None  # of largest spread in which groups are compared, about the mean; None: embeddings as they are
    max_rows: int = 4000  # rows compared pairwise; more are sampled, because the cost is quadratic
    join_similarity: float | None = None  # down to this, groups too small for a domain join the one most similar; None: they are novel


@dataclass(frozen=True, eq=False)
class Domain:
    """A recognised kind of request.

    `centroids` is float32 [parts, dimension], rows of length 1. A request belongs here when its similarity to the
    nearest centroid is at least `threshold`. `size` counts the requests it was found in. `given` says that clients named
    it with a label, kept to the letter; a found domain's name has only lower-case letters, digits and dashes.
    """

    name: str
    centroids: np.ndarray
    size: int
    threshold: float
    given: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; centroids as base64 of little-endian float32."""
        return {
            "name": self.name,
            "size": self.size,
            "threshold": self.threshold,
            "given": self.given,
            "dimension": self.centroids.shape[1],
            "centroids": base64.b64encode(self.centroids.astype("<f4").tobytes()).decode("ascii"),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Domain:
        """The domain that `to_dict` described."""
        import numpy as np

        flat = np.frombuffer(base64.b64decode(fields["centroids"]), dtype="<f4").astype(np.float32)
        centroids = flat.reshape(-1, fields["dimension"])
        return cls(fields["name"], centroids, fields["size"], fields["threshold"], fields["given"])


@dataclass(frozen=True)
class Assignment:
    """Where a request belongs; `domain` is None when it resembles nothing known. `similarity` is to the nearest domain."""

    domain: str | None
    similarity: float
    reason: str


class DomainIndex:
    """Looks up the domain of an embedding among the centroids of all domains."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        import faiss
        import numpy as np

        self._domains = tuple(domains)
        self._owner = np.repeat(np.arange(len(domains)), [len(domain.centroids) for domain in domains])
        self._index = None
        if domains:
            self._index = faiss.IndexFlatIP(domains[0].centroids.shape[1])
            self._index.add(np.concatenate([domain.centroids for domain in domains]).astype(np.float32))

    def assign(self, embedding: np.ndarray) -> Assignment:
        """The domain of one embedding [dimension] of length 1."""
        return self.assign_all(embedding[None, :])[0]

    def assign_all(self, embeddings: np.ndarray) -> list[Assignment]:
        """The domain of each row of [n, dimension]."""
        if self._index is None:
            return [Assignment(None, 0.0, "no domain is known yet")] * len(embeddings)
        similarities, centroids = self._index.search(embeddings, 1)
        owners = self._owner[centroids[:, 0]]
        return [_judge(self._domains[owner], float(similarity)) for owner, similarity in zip(owners, similarities[:, 0], strict=True)]


def discover(
    embeddings: np.ndarray,
    texts: Sequence[str],
    *,
    labels: Sequence[str | None],
    seed: int,
    settings: DiscoverySettings = DiscoverySettings(),
) -> list[Domain]:
    """Find domains in requests: embeddings float32 [n, dimension] of length 1, their texts, and labels where given.

    Requests with the same label form one domain of that name. A request without one joins the labelled domain it
    resembles, or forms a domain with its like; one that resembles too few others belongs to none. A label on fewer than
    `min_size` requests counts as none: a slip of one client must not take a domain's name or its requests away.
    Largest domain first. The result depends only on the arguments. Raises ValueError on unequal lengths.
    """
    if not len(embeddings) == len(texts) == len(labels):
        raise ValueError(f"{len(embeddings)} embeddings, {len(texts)} texts, {len(labels)} labels; pass as many of each")
    labelled = _labelled_groups(embeddings, labels, seed, settings)
    taken = {row for rows in labelled.values() for row in rows}
    rest = [row for row in range(len(texts)) if row not in taken]
    found = _cluster(embeddings, rest, seed, settings)
    read = [sample(rows, NAME_ROWS, seed) for rows in [*labelled.values(), *found]]
    names = [*labelled, *term_names(texts, read[len(labelled) :], read, reserved=labelled)]
    described = [describe(name, embeddings, rows, seed, settings) for name, rows in zip(names, [*labelled.values(), *found], strict=True)]
    domains = [replace(domain, given=domain.name in labelled) for domain in described]
    return sorted(domains, key=lambda domain: (-domain.size, domain.name))


def match(old: Sequence[Domain], new: Sequence[Domain], *, keep: Collection[str] = ()) -> list[Domain]:
    """Give new domains the names of the old ones they continue, so that students stay with their domain.

    A domain that clients named keeps that name. Of the others, each old name goes to at most one, the most similar, and
    never to an unrelated one. Old domains named in `keep` stay when nothing continues them: their students still serve,
    even if this cycle's traffic was too thin.
    """
    given = {domain.name for domain in new if domain.given}
    free = [domain for domain in old if domain.name not in given]
    heirs = _heirs(free, [domain for domain in new if not domain.given])
    used = {*given, *(domain.name for domain in old)}
    renamed = []
    for domain in new:
        ancestor = heirs.get(domain.name)
        if ancestor:
            domain = replace(domain, name=ancestor.name, given=ancestor.given)
        elif not domain.given:
            domain = replace(domain, name=_unused(domain.name, used))
        used.add(domain.name)
        renamed.append(domain)
    present = {domain.name for domain in renamed}
    return [*renamed, *(domain for domain in free if domain.name in keep and domain.name not in present)]


def _heirs(old: Sequence[Domain], new: Sequence[Domain]) -> dict[str, Domain]:
    """The old domain that each new name continues: the one-to-one matching of largest similarity, only where it is high."""
    from scipy.optimize import linear_sum_assignment

    if not old or not new:
        return {}
    similarity = _directions(new) @ _directions(old).T
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return {new[j].name: old[i] for j, i in zip(rows, columns, strict=True) if similarity[j, i] >= SAME_DOMAIN}


def likeness(one: Domain, other: Domain) -> float:
    """Cosine of the mean directions of two domains."""
    first, second = _directions([one, other])
    return float(first @ second)


def _directions(domains: Sequence[Domain]) -> np.ndarray:
    import numpy as np

    return np.stack([unit(domain.centroids.mean(axis=0)) for domain in domains])


def _judge(domain: Domain, similarity: float) -> Assignment:
    if similarity >= domain.threshold:
        return Assignment(domain.name, similarity, f"similarity {similarity:.2f} to {domain.name}")
    reason = f"novel: nearest is {domain.name} with similarity {similarity:.2f}, below its {domain.threshold:.2f}"
    return Assignment(None, similarity, reason)


def _labelled_groups(embeddings: np.ndarray, labels: Sequence[str | None], seed: int, settings: DiscoverySettings) -> dict[str, list[int]]:
    """Rows by label; rows without a label join the label whose requests they resemble."""
    counts = Counter(label for label in labels if label is not None)
    groups: dict[str, list[int]] = {label: [] for label, count in counts.items() if count >= settings.min_size}
    for row, label in enumerate(labels):
        if label in groups:
            groups[label].append(row)
    index = DomainIndex([describe(label, embeddings, rows, seed, settings) for label, rows in groups.items()])
    loose = [row for row, label in enumerate(labels) if label not in groups]
    for row, assignment in zip(loose, index.assign_all(embeddings[loose]), strict=True):
        if assignment.domain is not None:
            groups[assignment.domain].append(row)
    return groups


def _cluster(embeddings: np.ndarray, rows: Sequence[int], seed: int, settings: DiscoverySettings) -> list[list[int]]:
    """Groups of rows that resemble each other, each large enough for a domain."""
    least = max(settings.min_size, round(settings.min_share * len(rows)))
    sampled = sample(rows, settings.max_rows, seed)
    enough = least * len(sampled) / len(rows) if rows else 0
    compared = embeddings if settings.directions is None else _spread(embeddings, sampled, settings.directions)
    grouped = agglomerate(compared, sampled, settings.min_similarity)
    if settings.join_similarity is not None:
        grouped = _join(compared, grouped, enough, settings.join_similarity)
    cores = [part for part in grouped if len(part) >= enough]
    index = DomainIndex([describe(str(i), embeddings, core, seed, settings) for i, core in enumerate(cores)])
    groups: dict[str, list[int]] = {}
    for row, assignment in zip(rows, index.assign_all(embeddings[list(rows)]), strict=True):
        if assignment.domain is not None:
            groups.setdefault(assignment.domain, []).append(row)
    return [group for group in groups.values() if len(group) >= least]


def _spread(embeddings: np.ndarray, rows: Sequence[int], directions: int) -> np.ndarray:
    """The embeddings about the mean of `rows`, in the directions those differ most in (principal components), at length 1.

    What all requests share, and what none of them vary in but by chance, says nothing about which of them belong together.
    """
    import numpy as np

    chosen = embeddings[list(rows)]
    mean = chosen.mean(axis=0) if rows else 0.0
    axes = np.linalg.svd(chosen - mean, full_matrices=False)[2][:directions]
    placed = (embeddings - mean) @ axes.T
    lengths = np.linalg.norm(placed, axis=1, keepdims=True)
    return np.asarray(placed / np.where(lengths > 0, lengths, 1.0), dtype=np.float32)


def agglomerate(embeddings: np.ndarray, rows: Sequence[int], similarity: float) -> list[list[int]]:
    """Merge the most similar groups while their mean similarity is at least `similarity`."""
    from sklearn.cluster import AgglomerativeClustering

    if len(rows) < 2:
        return [list(rows)] if rows else []
    chosen = embeddings[list(rows)]
    model = AgglomerativeClustering(n_clusters=None, metric="precomputed", linkage="average", distance_threshold=1.0 - similarity)
    labels = model.fit_predict(1.0 - chosen @ chosen.T)  # ten times faster than metric="cosine"
    groups: dict[int, list[int]] = {}
    for row, group in zip(rows, labels, strict=True):
        groups.setdefault(int(group), []).append(row)
    return list(groups.values())


def _join(embeddings: np.ndarray, groups: list[list[int]], enough: float, similarity: float) -> list[list[int]]:
    """Merge each group below `enough` rows into another, the most similar pair first, while their mean similarity allows it."""
    import numpy as np

    sums = np.stack([embeddings[group].sum(axis=0) for group in groups]) if groups else np.zeros((0, 1))
    products, sizes = (sums @ sums.T).astype(float), np.array([len(group) for group in groups], dtype=float)
    members = [list(group) for group in groups]
    np.fill_diagonal(products, -np.inf)
    while True:
        small = np.flatnonzero((sizes > 0) & (sizes < enough))
        if not len(small) or (sizes > 0).sum() < 2:
            return [group for group in members if group]
        means = products[small] / np.maximum(sizes[small][:, None] * sizes, 1.0)
        row, host = np.unravel_index(int(np.argmax(means)), means.shape)
        if means[row, host] < similarity:
            return [group for group in members if group]
        guest = small[row]
        members[host] += members[guest]
        members[guest] = []
        products[host] += products[guest]
        products[:, host] = products[host]
        sizes[host] += sizes[guest]
        sizes[guest] = 0.0
        products[guest], products[:, guest], products[host, host] = -np.inf, -np.inf, -np.inf


def describe(name: str, embeddings: np.ndarray, rows: Sequence[int], seed: int, settings: DiscoverySettings) -> Domain:
    """The centroids of a domain's parts, and the similarity below which a request is novel."""
    import numpy as np

    members = embeddings[list(rows)]
    centroids = parts(members, seed, settings)
    nearest = (members @ centroids.T).max(axis=1)
    threshold = float(np.percentile(nearest, settings.novel_percentile)) - settings.novel_margin
    return Domain(name, centroids, len(rows), threshold)


def parts(members: np.ndarray, seed: int, settings: DiscoverySettings) -> np.ndarray:
    """Centroids [parts, dimension] of length 1 by spherical k-means: a broad domain needs several."""
    import faiss
    import numpy as np

    count = min(len(members) // settings.part_size, settings.max_parts)
    if count < 2:
        return unit(members.mean(axis=0))[None, :]
    model = faiss.Kmeans(members.shape[1], count, niter=20, spherical=True, seed=seed, min_points_per_centroid=1)
    model.train(members)
    return np.asarray(model.centroids)


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector at length 1; a zero stays zero."""
    import numpy as np

    length = float(np.linalg.norm(vector))
    return (vector / length if length > 0 else vector).astype(np.float32)


def sample(rows: Sequence[int], most: int, seed: int) -> list[int]:
    """At most so many of the rows, in their order."""
    import numpy as np

    if len(rows) <= most:
        return list(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), most, replace=False)
    return [rows[i] for i in sorted(chosen)]


def term_names(
    texts: Sequence[str], groups: Sequence[Sequence[int]], rivals: Sequence[Sequence[int]], *, reserved: Iterable[str]
) -> list[str]:
    """A name for each group from the words that set it apart; `rivals` are all groups, these ones last."""
    used = set(reserved)
    names = []
    terms = _distinguishing_terms(texts, rivals)[len(rivals) - len(groups) :]
    for number, (group, words) in enumerate(zip(groups, terms, strict=True), 1):
        numeric = sum(any(c.isdigit() for c in texts[row]) for row in group) > len(group) / 2
        name = _unused("-".join(words) or ("numbers" if numeric else f"domain-{number}"), used)
        used.add(name)
        names.append(name)
    return names


def _distinguishing_terms(texts: Sequence[str], groups: Sequence[Sequence[int]]) -> list[list[str]]:
    """For each group the words that more of its requests contain than the other groups' do, or else its commonest words."""
    import numpy as np
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    stop_words = [*ENGLISH_STOP_WORDS, "does", "did"]
    letters = r"(?<![^\W\d_])[A-Za-z]{3,20}(?![^\W\d_])"
    counter = CountVectorizer(binary=True, stop_words=stop_words, strip_accents="unicode", token_pattern=letters, dtype=np.float32)
    try:
        counts = counter.fit_transform([texts[row] for group in groups for row in group])
    except ValueError:  # nothing but stop words and numbers
        return [[] for _ in groups]
    words = [str(word) for word in counter.get_feature_names_out()]
    ends = np.cumsum([0, *map(len, groups)])
    shares = np.stack([np.asarray(counts[a:b].mean(axis=0)).ravel() for a, b in pairwise(ends)])
    elsewhere = (shares.sum(axis=0) - shares) / max(len(groups) - 1, 1)
    return [_strongest(words, own - other) or _strongest(words, own) for own, other in zip(shares, elsewhere, strict=True)]


def _strongest(words: Sequence[str], strengths: np.ndarray) -> list[str]:
    """The best words of at least MIN_TERM_SHARE; of nearly equal ones the longer says more."""
    able = [i for i in range(len(words)) if strengths[i] >= MIN_TERM_SHARE]
    best = sorted(able, key=lambda i: (-round(float(strengths[i]), 1), -len(words[i]), words[i]))
    return [words[i] for i in best[:NAME_TERMS]]


def _unused(name: str, used: Collection[str]) -> str:
    """The name itself, or the first of name-2, name-3, … that is free."""
    candidate, number = name, 1
    while candidate in used:
        number += 1
        candidate = f"{name}-{number}"
    return candidate
