"""How likely two questions want the same answer: traits of a pair, and a classifier of them that learns from labelled pairs.

Without any label it is a logistic curve over cosine and guards with weights set by hand; from LEAST_LABELS on trees learn the rest. It
refuses to know where labels come from and from which probability on an answer may be given.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tutelage.routing.equivalence import COMMON, KINDS, Comparison, Difference, Question, compare, stem

if TYPE_CHECKING:
    import numpy as np

LEAST_LABELS = 300  # below, trees learn chance
LEAST_OF_A_KIND = 30
LEAST_PLAIN = 0.5  # by the hand-set weights: below it no tenant's pairs were ever labelled, and trees there would guess
KIND_NAMES = (*(name for name, _ in KINDS), "other")
SURE = 1e-3  # no probability of a forest is nearer to 0 or 1 than this


class Trait(NamedTuple):
    """One thing that tells same from different, and its weight in log-odds before anything was learned: looked at on Quora pairs, then
    rounded."""

    name: str
    weight: float = 0.0


# Shared words have no weight: they speak against a pair that was picked for being near, and for one out of a full store.
TRAITS = (
    Trait("cosine", 10.0), Trait("negation", -0.3), Trait("opposite", -1.0), Trait("numbers changed", -1.0), Trait("number left out"),
    Trait("units changed", -0.5), Trait("unit left out"), Trait("direction", -1.0), Trait("names changed", -0.9),
    Trait("name left out", -0.2), Trait("kinds apart", -1.2), Trait("trigrams"), Trait("tetragrams"), Trait("words"),
    Trait("word pairs"), Trait("content"), Trait("contained"), Trait("fewer alone"), Trait("more alone"), Trait("fewer content"),
    Trait("more content"), Trait("words more"), Trait("words in all"), Trait("order"), Trait("same first word"), Trait("same last word"),
    Trait("remainder cosine"), Trait("nothing remains"), Trait("one side remains"), Trait("least covered"), Trait("most covered"),
    Trait("least aligned"), Trait("most aligned"), Trait("least aligned word"), Trait("most aligned word"), Trait("fewer remain"),
    Trait("more remain"), Trait("less rare"), Trait("more rare"), Trait("less rarity"), Trait("more rarity"), Trait("rarest shared"),
    Trait("rarity shared"), Trait("share of rarity"), *(Trait(f"kind {name}") for name in KIND_NAMES),
)  # fmt: skip
BIAS = -7.5


class Reader(Protocol):
    """What reads words: the sentence encoder (`encoder.py`)."""

    def encode(self, texts: list[str]) -> np.ndarray: ...

    def rarity(self, word: str) -> float: ...


class Classifier(Protocol):
    """Probabilities [n] that pairs with these traits [n, len(TRAITS)] want the same answer."""

    def probability(self, traits: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Verdict:
    """`same`: no guard speaks against it and it is at least as probable as asked for. The traits are what can be learned from."""

    probability: float
    same: bool
    reason: str
    difference: Difference | None
    traits: tuple[float, ...]


def verify(
    asked: Question, known: Sequence[tuple[Question, float]], classifier: Classifier, *, reader: Reader, least: float
) -> list[Verdict]:
    """For each known question with its cosine to the asked one: whether its answer may be given. `least`: probability from which on."""
    import numpy as np

    if not known:
        return []
    comparisons = [compare(asked, question) for question, _ in known]
    rows = traits([(asked, question, cosine, found) for (question, cosine), found in zip(known, comparisons, strict=True)], reader=reader)
    plain, learned = Unfitted().probability(rows), classifier.probability(rows)
    stated = np.where(plain < LEAST_PLAIN, np.minimum(plain, learned), learned)
    return [
        _verdict(float(probability), found.difference, least, tuple(map(float, row)))
        for probability, found, row in zip(stated, comparisons, rows, strict=True)
    ]


def exclusive(probabilities: Sequence[float], answers: Sequence[Hashable]) -> list[float]:
    """The same probabilities, knowing that questions with different answers are not all the one asked: the odds of each against its
    rivals and against none being right. Those with one answer are no rivals."""
    odds = [probability / max(1 - probability, SURE) for probability in probabilities]
    best: dict[Hashable, float] = {}
    for answer, one in zip(answers, odds, strict=True):
        best[answer] = max(one, best.get(answer, 0.0))
    return [one / (1 + one + sum(best.values()) - best[answer]) for answer, one in zip(answers, odds, strict=True)]


def _verdict(probability: float, difference: Difference | None, least: float, row: tuple[float, ...]) -> Verdict:
    if difference is not None:
        return Verdict(probability, False, f"{difference.guard}: {difference.reason}", difference, row)
    told = f"the same question with probability {probability:.3f}, {least:.3f} is asked for"
    return Verdict(probability, probability >= least, told, None, row)


def traits(pairs: Sequence[tuple[Question, Question, float, Comparison]], *, reader: Reader) -> np.ndarray:
    """float64 [n, len(TRAITS)], the same whichever question of a pair comes first. What one question has and the other has not is
    encoded by itself, as a whole and word by word."""
    import numpy as np

    remains = [(_remaining(a, b), _remaining(b, a)) for a, b, _, _ in pairs]
    texts = {" ".join(words) for both in remains for words in both} | {q.text for a, b, _, _ in pairs for q in (a, b)}
    texts |= {word for both in remains for words in both for word in words if word not in COMMON}
    ordered = sorted(texts)
    vectors = dict(zip(ordered, reader.encode(ordered), strict=True))
    rows = [
        [*_compared(cosine, found), *_overlap(a, b), *_alignment(a, b, remaining, vectors), *_rarities(a, remaining, reader), *_kinds(a, b)]
        for (a, b, cosine, found), remaining in zip(pairs, remains, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(TRAITS))


def _compared(cosine: float, found: Comparison) -> list[float]:
    flags = (
        found.negation, found.opposite is not None, found.numbers == 2, found.numbers == 1, found.units == 2, found.units == 1,
        found.direction, found.names == 2, found.names == 1, found.kind,
    )  # fmt: skip
    return [cosine, *map(float, flags)]


def _overlap(a: Question, b: Question) -> list[float]:
    """What the two share of letters, words and their order."""
    alone = sorted((len(a.content - b.content), len(b.content - a.content)))
    content = sorted((len(a.content), len(b.content)))
    shared = len(a.content & b.content)
    first, second = sorted((a.words, b.words))
    return [
        _dice(_grams(a, 3), _grams(b, 3)), _dice(_grams(a, 4), _grams(b, 4)), _dice(a.words, b.words),
        _dice([*zip(a.words, a.words[1:], strict=False)], [*zip(b.words, b.words[1:], strict=False)]),
        shared / max(1, len(a.content | b.content)), shared / max(1, content[0]), *alone, *content,
        abs(len(a.words) - len(b.words)), len(a.words) + len(b.words), difflib.SequenceMatcher(None, first, second, autojunk=False).ratio(),
        float(a.words[:1] == b.words[:1]), float(a.words[-1:] == b.words[-1:]),
    ]  # fmt: skip


def _alignment(a: Question, b: Question, remaining: tuple[list[str], list[str]], vectors: dict[str, np.ndarray]) -> list[float]:
    """How well what is only in one question is said by what is only in the other."""
    rest_a, rest_b = remaining
    text_a, text_b = " ".join(rest_a), " ".join(rest_b)
    between = float(vectors[text_a] @ vectors[text_b]) if rest_a and rest_b else 1.0 if not rest_a and not rest_b else 0.3
    covered = (float(vectors[a.text] @ vectors[text_b]) if rest_b else 1.0, float(vectors[b.text] @ vectors[text_a]) if rest_a else 1.0)
    words_a, words_b = ([word for word in rest if word not in COMMON] for rest in remaining)
    mean_a, least_a = _aligned(words_a, words_b, vectors)
    mean_b, least_b = _aligned(words_b, words_a, vectors)
    return [
        between, float(not rest_a and not rest_b), float(bool(rest_a) != bool(rest_b)), min(covered), max(covered), min(mean_a, mean_b),
        max(mean_a, mean_b), min(least_a, least_b), max(least_a, least_b), *sorted((len(words_a), len(words_b))),
    ]  # fmt: skip


def _aligned(words: list[str], others: list[str], vectors: dict[str, np.ndarray]) -> tuple[float, float]:
    """The mean and the least of the words' best cosine to any of the others."""
    if not words:
        return 1.0, 1.0
    if not others:
        return 0.0, 0.0
    best = [max(float(vectors[word] @ vectors[other]) for other in others) for word in words]
    return sum(best) / len(best), min(best)


def _rarities(a: Question, remaining: tuple[list[str], list[str]], reader: Reader) -> list[float]:
    """How rare the words are that only one of them has, and those of both."""
    rest_a, rest_b = ([reader.rarity(word) for word in rest] for rest in remaining)
    both = [reader.rarity(word) for word in sorted(set(a.words) - set(remaining[0]))]
    rarest, sums, shared = [max(rest_a, default=0.0), max(rest_b, default=0.0)], [sum(rest_a), sum(rest_b)], sum(both)
    share = sum(shared / (alone + shared + 0.1) for alone in sums)
    return [min(rarest), max(rarest), min(sums), max(sums), max(both, default=0.0), shared, share]


def _kinds(a: Question, b: Question) -> list[float]:
    return [float(a.kind == name) + float(b.kind == name) for name in KIND_NAMES]


def _remaining(a: Question, b: Question) -> list[str]:
    stems = {stem(word) for word in b.words}
    return [word for word in a.words if stem(word) not in stems]


def _grams(question: Question, size: int) -> list[str]:
    text = f" {' '.join(question.words)} "
    return [text[i : i + size] for i in range(len(text) - size + 1)]


def _dice(a: Sequence[Any], b: Sequence[Any]) -> float:
    shared = (Counter(a) & Counter(b)).total()
    return 2 * shared / max(1, len(a) + len(b))


@dataclass(frozen=True)
class Unfitted:
    """Before anything was learned: TRAITS' own weights."""

    def probability(self, traits: np.ndarray) -> np.ndarray:
        import numpy as np

        odds = traits @ np.array([trait.weight for trait in TRAITS]) + BIAS
        return np.asarray(1 / (1 + np.exp(-odds)))


@dataclass(frozen=True)
class Fitted:
    """What labelled pairs taught: the mean log-odds of boosted trees, a forest of random trees and a logistic curve."""

    boosted: tuple[Any, ...]
    forest: Any
    curve: Any

    def probability(self, traits: np.ndarray) -> np.ndarray:
        import numpy as np

        grown = np.clip(self.forest.predict_proba(traits)[:, 1], SURE, 1 - SURE)
        boosted = sum(model.decision_function(traits) for model in self.boosted) / len(self.boosted)
        odds = 0.4 * boosted + 0.4 * np.log(grown / (1 - grown)) + 0.2 * self.curve.decision_function(traits)
        return np.asarray(1 / (1 + np.exp(-odds)))


def fit(traits: np.ndarray, same: np.ndarray, *, seed: int) -> Classifier:
    """Learn from labelled pairs; too few of either kind teach nothing. Raises ValueError when the lengths differ."""
    import numpy as np

    same = np.asarray(same, dtype=bool)
    if len(traits) != len(same):
        raise ValueError(f"{len(traits)} pairs for {len(same)} labels; pass one label for each pair")
    if len(same) < LEAST_LABELS or min(int(same.sum()), int((~same).sum())) < LEAST_OF_A_KIND:
        return Unfitted()
    from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    boosted = tuple(
        HistGradientBoostingClassifier(
            learning_rate=0.05, max_iter=150, max_leaf_nodes=6, l2_regularization=5, max_features=0.3, random_state=seed + i
        ).fit(traits, same)
        for i in range(3)
    )
    forest = ExtraTreesClassifier(400, min_samples_leaf=3, max_features=0.4, random_state=seed).fit(traits, same)
    curve = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500)).fit(traits, same)
    return Fitted(boosted, forest, curve)
