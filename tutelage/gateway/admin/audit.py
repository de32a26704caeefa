"""/admin/v1/audit: read a chain, check it, and take its signed heads away. It refuses to know how links are made (`stores/audit.py`)."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from tutelage.errors import AuditBroken
from tutelage.gateway.admin import shapes
from tutelage.gateway.admin.door import Call, Route
from tutelage.stores import audit


async def listing(call: Call) -> shapes.Links:
    """The newest links of a chain, newest first."""
    asked: shapes.AuditQuery = call.query
    chain = await call.tenant_asked_for("audit.read", asked.tenant) or audit.OPERATOR
    rows = await audit.newest(call.pool, chain, limit=asked.limit + 1, before=asked.before)
    return shapes.Links(data=[shapes.Link(**row) for row in rows[: asked.limit]], has_more=len(rows) > asked.limit)


async def verify(call: Call) -> shapes.Verified:
    """Check a chain, or all, from its first link to its exported heads, and against the ledger."""
    asked: shapes.ChainQuery = call.query
    chain = await call.tenant_asked_for("audit.read", asked.tenant)
    try:
        exported = await asyncio.to_thread(call.state.heads.read)
    except AuditBroken as broken:
        return shapes.Verified(
            whole=False, links=0, broken=shapes.Verified.Break(tenant_id=chain or "", sequence=None, reason=broken.message)
        )
    checked, found = await audit.verify(call.pool, exported, tenant_id=chain)
    return shapes.Verified(whole=found is None, links=checked, broken=shapes.Verified.Break(**asdict(found)) if found else None)


async def heads(call: Call) -> shapes.Heads:
    """The newest signed head of each chain, to be kept elsewhere."""
    asked: shapes.ChainQuery = call.query
    chain = await call.tenant_asked_for("audit.read", asked.tenant)
    newest = await asyncio.to_thread(call.state.heads.newest)
    shown = [shapes.Head(**head) for tenant_id, head in sorted(newest.items()) if chain in (None, tenant_id)]
    return shapes.Heads(public_key=call.state.heads.public_text, data=shown)


ROUTES = (
    Route("GET", "/audit", "audit.read", listing, shapes.Links, query=shapes.AuditQuery),
    Route("GET", "/audit/verify", "audit.read", verify, shapes.Verified, query=shapes.ChainQuery),
    Route("GET", "/audit/heads", "audit.read", heads, shapes.Heads, query=shapes.ChainQuery),
)
