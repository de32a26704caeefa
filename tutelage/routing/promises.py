"""How far routing may go while a promised quality is kept: a threshold chosen by test on outcomes, not by hope.

Learn-then-test (Angelopoulos et al., 2021) with fixed-sequence testing: candidates go from the safest to the boldest, each is tested on
held-out outcomes, and the last before the first failure is taken; the chance that it breaks the promise is then at most the stated one,
up to the central limit theorem.
Knows nothing of models or prices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MIN_OUTCOMES = 100  # of a test that leans on the central limit theorem


@dataclass(frozen=True)
class PromiseSettings:
    """`loss`: promised share of the reference's quality that may be lost. At most a share `risk` of windows of so many requests loses
    more, and this statement itself is right with probability `confidence` over the outcomes it was tested on."""

    loss: float = 0.05
    risk: float = 0.1
    window: int = 1000
    confidence: float = 0.98


DEFAULTS = PromiseSettings()


@dataclass(frozen=True)
class Promise:
    """The boldest candidate that passed; None keeps to the reference. `loss` is its relative loss on the `n` outcomes it was tested on."""

    candidate: int | None
    loss: float
    n: int
    reason: str


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
