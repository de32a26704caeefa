"""/admin/v1/usage and /admin/v1/billing, as JSON or CSV, and /admin/v1/gaps. It refuses to know how they are counted (`stores/usage.py`,
`gaps.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, cast

from fastapi import Response

from tutelage import gaps
from tutelage.evolution.gaps import EvolveSettings
from tutelage.gateway import limits
from tutelage.gateway.admin import shapes
from tutelage.gateway.admin.door import Call, Route, as_csv
from tutelage.settings import load
from tutelage.stores import tenants, usage
from tutelage.stores.usage import By, Question


async def use(call: Call) -> shapes.Usage | Response:
    """Requests, tokens and cost by tenant, key, model, domain and day; for a tenant's key, its own."""
    asked: shapes.UsageQuery = call.query
    question = Question(
        tuple(dict.fromkeys(cast(Sequence[By], asked.by.split(",") if asked.by else ()))),
        tenant_id=await call.tenant_asked_for("usage.read", asked.tenant),
        key_id=asked.key,
        model=asked.model,
        domain=asked.domain,
        first_day=asked.first_day,
        last_day=asked.last_day,
    )
    if asked.format == "csv":
        return as_csv(question.columns, usage.each(call.pool, question), name="usage")
    rows = await usage.report(call.pool, question, limit=asked.limit + 1, offset=asked.offset)
    return shapes.Usage(data=[shapes.UsageRow(**row) for row in rows[: asked.limit]], has_more=len(rows) > asked.limit)


async def bill(call: Call) -> shapes.Bills | Response:
    """What each tenant owes for a month; for a tenant's key, its own bill."""
    asked: shapes.BillingQuery = call.query
    month = asked.month or f"{datetime.now(UTC):%Y-%m}"
    tenant_id = await call.tenant_asked_for("billing.read", asked.tenant)
    rows = await usage.bills(call.pool, month=date.fromisoformat(f"{month}-01"), tenant_id=tenant_id)
    bills = [_bill(month, row) for row in rows]
    if asked.format == "csv":
        return as_csv(tuple(shapes.Bill.model_fields), _each(bills), name=f"billing-{month}")
    return shapes.Bills(data=bills)


def _bill(month: str, row: Mapping[str, Any]) -> shapes.Bill:
    agreed = limits.agreed(row["tier"], row["limits"])
    micro = row["cost_microusd"]
    return shapes.Bill(
        month=month,
        cost_usd=f"{micro // 1_000_000}.{micro % 1_000_000:06d}",
        spend_limit_microusd=agreed.spend_per_month_microusd,
        **{name: row[name] for name in shapes.Bill.model_fields if name in row},
    )


async def _each(bills: Sequence[shapes.Bill]) -> AsyncIterator[Mapping[str, Any]]:
    for one in bills:
        yield one.model_dump()


async def open_gaps(call: Call) -> shapes.Gaps:
    """Where the teacher is needed often and dearly, as of now, and what a cycle would decide on it; for a tenant's key, its own."""
    asked: shapes.GapsQuery = call.query
    tenant_id = await call.tenant_asked_for("usage.read", asked.tenant)
    known = [tenant.id for tenant in await tenants.list_tenants(call.pool)] if tenant_id is None else [tenant_id]
    rows = await gaps.now(call.pool, load(EvolveSettings, call.state.config_dir), known)
    return shapes.Gaps(data=[shapes.Gap(**row) for row in rows])


ROUTES = (
    Route("GET", "/gaps", "usage.read", open_gaps, shapes.Gaps, query=shapes.GapsQuery),
    Route("GET", "/usage", "usage.read", use, shapes.Usage, query=shapes.UsageQuery, csv=True),
    Route("GET", "/billing", "billing.read", bill, shapes.Bills, query=shapes.BillingQuery, csv=True),
)
