"""How probable it is that a model answers a prompt acceptably, estimated from the prompt alone, before the call.

An estimate says how many outcomes stand behind it and is `unknown` until there are enough. This module knows nothing of
prices, thresholds or strategies, nor of where outcomes come from; `confidence` judges an answer after the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["unknown", "platt", "isotonic"]


@dataclass(frozen=True)
class Estimate:
    """The probability that one model answers one prompt acceptably; 0.0 when `kind` is "unknown".

    `n` counts the outcomes of that model behind it.
    """

    probability: float
    n: int
    kind: Kind
    reason: str


class Estimator(Protocol):
    """What strategies may ask before a call. Safe to share between threads."""

    @property
    def models(self) -> tuple[str, ...]:
        """The models it has outcomes of."""

    def probability(self, model: str, embedding: np.ndarray, prompt: str, domain: str | None) -> Estimate:
        """For one model; a model it has no outcomes of is "unknown". `embedding` is float32 [dimension] of length 1."""

    def probabilities(self, embedding: np.ndarray, prompt: str, domain: str | None) -> dict[str, Estimate]:
        """For every model of `models`, at the cost of one."""
