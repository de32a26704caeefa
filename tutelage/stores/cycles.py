"""Cycles of each tenant: who runs one now, what has come since, what one that was cut off left, and what all of them brought.

A cycle is held by an advisory lock of PostgreSQL, which ends with its holder's connection: a killed process holds nothing, whatever its
rows say. It refuses to decide when a cycle is due.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from tutelage.errors import CycleRunning
from tutelage.evolution.timing import Seen
from tutelage.stores.database import Pool
from tutelage.stores.tenants import bump

LOCK = 707_014  # the first half of each lock's key, the second is the tenant's
LOOKS = 10  # PostgreSQL takes a moment to see that a holder was killed

SEEN = """
    select t.id, t.name, coalesce(f.started_at, t.created_at) as since, c.status = 'running' as open,
        coalesce(c.finished_at, c.started_at) as ended,
        (select count(*)::int from cycles l where l.tenant_id = t.id and l.started_at > coalesce(f.started_at, '-infinity')) as failures,
        (select count(*)::int from (
            select 1 from interactions i
            where i.tenant_id = t.id and i.endpoint = 'chat' and i.created_at > coalesce(f.started_at, '-infinity') limit $2
        ) n) as fresh,
        exists (
            select 1 from pg_locks k where k.locktype = 'advisory' and k.objsubid = 2 and k.granted and k.classid = $1::bigint::oid
                and k.objid = (hashtext(t.id)::bigint & 4294967295)::oid
                and k.database = (select oid from pg_database where datname = current_database())
        ) as held
    from tenants t
    left join lateral (
        select started_at from cycles where tenant_id = t.id and status = 'finished' order by started_at desc limit 1
    ) f on true
    left join lateral (select * from cycles where tenant_id = t.id order by started_at desc limit 1) c on true
    where t.status = 'active' and t.training = 'on' and t.bodies <> 'off' order by since, t.id
"""
HALVES = """
    update versions v set status = 'abandoned', reason = 'its cycle ended before a verdict took effect' from students s
    where s.name = v.student and s.tenant_id = $1 and v.status in ('training', 'waiting', 'challenger', 'student', 'ta')
        and not exists (select 1 from promotions p where p.student = v.student and p.version = v.version)
        and exists (select 1 from cycles c where c.id = v.cycle_id and c.status <> 'running')
"""


@asynccontextmanager
async def alone(pool: Pool, tenant_id: str) -> AsyncIterator[list[str]]:
    """Hold the tenant's cycle for the length of a block. Yields the ids of cycles that were cut off before; they are given up.

    A lost connection loses the lock too: then the task that holds it is cancelled, for somebody else may hold it from then on.

    Raises:
        CycleRunning: another process runs a cycle of this tenant.
    """
    async with pool.acquire() as connection:
        for _ in range(LOOKS):
            if await connection.fetchval("select pg_try_advisory_lock($1, hashtext($2))", LOCK, tenant_id):
                break
            await asyncio.sleep(0.1)
        else:
            raise CycleRunning(f"an evolution cycle of {tenant_id} is running; wait for it to end")
        holder = asyncio.current_task()

        def lost(_: Any) -> None:
            if holder is not None:
                holder.cancel("the cycle's lock was lost with its connection")

        connection.add_termination_listener(lost)
        try:
            yield await _give_up(connection, tenant_id)
        finally:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection.remove_termination_listener(lost)
                await connection.execute("select pg_advisory_unlock($1, hashtext($2))", LOCK, tenant_id)


async def _give_up(connection: Any, tenant_id: str) -> list[str]:
    async with connection.transaction():
        rows = await connection.fetch(
            "update cycles set status = 'failed', finished_at = now(), summary = $2 "
            "where tenant_id = $1 and status = 'running' returning id",
            tenant_id,
            {"students": {}, "note": "cut off"},
        )
        await connection.execute(HALVES, tenant_id)
        await bump(connection)
    return [row["id"] for row in rows]


async def clear_halves(pool: Pool, tenant_id: str) -> None:
    """Mark versions of ended cycles that no line of the ledger names as abandoned: what they learned from is there to be learned again."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(HALVES, tenant_id)
        await bump(connection)


async def seen(pool: Pool, *, interval: int | None) -> list[tuple[str, str, Seen]]:
    """Id, name and what is known of every tenant that learns, the one whose last finished cycle is longest ago first."""
    rows = await pool.fetch(SEEN, LOCK, max(interval or 1, 1))
    return [
        (r["id"], r["name"], Seen(r["fresh"], r["since"], r["held"], bool(r["open"]) and not r["held"], r["failures"], r["ended"]))
        for r in rows
    ]  # fmt: skip


async def last(pool: Pool) -> datetime:
    """When the newest cycle of all tenants began; long ago where there is none."""
    began: datetime = await pool.fetchval("select coalesce(max(started_at), timestamptz '1970-01-01') from cycles")
    return began


async def since(pool: Pool, moment: datetime) -> list[dict[str, Any]]:
    """Cycles begun after that moment, oldest first, each with the gaps it found, the most worthwhile first."""
    rows = await pool.fetch(
        "select c.id, c.tenant_id, c.status, c.started_at, coalesce(c.finished_at, now()) as finished_at, c.summary, "
        "(select coalesce(jsonb_agg(g.detail order by g.priority desc, g.domain), '[]') from gaps g where g.cycle_id = c.id) as gaps "
        "from cycles c where c.started_at > $1 order by c.started_at",
        moment,
    )
    return [dict(row) for row in rows]


@dataclass(frozen=True)
class Totals:
    """What evolution amounts to, all tenants together. `improvements`: versions that came to answer their domain; `distillations`: that
    were trained and examined, in `core_seconds`; `gain`: the sum, over the `gains` of them where both were measured, of the share of
    held-out items that was right after training less before it."""

    cycles: Mapping[str, int]
    promotions: Mapping[str, int]
    versions: Mapping[str, int]
    improvements: int
    distillations: int
    core_seconds: float
    gains: int
    gain: float


async def totals(pool: Pool) -> Totals:
    async def by(sql: str) -> dict[str, int]:
        return {row["label"]: row["n"] for row in await pool.fetch(sql)}

    row = await pool.fetchrow(
        "select (select count(distinct (student, version))::int from promotions where action in ('promote', 'keep')) as improvements, "
        "count(*) filter (where evidence ? 'core_seconds')::int as distillations, "
        "coalesce(sum((evidence ->> 'core_seconds')::float8), 0) as core_seconds, "
        "count(*) filter (where evidence ->> 'before' is not null)::int as gains, "
        "coalesce(sum((evidence ->> 'accuracy')::float8 - (evidence ->> 'before')::float8), 0) as gain from versions"
    )
    assert row is not None
    return Totals(
        await by("select status as label, count(*)::int as n from cycles group by status"),
        await by("select action as label, count(*)::int as n from promotions group by action"),
        await by("select status as label, count(*)::int as n from versions group by status"),
        **row,
    )
