"""Where cheap models fail often and dearly enough to be worth a student: frequency × cost × failure.

A pure rule over counted traffic; it refuses to know where the counts come from or how a student is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from tutelage.settings import Strict


class EvolveSettings(Strict):
    """When a gap is worth a student, and how much one cycle may take on (`evolve.yaml`)."""

    window_rows: int = Field(default=20_000, gt=0)
    min_requests: int = Field(default=100, gt=0)
    min_failure_rate: float = Field(default=0.2, ge=0, le=1)
    max_students: int = Field(default=8, gt=0)
    retry_growth: float = Field(default=1.5, gt=1)
    min_domain_size: int = Field(default=30, gt=1)


@dataclass(frozen=True)
class Traffic:
    """What one domain saw since its newest student version (or in the whole window): requests, those that no cheap model answered
    acceptably, and what they cost in micro-dollars. `known`: requests of the whole window, all a student could learn from."""

    domain: str
    known: int
    requests: int
    failed: int
    cost_microusd: int


@dataclass(frozen=True)
class Gap:
    """One domain's place in the queue for students; `priority` is micro-dollars lost to failure per request of all traffic."""

    domain: str
    requests: int
    failure_rate: float
    cost_microusd: int
    priority: float
    decision: Literal["train", "wait"]
    reason: str


def measure(traffic: Sequence[Traffic], settings: EvolveSettings, *, trained_on: Mapping[str, int]) -> list[Gap]:
    """Gaps by falling priority, the first `max_students` worthy ones to be trained.

    `trained_on`: requests of a domain that its newest student version was trained on; it is tried again only when there is
    `retry_growth` times as much to learn from.
    """
    everything = sum(t.requests for t in traffic) or 1
    ranked = sorted(traffic, key=lambda t: (-_priority(t, everything), t.domain))
    gaps: list[Gap] = []
    for domain in ranked:
        refusal = _refusal(domain, settings, trained_on.get(domain.domain, 0))
        if refusal is None and sum(g.decision == "train" for g in gaps) >= settings.max_students:
            refusal = f"{settings.max_students} gaps of this cycle are worth more"
        rate, priority = domain.failed / max(domain.requests, 1), _priority(domain, everything)
        reason = refusal or f"{rate:.0%} of {domain.requests} requests needed the teacher and cost ${domain.cost_microusd / 1e6:.4f}"
        gaps.append(Gap(domain.domain, domain.requests, rate, domain.cost_microusd, priority, "wait" if refusal else "train", reason))
    return gaps


def _priority(domain: Traffic, everything: int) -> float:
    frequency = domain.requests / everything
    cost = domain.cost_microusd / max(domain.requests, 1)
    return frequency * cost * domain.failed / max(domain.requests, 1)


def _refusal(domain: Traffic, settings: EvolveSettings, trained_on: int) -> str | None:
    rate = domain.failed / max(domain.requests, 1)
    if trained_on and domain.known < settings.retry_growth * trained_on:
        needed = round(settings.retry_growth * trained_on)
        return f"its newest student saw {trained_on} requests; another is tried from {needed}, there are {domain.known}"
    if domain.requests < settings.min_requests:
        return f"{domain.requests} requests are too few to learn from; {settings.min_requests} are needed"
    if rate < settings.min_failure_rate:
        return f"cheap models already answer {1 - rate:.0%}; a student is worth it from {settings.min_failure_rate:.0%} failures"
    return None
