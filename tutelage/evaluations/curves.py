"""The cost-quality curve of two models and its figures: performance gap recovered (PGR), APGR, CPT (Ong et al., 2024, RouteLLM).

PGR at a share c of requests sent to the strong model is (quality - weak) / (strong - weak). Knows nothing of how requests were ranked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

QUANTILES = 11  # thresholds at which PGR is averaged


@dataclass(frozen=True, eq=False)
class Ranking:
    """Rows from the one that needs the strong model most; equal needs stand in the order of a seeded draw, not of the file."""

    order: np.ndarray
    weak: np.ndarray
    strong: np.ndarray


@dataclass(frozen=True)
class Figures:
    """`apgr`: about 0.5 for a random order. `cpt50`, `cpt80`: smallest share of strong calls, in percent, that recovers so much of the
    gap. All NaN when the two models are equally good."""

    apgr: float
    cpt50: float
    cpt80: float


def rank(need: np.ndarray, weak: np.ndarray, strong: np.ndarray, *, seed: int) -> Ranking:
    """Order rows by how much they need the strong model; `weak` and `strong` are both models' quality [n]."""
    import numpy as np

    tie_break = np.random.default_rng(seed).permutation(len(need))
    return Ranking(np.lexsort((tie_break, -np.asarray(need))), weak, strong)


def sweep(ranking: Ranking, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Strong share and mean quality for every threshold, from all weak to all strong: [n + 1] each. `counts` [n] repeats rows."""
    import numpy as np

    times = np.ones(len(ranking.order)) if counts is None else counts[ranking.order].astype(float)
    total = times.sum()
    gain = (ranking.strong - ranking.weak)[ranking.order]
    start = float((times * ranking.weak[ranking.order]).sum() / total)
    shares = np.concatenate([[0.0], np.cumsum(times) / total])
    return shares, start + np.concatenate([[0.0], np.cumsum(times * gain) / total])


def figures(shares: np.ndarray, qualities: np.ndarray) -> Figures:
    """APGR by the trapezoid rule over QUANTILES shares, and the smallest shares that reach half and four fifths of the gap."""
    import numpy as np

    gap = qualities[-1] - qualities[0]
    if abs(gap) < 1e-12:
        return Figures(float("nan"), float("nan"), float("nan"))
    recovered = (qualities - qualities[0]) / gap
    at = np.linspace(0.0, 1.0, QUANTILES)
    apgr = float(np.trapezoid(np.interp(at, shares, recovered), at))
    cpt50, cpt80 = (100.0 * float(shares[int(np.argmax(recovered >= part - 1e-12))]) for part in (0.5, 0.8))
    return Figures(apgr, cpt50, cpt80)


def intervals(values: np.ndarray, *, low: float = 2.5, high: float = 97.5) -> list[float]:
    """The percentile interval of bootstrap values."""
    import numpy as np

    return [float(np.nanpercentile(values, low)), float(np.nanpercentile(values, high))]
