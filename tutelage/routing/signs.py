"""What an answer tells of itself: how probable its tokens were, how far each was ahead of the next likeliest, how long it is, and whether
its model says the same when it is asked again.

A `Reading` makes one score of them for one student, learned from verified answers; where the other signs prove nothing, the score is the
log-odds of the answer alone. It refuses to know thresholds and what is done with a score; `confidence` makes a probability of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tutelage.scoring import final, matches

# Float32 log-probabilities cannot tell 1 - 1e-7 from 1, hence the upper bound; long answers have tiny probabilities
# that must still be told apart, hence the wider lower one.
MAX_SCORE = 16.0
MIN_SCORE = -200.0
ALTERNATIVES = 2  # to ask for at every token, for its margin
MIN_LABELS = 100  # below this three weights fit chance
FOLDS = 5
WIDEST = 1e-3  # a spread below it is none
AGAIN = 3  # answers drawn to see whether they say the same (self-consistency, arXiv 2203.11171)
AGAIN_TEMPERATURE = 0.7  # as there


class Signs(NamedTuple):
    """`score`: log-odds of the whole answer, nats. `margin`: the least lead of a token over the next likeliest, nats, negative where a
    likelier one was passed over; None where the model told no alternatives. `tokens`: how many, the stop token included. `agreement`: the
    share of further answers, drawn at AGAIN_TEMPERATURE, that end with the same; None where none were drawn."""

    score: float
    margin: float | None
    tokens: int
    agreement: float | None = None


@dataclass(frozen=True)
class Reading:
    """What is added to the log-odds of an answer: so much for each nat of its margin above `margin_mean`, for each nat of the logarithm
    of its length above `length_mean`, and for full `agreement` more than `agreement_mean`."""

    margin: float = 0.0
    margin_mean: float = 0.0
    length: float = 0.0
    length_mean: float = 0.0
    agreement: float = 0.0
    agreement_mean: float = 0.0

    def score(self, signs: Signs) -> float:
        """The score of an answer, within MIN_SCORE and MAX_SCORE; without a sign that counts, the lowest."""
        if (signs.margin is None and self.margin) or (signs.agreement is None and self.agreement):
            return MIN_SCORE
        added = self.margin * ((signs.margin or 0.0) - self.margin_mean) + self.length * (_length(signs) - self.length_mean)
        added += self.agreement * ((signs.agreement or 0.0) - self.agreement_mean)
        return min(max(signs.score + added, MIN_SCORE), MAX_SCORE)


def score(token_logprobs: Sequence[float]) -> float:
    """Log-odds (nats) of the whole answer, stop token included, within MIN_SCORE and MAX_SCORE.

    No tokens, or a value that is not a number, count as the lowest score: the request escalates.
    """
    total = math.fsum(token_logprobs) if token_logprobs else -math.inf
    if math.isnan(total) or total <= MIN_SCORE:
        return MIN_SCORE
    doubt = -math.expm1(min(total, 0.0))  # 1 - probability, exact also where the probability is almost 1
    return min(total - math.log(doubt), MAX_SCORE) if doubt > 0.0 else MAX_SCORE


def read(content: Sequence[Mapping[str, Any]]) -> Signs:
    """The signs of an answer from OpenAI's `logprobs.content`, whose `top_logprobs` may be missing."""
    return of([(float(token["logprob"]), [float(top["logprob"]) for top in token.get("top_logprobs") or ()]) for token in content])


def of(tokens: Sequence[tuple[float, Sequence[float]]]) -> Signs:
    """The signs of an answer from each token's log-probability and those of the likeliest at its place, the stop token included."""
    leads = [lead(logprob, likeliest) for logprob, likeliest in tokens]
    known = [found for found in leads if found is not None]
    margin = min(known) if known and len(known) == len(leads) else None
    return Signs(score([logprob for logprob, _ in tokens]), margin, len(tokens))


def lead(logprob: float, likeliest: Sequence[float]) -> float | None:
    """How far a token is ahead of the best other one. `likeliest`: log-probabilities of the best at its place, itself among them if it is
    one. None when fewer than two are told, or one is not a number."""
    if len(likeliest) < 2 or not all(map(math.isfinite, (logprob, *likeliest[:2]))):
        return None
    first, second = sorted(likeliest, reverse=True)[:2]
    return logprob - (second if logprob >= first else first)


def agreement(text: str, others: Sequence[str]) -> float:
    """The share of `others` that end with the same as `text`. Raises ValueError when there are none."""
    if not others:
        raise ValueError("no further answers to compare with; draw at least one")
    return sum(matches(final(other), final(text)) for other in others) / len(others)


def fit(signs: Sequence[Signs], correct: Sequence[float]) -> Reading:
    """How much margin and length count beside the log-odds: not at all with fewer than MIN_LABELS answers, where a margin is missing, and
    unless answers held out in FOLDS folds are told better by more than the standard error of that.

    Better is a lower logarithmic loss of a logistic curve. Raises ValueError when the lengths differ.
    """
    import numpy as np

    if any(told.margin is None for told in signs):
        return Reading()
    rows = np.array([(min(max(told.score, MIN_SCORE), MAX_SCORE), told.margin or 0.0, _length(told)) for told in signs]).reshape(-1, 3)
    found = _proven(rows, correct)
    if found is None:
        return Reading()
    (margin, length), means = found, rows.mean(axis=0)
    return Reading(margin, float(means[1]), length, float(means[2]))


def fit_again(signs: Sequence[Signs], correct: Sequence[float], first: Reading) -> Reading | None:
    """`first` with what agreement adds to it; None where it is not proven as `fit` asks, or was not looked at."""
    import numpy as np

    if any(told.agreement is None for told in signs):
        return None
    rows = np.array([(first.score(told), told.agreement or 0.0) for told in signs]).reshape(-1, 2)
    found = _proven(rows, correct)
    if found is None or found[0] <= 0.0:
        return None
    return replace(first, agreement=found[0], agreement_mean=float(rows[:, 1].mean()))


def _proven(rows: Any, correct: Sequence[float]) -> list[float] | None:
    """How much each column after the first counts beside it; None where held-out answers do not show that they help."""
    import numpy as np

    if len(rows) != len(correct):
        raise ValueError(f"the signs of {len(rows)} answers for {len(correct)} outcomes; pass one outcome for each answer")
    right = np.asarray(correct, dtype=float) >= 0.5
    if len(rows) < MIN_LABELS or min(right.sum(), (~right).sum()) < FOLDS:
        return None
    gain = _losses(rows[:, :1], right) - _losses(rows, right)
    if gain.mean() <= gain.std(ddof=1) / math.sqrt(len(gain)):
        return None
    spread = rows.std(axis=0)
    weights = _logistic(rows, right).named_steps["logisticregression"].coef_[0] / np.where(spread > WIDEST, spread, np.inf)
    if weights[0] <= 0.0:  # the score would be turned round
        return None
    return [float(weight) for weight in weights[1:] / weights[0]]


def _logistic(rows: Any, right: Any) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, right)


def _losses(rows: Any, right: Any) -> Any:
    """The logarithmic loss of each answer by a curve that did not see it."""
    import numpy as np
    from sklearn.model_selection import StratifiedKFold

    told = np.empty(len(rows))
    for learned, held in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(rows, right):
        told[held] = _logistic(rows[learned], right[learned]).predict_proba(rows[held])[:, 1]
    return -np.log(np.clip(np.where(right, told, 1.0 - told), 1e-12, None))


def _length(signs: Signs) -> float:
    return math.log(max(signs.tokens, 1))
