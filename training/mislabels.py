"""Labels that their like contradict: what keeps wrong feedback, by mistake or by malice, out of training.

Out-of-fold label probabilities, as in confident learning (Northcutt, Jiang and Chuang 2021, arXiv:1911.00068), with a plain ratio in place
of its class thresholds: on news headlines with a tenth of the labels wrong it let half as many pass for the same rows lost. It judges only
rows it is told not to trust, and refuses to know who wrote them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.scoring import canonical

if TYPE_CHECKING:
    import numpy as np

LEAST_OF_CLASS = 5  # rows of a label from which its like can be told
FOLDS = 5
RATIO = 1.5  # another label so many times as likely as the given one speaks against it
# Regularisation (sklearn's C) of the models of words and of embeddings; of 1, 3 and 10 these were best with a tenth of the labels wrong.
WORDS_C, VECTORS_C = 3.0, 10.0


@dataclass(frozen=True)
class Doubt:
    """What there is to say against one row's label; `likely` is what its like say."""

    row: int
    likely: str
    probability: float
    reason: str


@dataclass(frozen=True)
class Checked:
    """`doubts` about untrusted rows, and the untrusted rows (`unchecked`) whose label is too rare for anything to speak for or against."""

    doubts: tuple[Doubt, ...]
    unchecked: tuple[int, ...]


def check(
    texts: Sequence[str], labels: Sequence[str], untrusted: Sequence[bool], vectors: np.ndarray | None = None, *, seed: int
) -> Checked:
    """Doubts about the labels of untrusted rows, judged by all rows; `vectors` (unit rows [n, d]) judge better than words alone.

    A row is doubted when models that never saw it find another label RATIO times as likely as its own. Where labels hardly ever repeat
    (answers that are computed or written) there is no like to ask, and all untrusted rows are `unchecked`.
    """
    names = [canonical(label) for label in labels]
    sizes = Counter(names)
    rows = [i for i, name in enumerate(names) if sizes[name] >= LEAST_OF_CLASS]
    asked = [i for i, doubtful in enumerate(untrusted) if doubtful]
    classes = sorted({names[i] for i in rows})
    if not asked or len(classes) < 2 or len(rows) < len(names) / 2:
        return Checked((), tuple(asked))
    probabilities = _out_of_fold(texts, names, rows, asked, classes, vectors, seed)
    doubts = [doubt for i in asked if (doubt := _doubt(i, names[i], probabilities[i], classes)) is not None]
    doubted = {doubt.row for doubt in doubts}
    return Checked(tuple(doubts), tuple(i for i in asked if names[i] not in classes and i not in doubted))


def _doubt(row: int, given: str, p: np.ndarray, classes: Sequence[str]) -> Doubt | None:
    """A label too rare to be among `classes` is doubted where its like are surer than not of another one."""
    best = int(p.argmax())
    own = float(p[classes.index(given)]) if given in classes else (1 - float(p[best])) / RATIO
    if classes[best] == given or p[best] < RATIO * own:
        return None
    return Doubt(row, classes[best], float(p[best]), f"its like say {classes[best]!r} ({p[best]:.2f} against {own:.2f})")


def _out_of_fold(
    texts: Sequence[str], names: Sequence[str], rows: Sequence[int], asked: Sequence[int], classes: Sequence[str],
    vectors: np.ndarray | None, seed: int,
) -> dict[int, np.ndarray]:  # fmt: skip
    """For each row, the label probabilities of models that were not fitted on it: words, and embeddings where there are some."""
    import numpy as np
    from sklearn.model_selection import StratifiedKFold

    place = {name: at for at, name in enumerate(classes)}
    target = np.array([place[names[i]] for i in rows])
    outside = [i for i in asked if names[i] not in place]
    views = _views(texts, vectors)
    probabilities: dict[int, np.ndarray] = {i: np.zeros(len(classes)) for i in outside}
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(target, target))
    for learned, left in folds:
        fitted = [_fit(view[[rows[k] for k in learned]], target[learned], c) for view, c in views]
        for of in ([rows[k] for k in left], outside):
            if not of:
                continue
            mean = np.mean([_spread(model, view[of], len(classes)) for model, (view, _) in zip(fitted, views, strict=True)], axis=0)
            for i, p in zip(of, mean, strict=True):
                probabilities[i] = p if of is not outside else probabilities[i] + p / len(folds)
    return probabilities


def _views(texts: Sequence[str], vectors: np.ndarray | None) -> list[tuple[Any, float]]:
    """What the models see of the rows, each with the regularisation that suits it."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    pattern = r"(?u)\w+|[^\w\s]"
    words = TfidfVectorizer(token_pattern=pattern, ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    return [(words, WORDS_C)] if vectors is None else [(words, WORDS_C), (vectors, VECTORS_C)]


def _fit(view: Any, target: np.ndarray, c: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=200).fit(view, target)


def _spread(model: Any, view: Any, count: int) -> np.ndarray:
    """Probabilities over all classes; those the fold did not hold have none."""
    import numpy as np

    spread = np.zeros((view.shape[0], count))
    spread[:, model.classes_] = model.predict_proba(view)
    return spread
