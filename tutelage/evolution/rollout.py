"""How a challenger takes the champion's place: from shadow through growing shares of the requests, each step bound to the e-process.

Pure rules: they refuse to know who measures, who routes and how an adapter is loaded. The share a request falls into depends on the version
and the request alone, so every gateway decides alike, the same question gets the same version, and a growing share only adds requests.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from tutelage.evolution.evidence import Tally
from tutelage.evolution.promotion import Comparison, PromotionSettings, better, worse
from tutelage.settings import Strict

PARTS = 10_000  # shares are told apart to a hundredth of a percent


class RolloutSettings(Strict):
    """`rollout.yaml`: percent of requests by stage, from 0 (shadow) to 100 (champion); verified outcomes to be shown at each."""

    stages: tuple[int, ...] = (0, 1, 10, 50, 100)
    outcomes_at_stage: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _rising(self) -> RolloutSettings:
        if self.stages[0] != 0 or self.stages[-1] != 100 or list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages {list(self.stages)} must rise from 0 (shadow) to 100, such as [0, 1, 10, 50, 100]")
        return self


@dataclass(frozen=True)
class Rollout:
    """A challenger on its way: percent of the requests it answers, what it has shown in all, and since this stage began."""

    percent: int
    comparison: Comparison
    at_stage: Tally


@dataclass(frozen=True)
class Step:
    """What becomes of a rollout now. `promote`: it is the champion. `stop`: it answers nothing any more."""

    action: Literal["stay", "advance", "promote", "stop"]
    percent: int
    reason: str


def step(rollout: Rollout, settings: RolloutSettings, promotion: PromotionSettings, *, needed: float) -> Step:
    """The next step: on while the e-process stands at its level and enough was seen at this stage, out when it says worse.

    The first share needs `promotion.evidence`, the last one (100 %) the e-value `needed` for this test of the year.
    """
    percent = rollout.percent
    harmful = worse(rollout.comparison, promotion)
    if harmful.passed:
        return Step("stop", 0, f"at {percent} %: {harmful.reason}")
    here = worse(Comparison(rollout.at_stage), promotion)
    if here.passed:
        return Step("stop", 0, f"at {percent} %, in this stage alone: {here.reason}")
    following = settings.stages[settings.stages.index(percent) + 1]
    finding = better(rollout.comparison, promotion, needed=needed if following == 100 else promotion.evidence)
    if not finding.passed:
        return Step("stay", percent, f"stays at {percent} %: {finding.reason}")
    if percent and rollout.at_stage.n < settings.outcomes_at_stage:
        return Step("stay", percent, f"stays at {percent} %: {rollout.at_stage.n} outcomes there, {settings.outcomes_at_stage} needed")
    return Step("promote" if following == 100 else "advance", following, f"from {percent} % to {following} %: {finding.reason}")


def takes(version: str, prompt_hash: bytes, percent: float) -> bool:
    """Whether a challenger that answers `percent` of the requests answers this one; `version` is its adapter's name.

    >>> takes("acme-sums.v2", b"any", 0), takes("acme-sums.v2", b"any", 100)
    (False, True)
    """
    drawn = hashlib.blake2b(prompt_hash, digest_size=8, key=version.encode()[:64]).digest()
    return int.from_bytes(drawn) % PARTS < percent * PARTS / 100
