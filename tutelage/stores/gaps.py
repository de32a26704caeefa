"""The gap ledger: what each domain's traffic amounts to now, and what was decided on it in each cycle.

Counted in the database when it is asked for, so what an interaction reveals is visible as soon as it is durable. It refuses to decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tutelage.evolution.evidence import Tally
from tutelage.evolution.gaps import Gap, Traffic, Tried
from tutelage.stores.database import Pool

LEAST_DAYS = 1 / 24  # traffic of some minutes says nothing of a day: it counts as an hour's

COUNTED = """
    select i.domain, count(*)::int as known,
        count(*) filter (where fresh)::int as requests,
        count(*) filter (where fresh and (by_teacher or score < 0.5))::int as failed,
        count(*) filter (where fresh and by_teacher and tried)::int as escalated,
        coalesce(sum(i.cost_microusd) filter (where fresh), 0)::bigint as cost_microusd,
        coalesce(extract(epoch from now() - min(i.created_at) filter (where fresh)), 0)::float8 / 86400 as days
    from (
        select w.*, (s.since is null or w.created_at > s.since) as fresh,
            exists (select 1 from attempts a where a.request_id = w.request_id) as tried,
            w.tier = 'teacher' and not exists (
                select from attempts a where a.request_id = w.request_id and a.accepted and a.model = w.model) as by_teacher,
            (select f.score from feedback f where f.request_id = w.request_id order by f.id desc limit 1) as score
        from (
            select i.request_id, i.domain, i.tier, i.model, i.cache, i.cost_microusd, i.created_at
            from interactions i join bodies b using (request_id)
            where i.tenant_id = $1 and i.endpoint = 'chat' order by i.created_at desc, i.request_id limit $2
        ) w left join unnest($3::text[], $4::timestamptz[]) as s (domain, since) on s.domain = w.domain
        where (w.domain is not null or $5) and w.cache not like 'hit%'
    ) i group by i.domain order by i.domain
"""


async def traffic(
    pool: Pool, tenant_id: str, *, rows: int, since: Mapping[str, datetime], recalled: Mapping[str, Tally], unplaced: bool = False
) -> list[Traffic]:
    """What each domain saw among the tenant's newest `rows` interactions, new ones counted from `since` on (by domain). `unplaced`: also,
    under the empty name, those that fit no domain."""
    found = await pool.fetch(COUNTED, tenant_id, rows, list(since), list(since.values()), unplaced)
    return [
        Traffic(
            r["domain"] or "", r["known"], r["requests"], r["failed"], r["cost_microusd"], r["escalated"], max(r["days"], LEAST_DAYS),
            recalled.get(r["domain"], Tally()),
        )
        for r in found
    ]  # fmt: skip


def newest(versions: Sequence[Mapping[str, Any]], tenant_id: str) -> dict[str, Mapping[str, Any]]:
    """The newest version of each domain that a gate has judged. Of one still in training, abandoned with its cycle or in quarantine nothing
    was learned that holds, so its requests are there to learn from."""
    unlearned = ("training", "abandoned", "quarantined")
    return {v["domain"]: v for v in versions if v["tenant_id"] == tenant_id and v["status"] not in unlearned}


def tried(version: Mapping[str, Any]) -> Tried:
    """What a judged version tells of its domain."""
    told = version["evidence"] or {}
    return Tried(int(told.get("requests", 0)), bool(told.get("learnable", True)), told.get("accuracy"), told.get("core_seconds"))


async def trained_today(pool: Pool, tenant_id: str) -> float:
    """Core-seconds of training that the tenant's students took since midnight, UTC."""
    spent = await pool.fetchval(
        "select coalesce(sum((v.evidence ->> 'core_seconds')::float8), 0) from versions v join students s on s.name = v.student "
        "where s.tenant_id = $1 and v.created_at >= date_trunc('day', now() at time zone 'UTC') at time zone 'UTC'",
        tenant_id,
    )
    return float(spent)


async def keep(pool: Pool, cycle_id: str, tenant_id: str, gaps: Sequence[Gap]) -> None:
    """Note what a cycle found and decided."""
    await pool.executemany(
        "insert into gaps (cycle_id, tenant_id, domain, requests, failure_rate, cost_microusd, priority, decision, reason, detail) "
        "values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        [
            (cycle_id, tenant_id, g.domain, g.requests, g.failure_rate, g.cost_microusd, g.priority, g.decision, g.reason, g.to_dict())
            for g in gaps
        ],
    )


async def last_recalled(pool: Pool, tenant_id: str) -> dict[str, Tally]:
    """By domain, what the newest cycle measured of the baseline that answers from earlier answers."""
    rows = await pool.fetch(
        "select distinct on (g.domain) g.domain, g.detail -> 'recalled' as recalled from gaps g join cycles c on c.id = g.cycle_id "
        "where g.tenant_id = $1 and g.detail ? 'recalled' order by g.domain, c.started_at desc",
        tenant_id,
    )
    return {row["domain"]: Tally(**row["recalled"]) for row in rows}
