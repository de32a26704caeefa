"""Where cheap models fail often and dearly enough to be worth a student, in the order of what a second of training is expected to save.

A pure rule over counted traffic; it refuses to know where the counts come from or how a student is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from tutelage.evolution.evidence import Tally
from tutelage.scoring import wilson
from tutelage.settings import CHECKOUT, Strict

Kind = Literal["skill", "knowledge"]
Choice = Literal["train", "propose", "retrieve", "wait"]
PRESET_DIR = CHECKOUT / "configs" / "presets" / "evolve"
HOPELESS = 0.05  # share of the requests that a domain's next student may take when its last one learned nothing


class EvolveSettings(Strict):
    """When a cycle begins, when a gap is worth a student, and how much one cycle may take on (`evolve.yaml`).

    `preset`: shipped values (configs/presets/evolve) that hold where nothing else is said. `evolution_interval`: interactions of a tenant
    after which its next cycle begins by itself; `schedule_hours`: hours after which one does where there was any; null: not for that
    reason. `rest_minutes`: between two cycles of a tenant that begin by themselves. `auto_spawn_students`: whether gaps become students
    without being asked; otherwise they are proposed. `max_models_per_domain`: versions of a domain's student that are kept to answer.
    `training_seconds_per_day`: core-seconds of training that a tenant's gaps may use in a day; `training_seconds`: of one student, where
    none of its domain was trained yet. `untried_share`: the share of a domain that an untried student is expected to take over.
    `recall_from`: a gap is one of knowledge when the nearest earlier answer is right so often, with 95 % confidence. `retrieval`:
    whether the gateway answers such gaps from earlier answers, otherwise they are trained like any other; null: it does where models.yaml
    names a model cheaper than the teacher. `canaries`: held-out items kept
    for each domain, replaced by a fifth a quarter; what is as similar to one as `canary_similarity` (cosine) is not trained on either.
    """

    preset: Literal["aggressive", "stable"] | None = None
    evolution_interval: int | None = Field(default=100, ge=1)
    schedule_hours: float | None = Field(default=24, gt=0)
    rest_minutes: float = Field(default=10, ge=0)
    auto_spawn_students: bool = True
    max_models_per_domain: int = Field(default=10, ge=1)
    window_rows: int = Field(default=20_000, gt=0)
    min_requests: int = Field(default=100, gt=0)
    min_failure_rate: float = Field(default=0.2, ge=0, le=1)
    max_students: int = Field(default=8, gt=0)
    retry_growth: float = Field(default=1.5, gt=1)
    min_domain_size: int = Field(default=30, gt=1)
    training_seconds_per_day: float = Field(default=86_400, ge=0)
    training_seconds: float = Field(default=600, gt=0)
    untried_share: float = Field(default=0.5, gt=0, le=1)
    recall_from: float = Field(default=0.85, gt=0, le=1)
    retrieval: bool | None = None
    canaries: int = Field(default=100, ge=0)
    canary_similarity: float = Field(default=0.99, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        file = PRESET_DIR / f"{given.get('preset')}.yaml" if isinstance(given, dict) else None
        return {**yaml.safe_load(file.read_text()), **given} if file is not None and file.is_file() else given


@dataclass(frozen=True)
class Traffic:
    """What one domain saw since its newest student version (or in the whole window).

    `requests`; `failed`: those that no cheap model answered acceptably; `escalated`: those a cheap model tried and the teacher answered;
    `cost_microusd` in `days`. `known`: requests of the whole window, all a student could learn from. `recalled`: how often the answer to
    the most similar earlier request was right, the baseline that is tried before any training.
    """

    domain: str
    known: int
    requests: int
    failed: int
    cost_microusd: int
    escalated: int = 0
    days: float = 1.0
    recalled: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class Tried:
    """What became of a domain's newest student: requests it learned from, whether a probe found the task learnable, the share of held-out
    items it got right, the core-seconds it took (None: not known)."""

    requests: int
    learnable: bool = True
    accuracy: float | None = None
    core_seconds: float | None = None


@dataclass(frozen=True)
class Gap:
    """One domain's place in the queue. Rates come with 95 % Wilson bounds; `priority` is the saving in micro-dollars a day that one
    core-second of training is expected to bring; `learnability` the share of requests a student is expected to take."""

    domain: str
    requests: int
    per_day: float
    share: float
    failure_rate: float
    failure_95: tuple[float, float]
    escalation_rate: float
    escalation_95: tuple[float, float]
    cost_microusd: int
    cost_per_day_microusd: float
    learnability: float
    kind: Kind
    recalled: Tally
    training_seconds: float
    priority: float
    decision: Choice
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    traffic: Sequence[Traffic],
    settings: EvolveSettings,
    *,
    tried: Mapping[str, Tried],
    spent_seconds: float = 0.0,
    asked: Collection[str] = (),
) -> list[Gap]:
    """Gaps by falling priority; the first worthy ones are trained, as many as a cycle and what is left of the day's budget allow.

    `tried`: of each domain's newest student version; another is tried only when there is `retry_growth` times as much to learn from.
    `spent_seconds`: core-seconds of training that were used today already. `asked`: the domains that a person wants a student for: no
    other is trained then; without any and without `auto_spawn_students` every worthy gap is proposed.
    """
    everything = sum(t.requests for t in traffic) or 1
    measured = [(t, _measured(t, settings, tried.get(t.domain), everything)) for t in traffic]
    left, chosen, gaps = settings.training_seconds_per_day - spent_seconds, 0, []
    for domain, gap in sorted(measured, key=lambda pair: (-pair[1].priority, pair[1].domain)):
        refusal = _refusal(domain, settings, tried.get(domain.domain))
        if refusal is None and gap.kind == "knowledge" and settings.retrieval:
            gaps.append(replace(gap, decision="retrieve", reason=_recalled(domain)))
            continue
        if refusal is None and domain.domain not in asked and (asked or not settings.auto_spawn_students):
            gaps.append(replace(gap, decision="propose", reason=f"{gap.reason}; a person decides: tutelage gaps spawn"))
            continue
        if refusal is None and chosen >= settings.max_students:
            refusal = f"{settings.max_students} gaps of this cycle are worth more"
        if refusal is None and gap.training_seconds > left:
            refusal = f"about {gap.training_seconds:.0f} core-seconds of training are needed, {max(left, 0):.0f} are left of today's"
        if refusal is None:
            chosen, left = chosen + 1, left - gap.training_seconds
        gaps.append(replace(gap, decision="wait", reason=refusal) if refusal else gap)
    return gaps


def _measured(traffic: Traffic, settings: EvolveSettings, tried: Tried | None, everything: int) -> Gap:
    """The domain's figures, as if it were chosen."""
    failed, escalated = wilson(traffic.failed, traffic.requests), wilson(traffic.escalated, traffic.requests)
    per_day = traffic.cost_microusd / max(traffic.days, 1e-9)
    learnability = _learnability(settings, tried)
    seconds = tried.core_seconds if tried and tried.core_seconds else settings.training_seconds
    saving = per_day * failed.rate * learnability
    recall = wilson(traffic.recalled.wins, traffic.recalled.n)
    knowledge = recall.lo >= settings.recall_from
    told = f"{failed.rate:.0%} of {traffic.requests} requests needed the teacher and cost ${traffic.cost_microusd / 1e6:.4f}"
    return Gap(
        domain=traffic.domain,
        requests=traffic.requests,
        per_day=traffic.requests / max(traffic.days, 1e-9),
        share=traffic.requests / everything,
        failure_rate=failed.rate,
        failure_95=(failed.lo, failed.hi),
        escalation_rate=escalated.rate,
        escalation_95=(escalated.lo, escalated.hi),
        cost_microusd=traffic.cost_microusd,
        cost_per_day_microusd=per_day,
        learnability=learnability,
        kind="knowledge" if knowledge else "skill",
        recalled=traffic.recalled,
        training_seconds=seconds,
        priority=saving / seconds,
        decision="train",
        reason=f"{told}; {_recalled(traffic)}" if knowledge else told,
    )


def _learnability(settings: EvolveSettings, tried: Tried | None) -> float:
    if tried is None or (tried.learnable and tried.accuracy is None):
        return settings.untried_share
    return max(tried.accuracy or 0.0, HOPELESS) if tried.learnable else HOPELESS


def _recalled(traffic: Traffic) -> str:
    return f"the most similar earlier answer was right {traffic.recalled.wins} of {traffic.recalled.n} times: knowledge, which is on record"


def _refusal(domain: Traffic, settings: EvolveSettings, tried: Tried | None) -> str | None:
    rate = domain.failed / max(domain.requests, 1)
    if tried and tried.requests and domain.known < settings.retry_growth * tried.requests:
        needed = round(settings.retry_growth * tried.requests)
        return f"its newest student saw {tried.requests} requests; another is tried from {needed}, there are {domain.known}"
    if domain.requests < settings.min_requests:
        return f"{domain.requests} requests are too few to learn from; {settings.min_requests} are needed"
    if rate < settings.min_failure_rate:
        return f"cheap models already answer {1 - rate:.0%}; a student is worth it from {settings.min_failure_rate:.0%} failures"
    return None
