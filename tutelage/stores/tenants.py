"""Tenants and their keys in the database; whatever changes one is told in the audit chain in the same transaction.

It refuses to know how a key is minted or checked (`gateway/keys.py`) and who may change what (`gateway/roles.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tutelage.errors import Conflict, InvalidRequest, NotFound
from tutelage.records import Key, Tenant
from tutelage.stores import audit
from tutelage.stores.database import Pool

TIERS = ("free", "pro", "enterprise")
CHANGEABLE = (
    "tier", "status", "limits", "on_disconnect", "bodies", "retention_days", "cache_seconds", "semantic_error_budget", "strategy",
    "max_cost_microusd", "min_confidence", "training",
)  # fmt: skip
TENANT = f"id, name, {', '.join(CHANGEABLE)}, erasures"
KEY = "id, tenant_id, role, hash, expires_at, revoked_at, models, limits, routes"
SYSTEM = "system"  # the actor where nobody in particular acts: a demo, a test, the Python API


async def bump(connection: Any) -> None:
    """Tell every gateway worker that its snapshot is out of date."""
    await connection.execute("update epochs set value = value + 1 where topic = 'gateway'")


async def create_tenant(pool: Pool, tenant: Tenant, *, key: Key | None = None, actor: str = SYSTEM) -> None:
    """With its first key, if one is given. Raises InvalidRequest for an unknown tier, Conflict for a name that is taken."""
    if tenant.tier not in TIERS:
        raise InvalidRequest(f"tier {tenant.tier!r} is unknown; allowed: {', '.join(TIERS)}", param="tier")
    given = {name: getattr(tenant, name) for name in CHANGEABLE if name not in ("tier", "status")} | {"limits": dict(tenant.limits)}
    columns = ["id", "name", "tier", *given]
    async with pool.acquire() as connection, connection.transaction():
        created = await connection.fetchval(
            f"insert into tenants ({', '.join(columns)}) values ({', '.join(f'${place}' for place in range(1, len(columns) + 1))}) "  # noqa: S608 - names of ours
            "on conflict (name) where status <> 'deleted' do nothing returning id",
            tenant.id,
            tenant.name,
            tenant.tier,
            *given.values(),
        )
        if created is None:
            raise Conflict(f"a tenant named {tenant.name!r} exists; choose another name", param="name")
        told = {"name": tenant.name, "tier": tenant.tier, **given}
        await audit.append(connection, tenant_id=tenant.id, actor=actor, action="tenant.create", subject=tenant.id, detail=told)
        if key is not None:
            await _insert_key(connection, key, actor=actor)
        await bump(connection)


async def list_tenants(pool: Pool, *, deleted: bool = False) -> list[Tenant]:
    """All but those that were deleted, unless they are asked for too."""
    rows = await pool.fetch(
        f"select {TENANT} from tenants where $1 or status <> 'deleted' order by created_at, id",  # noqa: S608 - constant
        deleted,
    )
    return [Tenant(**row) for row in rows]


async def find_tenant(pool: Pool, name_or_id: str) -> Tenant:
    """Raises NotFound, listing what exists."""
    tenants = await list_tenants(pool)
    for tenant in tenants:
        if name_or_id in (tenant.id, tenant.name):
            return tenant
    known = ", ".join(t.name for t in tenants) or "none yet: tutelage tenants create NAME"
    raise NotFound(f"no tenant {name_or_id!r}; known: {known}")


async def change_tenant(pool: Pool, tenant_id: str, column: str, value: Any, *, actor: str = SYSTEM) -> None:
    """Set one of CHANGEABLE, as `change`."""
    await change(pool, tenant_id, {column: value}, actor=actor)


async def change(pool: Pool, tenant_id: str, changes: Mapping[str, Any], *, actor: str) -> Tenant:
    """Set some of CHANGEABLE at once; every gateway worker knows within its snapshot's age.

    Raises:
        NotFound: no such tenant.
        ValueError: for another column.
    """
    unknown = sorted(set(changes) - set(CHANGEABLE))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} of a tenant cannot be changed; changeable: {', '.join(CHANGEABLE)}")
    sets = "".join(f", {column} = ${place}" for place, column in enumerate(changes, start=2))
    async with pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(
            f"update tenants set id = id{sets} where id = $1 and status <> 'deleted' returning {TENANT}",  # noqa: S608 - CHANGEABLE
            tenant_id,
            *changes.values(),
        )
        if row is None:
            raise NotFound(f"no tenant {tenant_id!r}")
        await audit.append(connection, tenant_id=tenant_id, actor=actor, action="tenant.change", subject=tenant_id, detail=changes)
        await bump(connection)
    return Tenant(**row)


async def delete_tenant(pool: Pool, tenant_id: str, *, at: datetime, actor: str) -> None:
    """End it and all its keys; its ledger and its chain stay. What it asked and was answered is for `bodies.erase` and the sweeps.

    Raises:
        NotFound: no such tenant.
    """
    async with pool.acquire() as connection, connection.transaction():
        name = await connection.fetchval(
            "update tenants set status = 'deleted' where id = $1 and status <> 'deleted' returning name", tenant_id
        )
        if name is None:
            raise NotFound(f"no tenant {tenant_id!r}")
        ended = await connection.fetch(
            "update keys set revoked_at = $2 where tenant_id = $1 and revoked_at is null returning id", tenant_id, at
        )
        await connection.execute("delete from domains where tenant_id = $1", tenant_id)  # they quote its prompts
        await connection.execute("delete from semantic_labels where tenant_id = $1", tenant_id)
        told = {"name": name, "keys": sorted(row["id"] for row in ended)}
        await audit.append(connection, tenant_id=tenant_id, actor=actor, action="tenant.delete", subject=tenant_id, detail=told)
        await bump(connection)


async def add_key(pool: Pool, key: Key, *, actor: str = SYSTEM) -> None:
    """Raises NotFound: its tenant is gone."""
    async with pool.acquire() as connection, connection.transaction():
        await _insert_key(connection, key, actor=actor)
        await bump(connection)


async def replace_key(pool: Pool, old_id: str, new: Key, *, ends: datetime, actor: str) -> Key:
    """A new key beside an old one, which ends at `ends` or when it would have ended anyway; the old one as it is now.

    Raises:
        NotFound: there is no such key, or its tenant is gone.
    """
    async with pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(f"update keys set expires_at = least(expires_at, $2) where id = $1 returning {KEY}", old_id, ends)  # noqa: S608
        if row is None:
            raise _no_key(old_id)
        await _insert_key(connection, new, actor=actor, instead_of=old_id, overlap_until=row["expires_at"])
        await bump(connection)
    return Key(**row)


async def list_keys(pool: Pool) -> list[Key]:
    rows = await pool.fetch(f"select {KEY} from keys order by created_at, id")  # noqa: S608 - constant
    return [Key(**row) for row in rows]


async def find_key(pool: Pool, key_id: str) -> Key:
    """Raises NotFound."""
    row = await pool.fetchrow(f"select {KEY} from keys where id = $1", key_id)  # noqa: S608 - constant
    if row is None:
        raise _no_key(key_id)
    return Key(**row)


async def end_key(pool: Pool, key_id: str, *, at: datetime, revoke: bool, actor: str = SYSTEM) -> Key:
    """Revoke a key now, or let it expire `at`; one that was revoked stays so since then. Raises NotFound."""
    column, action = ("revoked_at", "key.revoke") if revoke else ("expires_at", "key.expire")
    async with pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(
            f"update keys set {column} = least({column}, $2) where id = $1 returning {KEY}",  # noqa: S608 - one of two literals above
            key_id,
            at,
        )
        if row is None:
            raise _no_key(key_id)
        told = {column: row[column]}
        await audit.append(connection, tenant_id=row["tenant_id"], actor=actor, action=action, subject=key_id, detail=told)
        await bump(connection)
    return Key(**row)


async def stored_bytes(pool: Pool) -> dict[str, int]:
    """Bytes of kept prompts and answers by tenant, after summing up what has changed since the last look."""
    await pool.execute(
        """
        with gone as (delete from storage_changes returning tenant_id, bytes)
        insert into storage as s select tenant_id, sum(bytes) from gone group by tenant_id order by tenant_id
        on conflict (tenant_id) do update set bytes = s.bytes + excluded.bytes
        """
    )
    return {row["tenant_id"]: row["bytes"] for row in await pool.fetch("select tenant_id, bytes from storage")}


async def _insert_key(connection: Any, key: Key, *, actor: str, **told: Any) -> None:
    # a tenant that is being deleted and one of its keys being made wait for one another
    if key.tenant_id is not None and not await connection.fetchval(
        "select true from tenants where id = $1 and status <> 'deleted' for share", key.tenant_id
    ):
        raise NotFound(f"no tenant {key.tenant_id!r}")
    await connection.execute(
        "insert into keys (id, tenant_id, role, hash, expires_at, models, limits, routes) values ($1, $2, $3, $4, $5, $6, $7, $8)",
        key.id,
        key.tenant_id,
        key.role,
        key.hash,
        key.expires_at,
        key.models,
        dict(key.limits),
        key.routes,
    )
    scopes = {name: getattr(key, name) for name in ("role", "models", "routes", "limits", "expires_at")}
    action = "key.rotate" if "instead_of" in told else "key.create"
    await audit.append(connection, tenant_id=key.tenant_id, actor=actor, action=action, subject=key.id, detail={**scopes, **told})


def _no_key(key_id: str) -> NotFound:
    return NotFound(f"no key {key_id!r}; list them with: tutelage keys list")
