"""What a tenant and each of its keys may use: the plan of its tier, what was agreed otherwise, and the key's own share.

Pure records. It refuses to know how much was used (`admission.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from tutelage.errors import Forbidden, InvalidRequest
from tutelage.records import Strategy
from tutelage.routing.strategies import BASIC as BASIC_STRATEGIES
from tutelage.routing.strategies import STRATEGIES
from tutelage.settings import Strict, whole

DEFAULT: Strategy = "quality"
MOST = 10**15  # of any limit: what a double holds exactly, as Valkey's scripts count in doubles


Some = Annotated[int, Field(ge=0, le=MOST), BeforeValidator(whole)]
Positive = Annotated[int, Field(ge=1, le=MOST), BeforeValidator(whole)]


class Limits(Strict):
    """None means no limit. Spend is in micro-dollars of a UTC month; a day is a UTC day. A cache hit counts as a query."""

    queries_per_day: Some | None = None
    concurrent: Positive | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    spend_per_month_microusd: Some | None = None


class Holdings(Strict):
    """What a tenant may have at once, None meaning no limit: students (`models`), and bytes of prompts and answers that are kept."""

    models: Some | None = None
    storage_bytes: Some | None = None


class Agreement(Limits, Holdings):
    """What may be agreed with a tenant beside its plan. A key has `Limits` alone."""


@dataclass(frozen=True)
class Plan:
    """A tier: its limits, how many students it may have, how much it may keep, and what it may use."""

    limits: Limits
    models: int
    storage_bytes: int
    features: tuple[str, ...]


BASIC = ("basic",)
ADVANCED = (*BASIC, "advanced-routing", "custom-training")
PLANS: Mapping[str, Plan] = {
    "free": Plan(Limits(queries_per_day=1_000, concurrent=5, requests_per_minute=60), 3, 100_000_000, BASIC),
    "pro": Plan(Limits(queries_per_day=50_000, concurrent=50, requests_per_minute=3_000), 20, 10_000_000_000, ADVANCED),
    "enterprise": Plan(Limits(queries_per_day=1_000_000, concurrent=1_000), 100, 1_000_000_000_000, (*ADVANCED, "dedicated-replicas")),
}


def strategies(tier: str) -> frozenset[Strategy]:
    """How the requests of a tenant of this tier may be answered. Raises InvalidRequest for an unknown tier."""
    if tier not in PLANS:
        raise InvalidRequest(f"tier {tier!r} is unknown; allowed: {', '.join(PLANS)}", param="tier")
    return frozenset(STRATEGIES) if "advanced-routing" in PLANS[tier].features else BASIC_STRATEGIES


def check_strategy(strategy: Strategy, allowed: frozenset[Strategy], *, param: str) -> None:
    """Raises Forbidden, telling what is allowed."""
    if strategy not in allowed:
        raise Forbidden(
            f"strategy {strategy!r} needs advanced routing, a feature of the plans pro and enterprise; this tenant may use: "
            f"{', '.join(sorted(allowed))}",
            param=param,
        )


def agreed(tier: str, overrides: Mapping[str, Any]) -> Limits:
    """The limits of a tenant: its tier's, but for what was agreed otherwise (a null there lifts a limit)."""
    own = {name: value for name, value in overrides.items() if name in Limits.model_fields}
    return Limits.model_validate(PLANS[tier].limits.model_dump() | own)


def holdings(tier: str, overrides: Mapping[str, Any]) -> Holdings:
    """What a tenant may have at once: as its tier says, but for what was agreed otherwise."""
    plan = {"models": PLANS[tier].models, "storage_bytes": PLANS[tier].storage_bytes}
    return Holdings.model_validate(plan | {name: value for name, value in overrides.items() if name in Holdings.model_fields})


def check(overrides: Mapping[str, Any], kind: type[Limits] = Limits) -> dict[str, Any]:
    """Overrides as they may be stored: of a key, or of a tenant (`Agreement`). Raises InvalidRequest naming what is unknown or wrong."""
    try:
        checked = kind.model_validate(dict(overrides))
    except ValidationError as broken:
        first = broken.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"limit {where}: {first['msg']}; known limits: {', '.join(kind.model_fields)}", param=where) from broken
    return {name: getattr(checked, name) for name in overrides}
