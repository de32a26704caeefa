"""Turn what a student's answer tells of itself (`signs`) into a calibrated probability of being right.

A `Calibrator` is learned from verified outcomes of one student in one domain. This module knows nothing of thresholds,
students or where outcomes are stored; `policy` compares, this only measures.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from tutelage.routing import signs
from tutelage.routing.promises import Assurance, assure
from tutelage.routing.signs import MAX_SCORE, MIN_SCORE, Reading, Signs

MIN_LABELS = 20  # below this a calibrator says nothing (probability 0, so the request escalates)
ISOTONIC_LABELS = 500  # from here there are enough labels to learn the curve's shape, not only its slope
MAX_BINS = 10  # of a calibration error
MIN_PER_BIN = 20  # fewer in a bin measure chance: 6 fair coins are off by 0.16 on average

Kind = Literal["unknown", "platt", "isotonic"]


@dataclass(frozen=True)
class Calibrator:
    """A nondecreasing map from score to probability, learned from `n` outcomes.

    `a` and `b` are the logistic curve's slope (per nat of log-odds) and intercept. An isotonic calibrator adds the
    points (`scores`, `probabilities`) of a piecewise linear curve, mixed with the logistic one by `weight`. `reliability` is
    the share of what it promises that newer outcomes confirm (`drift.py`); it scales every probability. `assurance` is what answers of
    at least some score surely are worth (`promises.py`): a probability is a guess, this is a promise. `reading` makes the score.
    `again` knows more: it reads whether the student says the same when it is asked again; None where that is not proven to tell anything.
    """

    kind: Kind
    n: int
    a: float = 0.0
    b: float = 0.0
    weight: float = 0.0
    scores: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()
    reliability: float = 1.0
    assurance: Assurance = field(default_factory=Assurance)
    reading: Reading = field(default_factory=Reading)
    again: Calibrator | None = None

    @property
    def second(self) -> Calibrator | None:
        """`again`, as reliable as this one."""
        return self.again and replace(self.again, reliability=self.reliability)

    def probability(self, score: float) -> float:
        """The probability of being right at this score: 0.0 when unknown, otherwise within `floor` and `ceiling`."""
        if self.kind == "unknown" or math.isnan(score):
            return 0.0
        score = min(max(score, MIN_SCORE), MAX_SCORE)
        mixed = (1.0 - self.weight) * _sigmoid(self.a * score + self.b)
        if self.weight:
            mixed += self.weight * _interpolate(score, self.scores, self.probabilities)
        return min(max(mixed, self.floor), self.ceiling) * self.reliability

    def assured(self, score: float) -> float:
        """The mean worth that answers of at least this score surely have; 0.0 where nothing is sure."""
        return 0.0 if self.kind == "unknown" or math.isnan(score) else self.assurance.at(score) * self.reliability

    @property
    def floor(self) -> float:
        """The lowest probability that `n` outcomes can support (0.0 when unknown)."""
        return 0.0 if self.kind == "unknown" else 1.0 / (self.n + 2)

    @property
    def ceiling(self) -> float:
        """The highest probability that `n` outcomes can support, by the rule of succession (0.0 when unknown)."""
        return 0.0 if self.kind == "unknown" else (self.n + 1) / (self.n + 2)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        assurance = {"cuts": list(self.assurance.cuts), "kept": list(self.assurance.kept)}
        nested = {"assurance": assurance, "again": self.again.to_dict() if self.again else None}
        return asdict(self) | {"scores": list(self.scores), "probabilities": list(self.probabilities)} | nested

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Calibrator:
        """The calibrator that `to_dict` described. Raises TypeError on a missing or unknown field."""
        points = {name: tuple(fields.get(name, ())) for name in ("scores", "probabilities")}
        told = fields.get("assurance", {})  # calibrators of before have none, and so promise nothing
        assurance = Assurance(**{name: tuple(values) for name, values in told.items()})
        again = cls.from_dict(fields["again"]) if fields.get("again") else None
        return cls(**{**fields, **points, "assurance": assurance, "reading": Reading(**fields.get("reading", {})), "again": again})


def fit_signs(told: Sequence[Signs], correct: Sequence[float]) -> Calibrator:
    """Learn how to read answers and a calibrator of the scores read, and one for answers that were asked for again where that is proven to
    tell more. Raises ValueError as `fit` does."""
    reading = signs.fit(told, correct)
    first = _read(reading, told, correct)
    again = signs.fit_again(told, correct, reading)
    return first if again is None else replace(first, again=_read(again, told, correct))


def _read(reading: Reading, told: Sequence[Signs], correct: Sequence[float]) -> Calibrator:
    return replace(fit([reading.score(one) for one in told], correct), reading=reading)


def fit(
    scores: Sequence[float], correct: Sequence[float], *, prior_strength: float = 1.0, isotonic_labels: int = ISOTONIC_LABELS
) -> Calibrator:
    """Learn a calibrator: unknown below MIN_LABELS, Platt's logistic curve, isotonic mixed in from `isotonic_labels`.

    `correct` holds True and False, or how acceptable each answer was in 0..1. `prior_strength` is the L2 penalty on the
    slope over standardised scores: larger means less trust in the score. Raises ValueError when the lengths differ or a score
    is not finite.
    """
    n = len(scores)
    if n != len(correct):
        raise ValueError(f"{n} scores for {len(correct)} outcomes; pass one outcome for each score")
    if not all(map(math.isfinite, scores)):
        raise ValueError("a score is not finite; compute scores with tutelage.routing.signs.score")
    if n < MIN_LABELS:
        return Calibrator("unknown", n)
    a, b = _fit_platt(scores, correct, prior_strength)
    assurance = assure(scores, correct)
    if n < isotonic_labels:
        return Calibrator("platt", n, a, b, assurance=assurance)
    points = _fit_isotonic(scores, correct)
    return Calibrator("isotonic", n, a, b, n / (n + isotonic_labels), *points, assurance=assurance)


def ece(probabilities: Sequence[float], correct: Sequence[bool], *, bins: int = MAX_BINS, least: int = MIN_PER_BIN) -> float:
    """Expected calibration error over bins of equal mass, at most `bins` and each of at least `least` outcomes: the mean gap
    between probability and share right. Smaller bins measure chance: eight outcomes a bin give a perfectly calibrated student 0.11.

    Equal probabilities share their outcomes first, so the order of the input does not matter. Raises ValueError on
    empty input or unequal lengths.
    """
    import numpy as np

    if not len(probabilities) == len(correct) > 0:
        raise ValueError(f"{len(probabilities)} probabilities for {len(correct)} outcomes; pass as many, at least one")
    values, group = np.unique(np.asarray(probabilities, dtype=float), return_inverse=True)
    share = np.bincount(group, weights=np.asarray(correct, dtype=float)) / np.bincount(group)
    order = np.sort(group)
    parts = np.array_split(order, max(1, min(bins, len(order) // least)))
    gaps = [abs(float(np.sum(values[part] - share[part]))) for part in parts]
    return sum(gaps) / len(order)


def _fit_platt(scores: Sequence[float], correct: Sequence[float], prior_strength: float) -> tuple[float, float]:
    """Slope and intercept by Platt (1999): targets are pulled off 0 and 1, so one-sided outcomes stay finite."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    x, right = np.asarray(scores, dtype=float), np.asarray(correct, dtype=float)
    centre, spread = float(x.mean()), max(float(x.std()), 1e-3)  # equal scores have no spread to divide by
    wrong = 1.0 - right
    target = right * (right.sum() + 1) / (right.sum() + 2) + wrong / (wrong.sum() + 2)
    # scikit-learn takes no fractional targets: each row stands twice, as right and as wrong, weighted by its target.
    rows = np.tile((x - centre) / spread, 2)[:, None]
    weights = np.concatenate([target, 1 - target])
    model = LogisticRegression(C=1.0 / prior_strength)
    model.fit(rows, np.repeat([True, False], len(x)), sample_weight=weights)
    slope = float(model.coef_[0, 0]) / spread
    if slope <= 0.0:  # a score that points the wrong way is noise: fall back to the share right
        return 0.0, math.log(target.mean() / (1 - target.mean()))
    return slope, float(model.intercept_[0]) - slope * centre


def _fit_isotonic(scores: Sequence[float], correct: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
    model.fit(list(scores), [float(right) for right in correct])
    return tuple(map(float, model.X_thresholds_)), tuple(map(float, model.y_thresholds_))


def _sigmoid(log_odds: float) -> float:
    if log_odds >= 0.0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    return math.exp(log_odds) / (1.0 + math.exp(log_odds))


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear through the points, level beyond both ends."""
    right = bisect.bisect_left(xs, x)
    if right == 0:
        return ys[0]
    if right == len(xs):
        return ys[-1]
    step = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + step * (ys[right] - ys[right - 1])
