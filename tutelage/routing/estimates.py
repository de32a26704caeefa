"""How probable it is that a model answers a prompt acceptably, estimated from the prompt alone, before the call.

An estimate says how many outcomes stand behind it and is `unknown` until there are enough. This module knows nothing of
prices, thresholds or strategies, nor of where outcomes come from; `confidence` judges an answer after the call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tutelage.errors import InvalidRequest
from tutelage.routing import confidence, features, forest
from tutelage.routing.confidence import Calibrator, Kind
from tutelage.routing.forest import Forest, ForestSettings

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix

FORMAT = 2
# A prompt says far less than an answer does: with some thousand outcomes the steps of an isotonic curve are still noise (GSM8K, MMLU).
ISOTONIC_LABELS = 10_000
BLOCKS = ("embedding", "words", "letters", "surface", "domain", "near")
LENS = ("words", "letters", "centre", "scale", "directions", "phases", "near", "axes")
NEAR_AXES = 12  # of `axes`, that a domain's direction is told by


@dataclass(frozen=True)
class Estimate:
    """The probability that one model answers one prompt acceptably; 0.0 when `kind` is "unknown".

    `n` counts the outcomes of that model behind it. `assured`: the mean worth that its answers to prompts with at least this probability
    surely have (`promises.assure`).
    """

    probability: float
    n: int
    kind: Kind
    reason: str
    assured: float = 0.0


class Estimator(Protocol):
    """What strategies may ask before a call. Safe to share between threads."""

    @property
    def models(self) -> tuple[str, ...]:
        """The models it has outcomes of."""

    def probability(self, model: str, embedding: np.ndarray, prompt: str, domain: str | None) -> Estimate:
        """For one model; a model it has no outcomes of is "unknown". `embedding` is float32 [dimension] of length 1."""

    def probabilities(self, embedding: np.ndarray, prompt: str, domain: str | None) -> dict[str, Estimate]:
        """For every model of `models`, at the cost of one."""


@dataclass(frozen=True)
class EstimateSettings:
    """How estimates are learned. The defaults were chosen by cross-validation on the fit halves of two public routing sets."""

    max_rows: int = 6000  # outcomes of a model learned from; more are sampled, because the cost is cubic
    waves: int = 512  # random Fourier features of the surface
    noises: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0, 80.0)  # variance of an outcome in units of a block's; chosen by leave-one-out
    noise_rows: int = 1000  # outcomes the noise is chosen on
    axes: int = 30  # main directions of the embeddings that trees see
    trees: ForestSettings = field(default_factory=ForestSettings)


@dataclass(frozen=True, eq=False)
class Lens:
    """How a prompt becomes six blocks of numbers: what was learned from the prompts themselves, without outcomes.

    Surface features are standardised by `centre` and `scale` [features] and become cosines of random `directions`
    [features, waves] and `phases` [waves], whose products approximate a Gaussian kernel (Rahimi and Recht, 2007). `near`
    [domains + 1, dimension] is the mean direction of each domain's prompts, by which like domains lend each other strength; the last row
    is that of all prompts, for a domain never seen. `axes` [dimension, axes] are the main directions of the embeddings.
    """

    words: np.ndarray
    letters: np.ndarray
    centre: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    phases: np.ndarray
    near: np.ndarray
    axes: np.ndarray
    domains: tuple[str, ...]

    def shape(self, surface: np.ndarray, embeddings: np.ndarray, near: np.ndarray) -> np.ndarray:
        """What trees see of prompts: surface [n, features], embeddings and their domain's direction [n, dimension]; float32, or one row
        of each."""
        import numpy as np

        middle = self.near[-1]
        seen = [surface, (embeddings - middle) @ self.axes, (near - middle) @ self.axes[:, :NEAR_AXES]]
        return np.concatenate(seen, axis=-1).astype(np.float32)

    def waves(self, surface: np.ndarray) -> np.ndarray:
        """[n, features] or [features] to [n, waves] or [waves]."""
        import numpy as np

        standard = np.clip((surface - self.centre) / self.scale, -4.0, 4.0)  # a freak must not be far from everything
        cosines: np.ndarray = np.cos(standard @ self.directions + self.phases) * np.sqrt(2.0 / len(self.phases))
        return cosines.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Weights:
    """What a model's outcomes taught: the log-odds scale is the calibrator's, these give a raw score by one product a block.

    `blocks`: float32 [width, models] by block; `offset`: float32 [models]. `forests`: trees for the models at these places, whose
    guess counts as much as the blocks' sum.
    """

    blocks: dict[str, np.ndarray]
    offset: np.ndarray
    forests: list[tuple[list[int], Forest]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class QualityModel:
    """Estimates for several models from one look at the prompt."""

    lens: Lens
    weights: Weights
    calibrators: dict[str, Calibrator] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self.calibrators)

    def probability(self, model: str, embedding: np.ndarray, prompt: str, domain: str | None) -> Estimate:
        if model not in self.calibrators:
            return Estimate(0.0, 0, "unknown", f"no outcome of {model} is known")
        return self.probabilities(embedding, prompt, domain)[model]

    def probabilities(self, embedding: np.ndarray, prompt: str, domain: str | None) -> dict[str, Estimate]:
        raw = self.scores(embedding, prompt, domain)
        return {
            model: _estimate(model, calibrator, float(score))
            for (model, calibrator), score in zip(self.calibrators.items(), raw, strict=True)
        }

    def scores(self, embedding: np.ndarray, prompt: str, domain: str | None) -> np.ndarray:
        """The uncalibrated scores [models] of one prompt."""
        import numpy as np

        lens, blocks = self.lens, self.weights.blocks
        words = features.weigh(features.word_buckets(prompt), lens.words)
        letters = features.weigh(features.letter_buckets(prompt), lens.letters)
        surface = np.asarray(features.surface(prompt), dtype=np.float32)
        waves = lens.waves(surface)
        total = self.weights.offset + embedding @ blocks["embedding"] + waves @ blocks["surface"]
        total = total + words.weights @ blocks["words"][words.buckets] + letters.weights @ blocks["letters"][letters.buckets]
        number = lens.domains.index(domain) if domain in lens.domains else -1
        if number >= 0:
            total = total + blocks["domain"][number]
        total = np.asarray(total + lens.near[number] @ blocks["near"])
        row = lens.shape(surface, embedding, lens.near[number])
        for columns, trees in self.weights.forests:
            total[columns] = (total[columns] + trees.predict(row)) / 2
        return total

    def save(self, path: Path) -> None:
        """Write one safetensors file; what is not a number is JSON in its header."""
        from safetensors.numpy import save_file

        lens = self.lens
        tensors = {f"lens.{name}": getattr(lens, name) for name in LENS} | {"offset": self.weights.offset}
        tensors |= {f"block.{name}": array for name, array in self.weights.blocks.items()}
        for place, (_, trees) in enumerate(self.weights.forests):
            tensors |= {f"forest.{place}.{name}": getattr(trees, name) for name in forest.ARRAYS}
        header = {
            "format": FORMAT,
            "forests": [columns for columns, _ in self.weights.forests],
            "domains": lens.domains,
            "calibrators": {model: calibrator.to_dict() for model, calibrator in self.calibrators.items()},
        }
        save_file(tensors, path, metadata={"tutelage": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> QualityModel:
        """Read what `save` wrote. Raises InvalidRequest when the file is not one of this format."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("tutelage", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        except SafetensorError as broken:
            raise InvalidRequest(f"{path} holds no estimates ({broken}); fit them again") from broken
        if header.get("format") != FORMAT:
            raise InvalidRequest(f"{path} holds no estimates of format {FORMAT}; fit them again")
        lens = {name.removeprefix("lens."): tensors[name] for name in tensors if name.startswith("lens.")}
        blocks = {name: tensors[f"block.{name}"] for name in BLOCKS}
        forests = [
            (columns, Forest(**{name: tensors[f"forest.{place}.{name}"] for name in forest.ARRAYS}))
            for place, columns in enumerate(header["forests"])
        ]
        calibrators = {model: Calibrator.from_dict(fields) for model, fields in header["calibrators"].items()}
        return cls(Lens(**lens, domains=tuple(header["domains"])), Weights(blocks, tensors["offset"], forests), calibrators)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model, and what it would have said of each row it learned from had that row been left out: [n, models], NaN where no outcome."""

    model: QualityModel
    held_out: np.ndarray


def fit(
    prompts: Sequence[str],
    embeddings: np.ndarray,
    domains: Sequence[str | None],
    outcomes: Mapping[str, Sequence[float | None]],
    *,
    seed: int,
    settings: EstimateSettings = EstimateSettings(),
) -> Fitted:
    """Learn from outcomes in 0..1 by model, None where a model was not judged on a prompt; embeddings float32 [n, dimension].

    Ridge regression over six blocks of features, each of mean length 1 over the prompts: a Gaussian process with one linear
    kernel a block (Rasmussen and Williams, 2006, 2.7; leave-one-out 5.4.2). The domain block is the domain's own prior,
    shrunk towards like domains (`near`) and all. Beside it stand trees (`forest`), and the score is the mean of both. Leave-one-out
    scores, and those of trees that did not see the row, fit the calibrator of each model. Raises ValueError on unequal lengths.
    """
    import numpy as np

    lengths = {len(prompts), len(embeddings), len(domains), *map(len, outcomes.values())}
    if len(lengths) != 1 or not outcomes:
        raise ValueError(f"prompts, embeddings, domains and outcomes of each model must be as many; got lengths {sorted(lengths)}")
    lens, blocks, shapes = _look(prompts, embeddings, domains, seed, settings)
    judged = np.array([[np.nan if score is None else float(score) for score in column] for column in outcomes.values()]).T
    widths = {name: block.shape[1] for name, block in blocks.items()}
    weights = Weights(
        {name: np.zeros((width, len(outcomes)), np.float32) for name, width in widths.items()}, np.zeros(len(outcomes), np.float32)
    )
    held_out = np.full(judged.shape, np.nan)
    for columns in _alike(~np.isnan(judged)):
        rows = np.flatnonzero(~np.isnan(judged[:, columns[0]]))
        if len(rows) >= confidence.MIN_LABELS:
            rows = _chosen(rows, settings.max_rows, seed)
            cells = np.ix_(rows, np.asarray(columns))
            seen = {name: block[rows] for name, block in blocks.items()}
            smooth = _learn(weights, seen, judged[cells], columns, settings)
            trees, unseen = forest.grow(shapes[rows], judged[cells], seed=seed, settings=settings.trees)
            weights.forests.append((columns, trees))
            held_out[cells] = (smooth + unseen) / 2
    calibrators = {model: _calibrate(held_out[:, i], judged[:, i]) for i, model in enumerate(outcomes)}
    for i, calibrator in enumerate(calibrators.values()):
        known = ~np.isnan(held_out[:, i])
        held_out[known, i] = [calibrator.probability(score) for score in held_out[known, i]]
    return Fitted(QualityModel(lens, weights, calibrators), held_out)


def _estimate(model: str, calibrator: Calibrator, score: float) -> Estimate:
    n = calibrator.n
    if calibrator.kind == "unknown":
        return Estimate(0.0, n, "unknown", f"only {n} outcomes of {model} are known; {confidence.MIN_LABELS} are needed")
    probability = calibrator.probability(score)
    reason = f"{model} is acceptable with probability {probability:.2f}, from {n} outcomes"
    return Estimate(probability, n, calibrator.kind, reason, calibrator.assured(score))


def _look(
    prompts: Sequence[str], embeddings: np.ndarray, domains: Sequence[str | None], seed: int, settings: EstimateSettings
) -> tuple[Lens, dict[str, Any], np.ndarray]:
    """The lens these prompts teach, their blocks [n, width] seen through it, dense or sparse, and what trees see of them."""
    import numpy as np

    words, letters = [features.word_buckets(prompt) for prompt in prompts], [features.letter_buckets(prompt) for prompt in prompts]
    word_idf, letter_idf = features.rarity(words), features.rarity(letters)
    surfaces = np.array([features.surface(prompt) for prompt in prompts], dtype=np.float32)
    scale = surfaces.std(axis=0)
    used = max(int((scale > 0).sum()), 1)
    random = np.random.default_rng(seed)
    known = tuple(sorted({domain for domain in domains if domain is not None}))
    lens = Lens(
        word_idf,
        letter_idf,
        surfaces.mean(axis=0),
        np.where(scale > 0, scale, 1.0).astype(np.float32),
        (random.normal(size=(surfaces.shape[1], settings.waves)) / np.sqrt(used)).astype(np.float32),
        random.uniform(0, 2 * np.pi, settings.waves).astype(np.float32),
        _near(embeddings, domains, known),
        _axes(embeddings, settings.axes),
        known,
    )
    near = lens.near[[known.index(domain) if domain is not None else -1 for domain in domains]]
    return (
        lens,
        {
            "embedding": np.asarray(embeddings, dtype=np.float32),
            "words": features.matrix([features.weigh(row, word_idf) for row in words]),
            "letters": features.matrix([features.weigh(row, letter_idf) for row in letters]),
            "surface": lens.waves(surfaces),
            "domain": _one_hot(domains, known),
            "near": near,
        },
        lens.shape(surfaces, embeddings, near),
    )


def _axes(embeddings: np.ndarray, count: int) -> np.ndarray:
    """The main directions of the embeddings around their mean: float32 [dimension, count]."""
    import numpy as np

    centred = embeddings - embeddings.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T.astype(float) @ centred)
    return np.ascontiguousarray(vectors[:, np.argsort(-values)[:count]], dtype=np.float32)


def _near(embeddings: np.ndarray, domains: Sequence[str | None], known: Sequence[str]) -> np.ndarray:
    """The mean direction of each domain's prompts and, last, of all prompts: float32 [domains + 1, dimension], rows of length 1."""
    import numpy as np

    labels = np.array([domain or "" for domain in domains])
    means = np.stack([*(embeddings[labels == domain].mean(axis=0) for domain in known), embeddings.mean(axis=0)])
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9), dtype=np.float32)


def _one_hot(domains: Sequence[str | None], known: Sequence[str]) -> csr_matrix:
    import numpy as np
    from scipy.sparse import csr_matrix

    number = {domain: i for i, domain in enumerate(known)}
    places = [(row, number[domain]) for row, domain in enumerate(domains) if domain is not None]
    rows, columns = zip(*places, strict=True) if places else ((), ())
    return csr_matrix((np.ones(len(places), np.float32), (rows, columns)), shape=(len(domains), max(len(known), 1)))


def _alike(known: np.ndarray) -> list[list[int]]:
    """Columns of [n, models] that are judged on the same rows: they share one decomposition."""
    groups: dict[bytes, list[int]] = {}
    for column in range(known.shape[1]):
        groups.setdefault(known[:, column].tobytes(), []).append(column)
    return list(groups.values())


def _chosen(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    import numpy as np

    return rows if len(rows) <= most else np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def _learn(weights: Weights, blocks: Mapping[str, Any], judged: np.ndarray, columns: list[int], settings: EstimateSettings) -> np.ndarray:
    """Set the weights of these models and return their leave-one-out scores [n, columns]."""
    import numpy as np
    from scipy.linalg import cho_factor, cho_solve

    kernel, shares = _kernel(blocks)
    level = kernel.mean(axis=0)
    kernel += kernel.mean() - level[:, None] - level[None, :]
    noise = _quietest(kernel, judged, settings)
    mean = judged.mean(axis=0)
    factor = cho_factor(kernel + noise * np.eye(len(kernel), dtype=np.float32), lower=True, check_finite=False)
    inverse = cho_solve(factor, np.eye(len(kernel), dtype=np.float32), check_finite=False)
    duals = inverse @ (judged - mean)
    left_out = judged - duals / np.diag(inverse)[:, None]
    duals -= duals.mean(axis=0)
    for name, share in shares.items():
        weights.blocks[name][:, columns] = share * (blocks[name].T @ duals)
    weights.offset[columns] = mean - level @ duals
    return np.asarray(left_out)


def _kernel(blocks: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, float]]:
    """The sum of the blocks' products, each scaled to a mean variance of 1 / blocks; the scales used."""
    import numpy as np

    n = next(iter(blocks.values())).shape[0]
    kernel, shares = np.zeros((n, n), dtype=np.float32), {}
    for name, block in blocks.items():
        product = block @ block.T
        product = product if isinstance(product, np.ndarray) else product.toarray()
        variance = float(np.trace(product)) / n - float(product.mean())
        if variance > 1e-6:  # a block that is the same everywhere, such as one domain only, says nothing
            shares[name] = 1.0 / (variance * len(BLOCKS))
            kernel += np.float32(shares[name]) * product
    return kernel, shares


def _quietest(kernel: np.ndarray, judged: np.ndarray, settings: EstimateSettings) -> float:
    """The noise of least squared leave-one-out error, on the first rows where there are many."""
    import numpy as np

    n = min(len(kernel), settings.noise_rows)
    step = len(kernel) // n
    part = np.arange(0, len(kernel), step)[:n]
    values, vectors = np.linalg.eigh(kernel[np.ix_(part, part)])
    centred = judged[part] - judged[part].mean(axis=0)
    rotated, squares = vectors.T @ centred, vectors**2
    errors = []
    for noise in settings.noises:
        shrink = 1.0 / (np.maximum(values, 0.0) + noise)
        errors.append(float((((vectors * shrink) @ rotated / (squares @ shrink)[:, None]) ** 2).mean()))
    return settings.noises[int(np.argmin(errors))]


def _calibrate(scores: np.ndarray, judged: np.ndarray) -> Calibrator:
    import numpy as np

    known = ~np.isnan(scores)
    if known.any():
        return confidence.fit(scores[known].tolist(), judged[known].tolist(), isotonic_labels=ISOTONIC_LABELS)
    return Calibrator("unknown", int((~np.isnan(judged)).sum()))
