"""The gaps as of now: what the recorded traffic shows at this moment, and what a cycle would decide on it. Counted when it is asked for, so
that what an answered request reveals is there with its answer. It refuses to hold a rule (`evolution/gaps.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tutelage.evolution.gaps import EvolveSettings, Gap, measure
from tutelage.stores import gaps, registry
from tutelage.stores.database import Pool

SHOWN = (
    "domain", "requests", "per_day", "failure_rate", "failure_95", "escalation_rate", "escalation_95", "cost_microusd",
    "cost_per_day_microusd", "learnability", "kind", "training_seconds", "priority", "decision", "reason",
)  # fmt: skip


async def now(pool: Pool, settings: EvolveSettings, tenant_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Every gap of these tenants by what a second of training is expected to save; last, with domain None, what fits no domain yet."""
    versions = await registry.list_versions(pool)
    found: list[dict[str, Any]] = []
    for tenant_id in tenant_ids:
        newest = gaps.newest(versions, tenant_id)
        since = {domain: version["created_at"] for domain, version in newest.items()}
        recalled = await gaps.last_recalled(pool, tenant_id)
        traffic = await gaps.traffic(pool, tenant_id, rows=settings.window_rows, since=since, recalled=recalled, unplaced=True)
        tried = {domain: gaps.tried(version) for domain, version in newest.items()}
        spent = await gaps.trained_today(pool, tenant_id)
        measured = measure([t for t in traffic if t.domain], settings, tried=tried, spent_seconds=spent)
        measured += [_unplaced(gap) for gap in measure([t for t in traffic if not t.domain], settings, tried={})]
        for gap in measured:
            told = gap.to_dict()
            found.append({"tenant_id": tenant_id, **{name: told[name] for name in SHOWN}, "domain": gap.domain or None})
    return found


def _unplaced(gap: Gap) -> Gap:
    return replace(gap, decision="wait", reason=f"{gap.requests} requests fit no domain yet; the next cycle looks for new ones")
