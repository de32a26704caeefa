"""/admin/v1/tenants: create, list, show, change, suspend, resume, erase and delete. It refuses to know who may."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tutelage import records
from tutelage.gateway import limits, tenancy
from tutelage.gateway.admin import shapes
from tutelage.gateway.admin.door import Call, Route
from tutelage.stores import bodies, registry, tenants

PLAN = ("tier", "limits")  # what an operator agreed with the tenant; the rest is the tenant's own business


async def create(call: Call) -> shapes.MadeTenant:
    """Create a tenant and its first key, which is shown this once."""
    asked: shapes.NewTenant = call.body
    wanted = records.Tenant(
        "",
        asked.name,
        asked.tier,
        limits=asked.limits.model_dump(exclude_unset=True),
        on_disconnect=asked.on_disconnect,
        bodies=asked.bodies,
        retention_days=asked.retention_days,
        cache_seconds=asked.cache_seconds,
        semantic_error_budget=asked.semantic_error_budget,
        strategy=asked.strategy,
        max_cost_microusd=asked.max_cost_microusd,
        min_confidence=asked.min_confidence,
        training=asked.training,
    )
    tenant, made = await tenancy.create_tenant(call.pool, call.pepper, wanted, maker=call.maker, now=datetime.now(UTC))
    return shapes.MadeTenant(tenant_id=tenant.id, key_id=made.key.id, key=made.text, tenant=_shown(tenant, {}, {}))


async def listing(call: Call) -> shapes.Tenants:
    """The tenants, in the order they were created; for a tenant's key, its own."""
    page: shapes.Page = call.query
    seen = [t for t in await tenants.list_tenants(call.pool) if call.by.tenant_id in (None, t.id)]
    ids = [tenant.id for tenant in seen]
    start = ids.index(page.after) + 1 if page.after in ids else 0 if page.after is None else len(ids)
    stored, students = await tenants.stored_bytes(call.pool), await registry.count_students(call.pool)
    shown = seen[start : start + page.limit]
    return shapes.Tenants(data=[_shown(tenant, stored, students) for tenant in shown], has_more=len(seen) > start + page.limit)


async def show(call: Call) -> shapes.Tenant:
    """One tenant, with what it may use and what it has."""
    assert call.tenant is not None
    return _shown(call.tenant, await tenants.stored_bytes(call.pool), await registry.count_students(call.pool))


async def change(call: Call) -> shapes.Tenant:
    """Change what is sent: its plan by operators only, what becomes of its texts and streams by itself too."""
    assert call.tenant is not None
    asked: shapes.TenantChange = call.body
    sent = asked.model_dump(exclude_unset=True)
    nullable = ("retention_days", "cache_seconds", "semantic_error_budget", "max_cost_microusd", "min_confidence")
    changes = {name: value for name, value in sent.items() if value is not None or name in nullable}
    if any(name in PLAN for name in changes):
        call.require("tenants.plan", of=call.tenant.id)
    return await _changed(call, changes)


async def suspend(call: Call) -> shapes.Tenant:
    """Refuse its requests from now on; its data is kept."""
    return await _changed(call, {"status": "suspended"})


async def resume(call: Call) -> shapes.Tenant:
    """Let a suspended tenant go on."""
    return await _changed(call, {"status": "active"})


async def erase(call: Call) -> shapes.Erased:
    """Erase what was asked and answered; the bill and the chain stay and still hold."""
    assert call.tenant is not None
    asked: shapes.Erasure = call.body
    erased = await bodies.erase(call.pool, call.tenant.id, actor=call.by.id, request_id=asked.request_id, before=asked.before)
    return shapes.Erased(interactions_erased=erased)


async def delete(call: Call) -> shapes.DeletedTenant:
    """End its keys and erase what it asked and was answered. Its bill and its chain stay."""
    assert call.tenant is not None
    erased = await tenancy.delete_tenant(call.pool, call.tenant, maker=call.maker, now=datetime.now(UTC))
    return shapes.DeletedTenant(id=call.tenant.id, interactions_erased=erased)


async def _changed(call: Call, changes: dict[str, Any]) -> shapes.Tenant:
    assert call.tenant is not None
    tenant = await tenancy.change_tenant(call.pool, call.tenant, changes, maker=call.maker)
    return _shown(tenant, await tenants.stored_bytes(call.pool), await registry.count_students(call.pool))


def _shown(tenant: records.Tenant, stored: dict[str, int], students: dict[str, int]) -> shapes.Tenant:
    has = limits.holdings(tenant.tier, tenant.limits)
    return shapes.Tenant(
        id=tenant.id,
        name=tenant.name,
        tier=tenant.tier,  # type: ignore[arg-type]
        status=tenant.status,  # type: ignore[arg-type]
        limits=limits.agreed(tenant.tier, tenant.limits),
        models=shapes.Held(used=students.get(tenant.id, 0), limit=has.models),
        storage_bytes=shapes.Held(used=stored.get(tenant.id, 0), limit=has.storage_bytes),
        features=list(limits.PLANS[tenant.tier].features),
        on_disconnect=tenant.on_disconnect,
        bodies=tenant.bodies,
        retention_days=tenant.retention_days,
        cache_seconds=tenant.cache_seconds,
        semantic_error_budget=tenant.semantic_error_budget,
        strategy=tenant.strategy,
        max_cost_microusd=tenant.max_cost_microusd,
        min_confidence=tenant.min_confidence,
        training=tenant.training,
    )


ROUTES = (
    Route("POST", "/tenants", "tenants.create", create, shapes.MadeTenant, body=shapes.NewTenant, status=201, faults=(409,)),
    Route("GET", "/tenants", "tenants.read", listing, shapes.Tenants, query=shapes.Page),
    Route("GET", "/tenants/{tenant}", "tenants.read", show, shapes.Tenant),
    Route("PATCH", "/tenants/{tenant}", "tenants.settings", change, shapes.Tenant, body=shapes.TenantChange),
    Route("POST", "/tenants/{tenant}/suspend", "tenants.suspend", suspend, shapes.Tenant, body=shapes.Nothing),
    Route("POST", "/tenants/{tenant}/resume", "tenants.suspend", resume, shapes.Tenant, body=shapes.Nothing),
    Route("POST", "/tenants/{tenant}/erase", "bodies.erase", erase, shapes.Erased, body=shapes.Erasure),
    Route("DELETE", "/tenants/{tenant}", "tenants.delete", delete, shapes.DeletedTenant),
)
