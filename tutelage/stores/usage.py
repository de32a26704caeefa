"""What the ledger amounts to: usage by tenant, key, model, domain and day, and each tenant's bill of a month. Reads only.

It refuses to know who may see it and in which format.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal

from tutelage.stores.database import Pool

By = Literal["tenant", "key", "model", "domain", "day"]
COLUMNS: dict[By, tuple[str, str]] = {
    "tenant": ("tenant_id", "tenant_id"),
    "key": ("key_id", "key_id"),
    "model": ("model", "model"),
    "domain": ("domain", "coalesce(domain, '')"),
    "day": ("day", "to_char(created_at at time zone 'UTC', 'YYYY-MM-DD')"),
}
SUMS = """
    count(*) filter (where endpoint <> 'shadow')::int as requests, count(*) filter (where cache like 'hit%')::int as cached,
    coalesce(sum(prompt_tokens), 0)::bigint as prompt_tokens, coalesce(sum(completion_tokens), 0)::bigint as completion_tokens,
    coalesce(sum(cost_microusd), 0)::bigint as cost_microusd
"""
SUMMED = ("requests", "cached", "prompt_tokens", "completion_tokens", "cost_microusd")
PREFETCH = 500


@dataclass(frozen=True)
class Question:
    """Which part of the ledger, grouped how. Days are UTC and both belong to it; None: whatever there is."""

    by: tuple[By, ...] = ("tenant", "key", "model", "domain", "day")
    tenant_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    domain: str | None = None
    first_day: date | None = None
    last_day: date | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (*(COLUMNS[by][0] for by in self.by), *SUMMED)


async def report(pool: Pool, question: Question, *, limit: int | None = None, offset: int = 0) -> list[dict[str, Any]]:
    """Rows of `question.columns`, oldest day first."""
    statement, values = _statement(question)
    return [
        dict(row) for row in await pool.fetch(f"{statement} limit ${len(values) + 1} offset ${len(values) + 2}", *values, limit, offset)
    ]


async def each(pool: Pool, question: Question) -> AsyncIterator[dict[str, Any]]:
    """As `report`, all of it, never more than a few hundred rows in memory."""
    statement, values = _statement(question)
    async with pool.acquire() as connection, connection.transaction(readonly=True):
        async for row in connection.cursor(statement, *values, prefetch=PREFETCH):
            yield dict(row)


async def bills(pool: Pool, *, month: date, tenant_id: str | None) -> list[dict[str, Any]]:
    """One row a tenant that was billed in the UTC month of `month`, or is there now; `estimated`: requests whose provider told no usage,
    `lost`: those billed at what they had reserved because their worker died."""
    first = datetime(month.year, month.month, 1, tzinfo=UTC)
    rows = await pool.fetch(
        f"""
        select t.id as tenant_id, t.name, t.tier, t.status, t.limits, {SUMS}, count(*) filter (where tokens_estimated)::int as estimated,
            count(*) filter (where route = 'lost')::int as lost, count(request_id)::int as billed,
            count(*) filter (where endpoint = 'shadow')::int as shadows
        from tenants t
        left join interactions i on i.tenant_id = t.id and i.created_at >= $1 and i.created_at < $2
        where ($3::text is null or t.id = $3)
        group by t.id order by t.created_at, t.id
        """,  # noqa: S608 - a constant
        first,
        (first + timedelta(days=32)).replace(day=1),
        tenant_id,
    )
    return [{**row, "requests": row["billed"] - row["shadows"]} for row in rows if row["billed"] or row["status"] != "deleted"]


def _statement(question: Question) -> tuple[str, list[Any]]:
    asked: list[tuple[str, Any]] = [
        ("tenant_id = {}", question.tenant_id),
        ("key_id = {}", question.key_id),
        ("model = {}", question.model),
        ("coalesce(domain, '') = {}", question.domain),
        ("created_at >= {}", _midnight(question.first_day)),
        ("created_at < {}", _midnight(question.last_day, days=1)),
    ]
    given = [(clause, value) for clause, value in asked if value is not None]
    where = " and ".join(clause.format(f"${place}") for place, (clause, _) in enumerate(given, start=1)) or "true"
    groups = [COLUMNS[by] for by in question.by]
    names = ", ".join(f"{expression} as {name}" for name, expression in groups)
    # the day first, so that what is added while somebody turns pages comes last
    order = sorted((name for name, _ in groups), key=lambda name: (name != "day", [c for c, _ in COLUMNS.values()].index(name)))
    grouped = f"group by {', '.join(str(place) for place in range(1, len(groups) + 1))} order by {', '.join(order)}" if groups else ""
    statement = f"select {names}{', ' if groups else ''}{SUMS} from interactions where {where} {grouped}"  # noqa: S608 - constants
    return statement, [value for _, value in given]


def _midnight(day: date | None, *, days: int = 0) -> datetime | None:
    return None if day is None else datetime.combine(day + timedelta(days=days), time(tzinfo=UTC))
