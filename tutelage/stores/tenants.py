"""Tenants and their keys in the database. It refuses to know how a key is minted or checked (`gateway/keys.py`)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from tutelage.errors import InvalidRequest, NotFound
from tutelage.records import Key, Tenant
from tutelage.stores.database import Pool

TIERS = ("free", "pro", "enterprise")
TENANT = "id, name, tier, status, limits, on_disconnect, bodies, retention_days, cache_seconds, erasures"
KEY = "id, tenant_id, role, hash, expires_at, revoked_at, models, limits"
CHANGEABLE = ("tier", "status", "limits", "on_disconnect", "bodies", "retention_days", "cache_seconds")


async def bump(connection: Any) -> None:
    """Tell every gateway worker that its snapshot is out of date."""
    await connection.execute("update epochs set value = value + 1 where topic = 'gateway'")


async def create_tenant(pool: Pool, tenant: Tenant) -> None:
    """Raises InvalidRequest for an unknown tier or a name that is taken."""
    if tenant.tier not in TIERS:
        raise InvalidRequest(f"tier {tenant.tier!r} is unknown; allowed: {', '.join(TIERS)}", param="tier")
    async with pool.acquire() as connection, connection.transaction():
        created = await connection.fetchval(
            "insert into tenants (id, name, tier) values ($1, $2, $3) on conflict (name) do nothing returning id",
            tenant.id,
            tenant.name,
            tenant.tier,
        )
        if created is None:
            raise InvalidRequest(f"a tenant named {tenant.name!r} exists; choose another name", param="name")
        await bump(connection)


async def list_tenants(pool: Pool) -> list[Tenant]:
    rows = await pool.fetch(f"select {TENANT} from tenants order by created_at, id")  # noqa: S608 - constant
    return [Tenant(**row) for row in rows]


async def find_tenant(pool: Pool, name_or_id: str) -> Tenant:
    """Raises NotFound, listing what exists."""
    tenants = await list_tenants(pool)
    for tenant in tenants:
        if name_or_id in (tenant.id, tenant.name):
            return tenant
    known = ", ".join(t.name for t in tenants) or "none yet: tutelage tenants create NAME"
    raise NotFound(f"no tenant {name_or_id!r}; known: {known}")


async def change_tenant(pool: Pool, tenant_id: str, column: str, value: Any) -> None:
    """Set one of CHANGEABLE; every gateway worker knows within its snapshot's age. Raises ValueError for another column."""
    if column not in CHANGEABLE:
        raise ValueError(f"{column!r} of a tenant cannot be changed; changeable: {', '.join(CHANGEABLE)}")
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(f"update tenants set {column} = $2 where id = $1", tenant_id, value)  # noqa: S608 - one of CHANGEABLE
        await bump(connection)


async def add_key(pool: Pool, key: Key) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "insert into keys (id, tenant_id, role, hash, expires_at, models, limits) values ($1, $2, $3, $4, $5, $6, $7)",
            key.id,
            key.tenant_id,
            key.role,
            key.hash,
            key.expires_at,
            key.models,
            dict(key.limits),
        )
        await bump(connection)


async def list_keys(pool: Pool) -> list[Key]:
    rows = await pool.fetch(f"select {KEY} from keys order by created_at, id")  # noqa: S608 - constant
    return [Key(**row) for row in rows]


async def find_key(pool: Pool, key_id: str) -> Key:
    """Raises NotFound."""
    for key in await list_keys(pool):
        if key.id == key_id:
            return key
    raise NotFound(f"no key {key_id!r}; list them with: tutelage keys list")


async def end_key(pool: Pool, key_id: str, *, at: datetime, revoke: bool) -> Key:
    """Revoke a key now, or let it expire `at` (a rotation's overlap). Raises NotFound."""
    column = "revoked_at" if revoke else "expires_at"
    async with pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(
            f"update keys set {column} = $2 where id = $1 returning {KEY}",  # noqa: S608 - one of two literals above
            key_id,
            at,
        )
        if row is None:
            raise NotFound(f"no key {key_id!r}; list them with: tutelage keys list")
        await bump(connection)
    return Key(**row)
