"""Which labelled domain a request belongs to, and whether it belongs to any: learned from embeddings and labels.

Linear discriminant analysis with one Gaussian a kind of request and a shared covariance; what is no likelier under any kind than under all
traffic together is novel (relative Mahalanobis distance, Ren et al., 2021). `domains` finds domains where nobody labels them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import InvalidRequest
from tutelage.routing.domains import DiscoverySettings, parts

if TYPE_CHECKING:
    import numpy as np

FOLDS = 5
SURE = 0.8  # probability from which a recognised domain counts as if its client had named it
MIN_ROWS = 100  # fewer tell nothing of a covariance of hundreds of dimensions


@dataclass(frozen=True)
class RecognitionSettings:
    """`shrinkage`: share of a sphere in the covariances. `rejected`: share of known traffic that may be called novel."""

    shrinkage: float = 0.1
    rejected: float = 0.05


@dataclass(frozen=True)
class Recognition:
    """The likeliest domain with its probability among the known; `score` tells how much likelier than all traffic."""

    domain: str
    probability: float
    score: float
    novel: bool
    reason: str


@dataclass(frozen=True, eq=False)
class Recogniser:
    """`kinds` float32 [kinds, dimension], whitened by `within` [dimension, dimension]; `owner` [kinds] numbers their domain.

    `centre` [dimension] and `whole` [dimension, dimension] describe all traffic together. Below `threshold` a request is novel.
    """

    domains: tuple[str, ...]
    owner: np.ndarray
    kinds: np.ndarray
    within: np.ndarray
    centre: np.ndarray
    whole: np.ndarray
    threshold: float

    def recognise(self, embedding: np.ndarray) -> Recognition:
        """The domain of one embedding [dimension] of length 1."""
        probabilities, scores = self.judge(embedding[None, :])
        best, score = int(probabilities[0].argmax()), float(scores[0])
        name, probability = self.domains[best], float(probabilities[0, best])
        if score < self.threshold:
            return Recognition(name, probability, score, True, f"novel: {score:.1f} is below {self.threshold:.1f}; nearest is {name}")
        return Recognition(name, probability, score, False, f"{name} with probability {probability:.2f}")

    def judge(self, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities [n, domains] and scores [n] of embeddings [n, dimension]."""
        import numpy as np

        seen = embeddings @ self.within
        distances = (seen**2).sum(axis=1)[:, None] - 2.0 * seen @ self.kinds.T + (self.kinds**2).sum(axis=1)
        nearest = distances.min(axis=1)
        likelihoods = np.exp(-0.5 * (distances - nearest[:, None]))
        by_domain = likelihoods @ np.eye(len(self.domains), dtype=np.float32)[self.owner]
        scores = (((embeddings - self.centre) @ self.whole) ** 2).sum(axis=1) - nearest
        return by_domain / by_domain.sum(axis=1, keepdims=True), scores

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        import json

        from safetensors.numpy import save_file

        arrays = {name: getattr(self, name) for name in ("owner", "kinds", "within", "centre", "whole")}
        save_file(arrays, path, metadata={"domains": json.dumps(self.domains), "threshold": repr(self.threshold)})

    @classmethod
    def load(cls, path: Path) -> Recogniser:
        """Read what `save` wrote. Raises InvalidRequest when the file is not one."""
        import json

        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(tuple(json.loads(header["domains"])), **arrays, threshold=float(header["threshold"]))
        except (SafetensorError, KeyError, TypeError) as broken:
            raise InvalidRequest(f"{path} holds no recogniser ({broken}); fit it again") from broken


def fit(
    embeddings: np.ndarray,
    domains: Sequence[str],
    *,
    kinds: Sequence[str] | None = None,
    seed: int,
    settings: RecognitionSettings = RecognitionSettings(),
) -> Recogniser:
    """Learn from labelled requests: embeddings float32 [n, dimension] of length 1, the domain of each and its kind where known.

    Without kinds (such as intents) each domain is cut into parts by k-means. The threshold is set on cross-fitted scores, so that the
    settings' share of known traffic is rejected. Raises ValueError on unequal lengths or too few rows.
    """
    import numpy as np

    if len(embeddings) != len(domains) or (kinds is not None and len(kinds) != len(domains)):
        raise ValueError(f"{len(embeddings)} embeddings, {len(domains)} domains, {len(kinds or domains)} kinds; pass as many of each")
    if len(domains) < MIN_ROWS:
        raise ValueError(f"{len(domains)} labelled requests are too few; pass at least {MIN_ROWS}")
    names = tuple(sorted(set(domains)))
    numbers = np.array([names.index(domain) for domain in domains])
    if kinds is None:
        kind_of = _cut(embeddings, numbers, seed)
    else:
        kind_of = np.unique([f"{number} {kind}" for number, kind in zip(numbers, kinds, strict=True)], return_inverse=True)[1]
    folds = np.random.default_rng(seed).permutation(len(domains)) % FOLDS
    scores = np.zeros(len(domains))
    for fold in range(FOLDS):
        rest = folds != fold
        scores[~rest] = _learn(embeddings[rest], numbers[rest], kind_of[rest], names, settings).judge(embeddings[~rest])[1]
    threshold = float(np.quantile(scores, settings.rejected))
    return replace(_learn(embeddings, numbers, kind_of, names, settings), threshold=threshold)


def complete(embeddings: np.ndarray, labels: Sequence[str | None], *, least: int, seed: int) -> list[str | None]:
    """The labels, and those that are recognised where none was given: from embeddings float32 [n, dimension] of length 1.

    Only labels of at least `least` requests teach, and only if there are two of them and MIN_ROWS requests in all; what is novel, or less
    probable than SURE, stays without one. Raises ValueError on unequal lengths.
    """
    if len(embeddings) != len(labels):
        raise ValueError(f"{len(embeddings)} embeddings for {len(labels)} labels; pass one label, or None, for each")
    counts = Counter(label for label in labels if label is not None)
    taught = [row for row, label in enumerate(labels) if label is not None and counts[label] >= least]
    asked = [row for row, label in enumerate(labels) if label is None]
    named = [str(labels[row]) for row in taught]
    if len(taught) < MIN_ROWS or len(set(named)) < 2 or not asked:
        return list(labels)
    known = fit(embeddings[taught], named, seed=seed)
    probabilities, scores = known.judge(embeddings[asked])
    found = list(labels)
    for row, shares, score in zip(asked, probabilities, scores, strict=True):
        if score >= known.threshold and shares.max() >= SURE:
            found[row] = known.domains[int(shares.argmax())]
    return found


def _learn(
    embeddings: np.ndarray, numbers: np.ndarray, kind_of: np.ndarray, names: tuple[str, ...], settings: RecognitionSettings
) -> Recogniser:
    import numpy as np

    present, kind = np.unique(kind_of, return_inverse=True)
    means = np.zeros((len(present), embeddings.shape[1]))
    np.add.at(means, kind, embeddings)
    means /= np.bincount(kind)[:, None]
    owner = np.zeros(len(present), dtype=np.int64)
    owner[kind] = numbers
    within = _whitening(embeddings - means[kind], settings.shrinkage)
    centre = embeddings.mean(axis=0)
    whole = _whitening(embeddings - centre, settings.shrinkage)
    return Recogniser(names, owner, (means @ within).astype(np.float32), within, centre.astype(np.float32), whole, 0.0)


def _whitening(residuals: np.ndarray, shrinkage: float) -> np.ndarray:
    """The factor W with W W' = inverse covariance, shrunk towards a sphere (Friedman, 1989)."""
    import numpy as np

    covariance = residuals.T.astype(float) @ residuals / len(residuals)
    size = len(covariance)
    mixed = (1.0 - shrinkage) * covariance + max(shrinkage * float(np.trace(covariance)) / size, 1e-9) * np.eye(size)
    factor: np.ndarray = np.linalg.cholesky(np.linalg.inv(mixed))
    return factor.astype(np.float32)


def _cut(embeddings: np.ndarray, numbers: np.ndarray, seed: int) -> np.ndarray:
    """A kind for each row: the nearest part of its own domain."""
    import numpy as np

    kinds = np.zeros(len(numbers), dtype=np.int64)
    first = 0
    for number in np.unique(numbers):
        rows = np.flatnonzero(numbers == number)
        centroids = parts(embeddings[rows], seed, DiscoverySettings())
        kinds[rows] = first + (embeddings[rows] @ centroids.T).argmax(axis=1)
        first += len(centroids)
    return kinds
