"""How far routing may go while a promised quality is kept: a threshold chosen by test on outcomes, not by hope.

Learn-then-test (Angelopoulos et al., 2021) on held-out outcomes, with a stated chance that the promise is broken. `keep` tests a whole
policy beside its reference: candidates go from the safest to the boldest and the last before the first failure is taken (fixed-sequence
testing, up to the central limit theorem). `assure` tests the answers of one model above several cuts of its score at once (union bound,
at any number of outcomes), for whatever quality a request may ask.
Knows nothing of models or prices.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MIN_OUTCOMES = 100  # of a test that leans on the central limit theorem
RISK = 0.05  # that what `assure` says of one model is not so
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)  # of the outcomes that stand above the cuts that `assure` looks at


@dataclass(frozen=True)
class PromiseSettings:
    """`loss`: promised share of the reference's quality that may be lost. At most a share `risk` of windows of so many requests loses
    more, and this statement itself is right with probability `confidence` over the outcomes it was tested on."""

    loss: float = 0.05
    risk: float = 0.1
    window: int = 1000
    confidence: float = 0.995


DEFAULTS = PromiseSettings()


@dataclass(frozen=True)
class Promise:
    """The boldest candidate that passed; None keeps to the reference. `loss` is its relative loss on the `n` outcomes it was tested on."""

    candidate: int | None
    loss: float
    n: int
    reason: str


@dataclass(frozen=True)
class Assurance:
    """The mean worth that answers above each cut of their score surely have; `cuts` and `kept` both rise."""

    cuts: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()

    def at(self, score: float) -> float:
        """Of answers of at least this score, by the strictest cut that it reaches; 0.0 where nothing is assured."""
        place = bisect.bisect_right(self.cuts, score)
        return self.kept[place - 1] if place else 0.0


def assure(scores: Sequence[float], values: Sequence[float], *, risk: float = RISK) -> Assurance:
    """From outcomes in 0..1 of answers with these scores, which must not have learned from them.

    With probability 1 - `risk` over the outcomes, answers above every cut have at least its `kept` as mean worth: the bound of each cut
    is Chernoff's for means in 0..1 at its share of the risk. Exact tails would need outcomes of 0 and 1 only. Raises ValueError on unequal
    lengths.
    """
    import numpy as np

    if len(scores) != len(values):
        raise ValueError(f"{len(scores)} scores for {len(values)} outcomes; pass one outcome for each score")
    score, value = np.asarray(scores, dtype=float), np.asarray(values, dtype=float)
    falling = np.sort(score)[::-1]
    cuts = sorted({float(falling[max(round(share * len(falling)), 1) - 1]) for share in SHARES}) if len(falling) else []
    kept, best = [], 0.0
    for cut in cuts:
        above = value[score >= cut]
        best = max(best, lower_bound(float(above.mean()), len(above), risk=risk / len(SHARES)))
        kept.append(best)
    return Assurance(tuple(cuts), tuple(kept))


def lower_bound(mean: float, n: int, *, risk: float) -> float:
    """The true mean under which `n` independent values in 0..1 reach this `mean` with a probability of at most `risk`:
    n * kl(mean, bound) = ln(1 / risk) (Hoeffding, 1963, theorem 1)."""

    low, high = 0.0, mean
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if n * _divergence(mean, middle) > -math.log(risk) else (low, middle)
    return low


def _divergence(mean: float, other: float) -> float:
    """Kullback and Leibler's, of two coins, in nats."""

    if other <= 0.0:
        return math.inf if mean > 0 else 0.0
    right = mean * math.log(mean / other) if mean > 0 else 0.0
    return right + ((1 - mean) * math.log((1 - mean) / (1 - other)) if mean < 1 else 0.0)


def keep(routed: np.ndarray, reference: np.ndarray, moved: np.ndarray, settings: PromiseSettings = DEFAULTS) -> Promise:
    """Choose among candidates: quality `routed` [n, candidates], safest first, against the reference's [n] on the same requests.

    `moved` [candidates], rising, is the share of requests each takes from the reference. Estimates that rank requests well move those
    first that lose least, so the mean is smoothed to fall ever faster (isotonic regression of its slopes): fewer chance dips.

    Tests the mean of routed - (1 - loss) * reference, paired by request. It must clear the error of these n outcomes and, beside it,
    that of a future window: the promise is about what a tenant will see, not about an average it never sees.
    """
    import numpy as np
    from scipy.stats import norm

    n = len(reference)
    if n < MIN_OUTCOMES:
        return Promise(None, 0.0, n, f"only {n} outcomes are known and {MIN_OUTCOMES} are needed to test a promise")
    excess = routed - (1.0 - settings.loss) * reference[:, None]
    errors = float(norm.ppf(settings.confidence)) / np.sqrt(n) + float(norm.ppf(1.0 - settings.risk)) / np.sqrt(settings.window)
    means = _smoothed(excess.mean(axis=0), settings.loss * float(reference.mean()), moved)
    passed = means >= excess.std(axis=0, ddof=1) * errors
    count = int(np.argmin(passed)) if not passed.all() else len(passed)
    if count == 0:
        return Promise(None, 0.0, n, f"no candidate keeps the loss within {settings.loss:.1%} on {n} outcomes")
    total = float(reference.mean())
    loss = 1.0 - float(routed[:, count - 1].mean()) / total if total else 0.0
    reason = f"loses {loss:.1%} on {n} outcomes; the next would break {settings.loss:.1%} in more than {settings.risk:.0%} of windows"
    return Promise(count - 1, loss, n, reason)


def _smoothed(means: np.ndarray, start: float, moved: np.ndarray) -> np.ndarray:
    """The concave curve through `start` at nothing moved that fits the means [candidates] best."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    steps = np.diff(np.concatenate([[0.0], moved]))
    widths = np.maximum(steps, 1e-9)
    slopes = np.diff(np.concatenate([[start], means])) / widths
    smooth: np.ndarray = start + np.cumsum(isotonic_regression(slopes, weights=widths, increasing=False).x * widths)
    return smooth
