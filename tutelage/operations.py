"""What operators ask and change: tenants, keys, students, gaps, spend. Works with or without a running `serve`.

It refuses to print; every operation returns rows or one record.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from tutelage.errors import InvalidRequest
from tutelage.fleet import engines, processes
from tutelage.gateway import keys, limits
from tutelage.records import Key, Tenant
from tutelage.settings import Home
from tutelage.stores import interactions, registry, tenants
from tutelage.stores.database import Pool, open_pool

Result = list[dict[str, Any]] | dict[str, Any]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@contextmanager
def database(home: Home) -> Iterator[str]:
    """This home's database URL; an embedded server started for the occasion is stopped again, unless a `serve` took it over."""
    was_running = engines.running_database(home)
    url = engines.start_database(home)
    try:
        yield url
    finally:
        if not was_running and processes.find(home, "serve") is None:
            engines.stop(home)


def run(home: Home, operation: str, arguments: argparse.Namespace) -> Result:
    """Run one operation by name. Raises TutelageError subclasses with a message for the operator."""

    async def connected(url: str) -> Result:
        pool = await open_pool(url, size=1)
        try:
            return await OPERATIONS[operation](pool, home, arguments)
        finally:
            await pool.close()

    with database(home) as url:
        return asyncio.run(connected(url))


async def create_tenant(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    return await add_tenant(pool, home.secret("pepper"), name=arguments.name, tier=arguments.tier)


async def add_tenant(pool: Pool, pepper: str, *, name: str, tier: str) -> dict[str, Any]:
    """A new tenant and its first key."""
    if not re.fullmatch(r"[\w .-]{1,64}", name):
        raise InvalidRequest(
            f"tenant name {name!r}: 1 to 64 letters, digits, spaces, dots, dashes or underscores are allowed", param="name"
        )
    tenant = Tenant(f"ten_{uuid.uuid4().hex[:16]}", name, tier)
    await tenants.create_tenant(pool, tenant)
    return {"tenant_id": tenant.id, **await _mint(pool, pepper, tenant.id, None)}


async def list_tenants(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    return [asdict(tenant) for tenant in await tenants.list_tenants(pool)]


async def change_tenant(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    """Suspend or resume a tenant, move it to another tier, agree other limits, or choose what a client that leaves does."""
    tenant = await tenants.find_tenant(pool, arguments.name)
    if arguments.limit is not None:
        await tenants.change_tenant(pool, tenant.id, "limits", {**tenant.limits, **_limits(arguments.limit)})
    for column in ("status", "tier", "on_disconnect"):
        if getattr(arguments, column) is not None:
            await tenants.change_tenant(pool, tenant.id, column, getattr(arguments, column))
    changed = await tenants.find_tenant(pool, tenant.id)
    return {**asdict(changed), "limits": limits.agreed(changed.tier, changed.limits).model_dump()}


def _limits(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=NUMBER` or `NAME=none` as limits. Raises InvalidRequest."""
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        found[name] = None if value == "none" else value
    return limits.check(found)


async def create_key(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    if bool(arguments.tenant) == bool(arguments.operator):
        raise InvalidRequest("give a tenant, or --operator ROLE, and not both: tutelage keys create TENANT")
    tenant_id = (await tenants.find_tenant(pool, arguments.tenant)).id if arguments.tenant else None
    ends = datetime.now(UTC) + _duration("--expires", arguments.expires) if arguments.expires else None
    own = _limits(arguments.limit or [])
    minted = await _mint(
        pool, home.secret("pepper"), tenant_id, arguments.operator, expires_at=ends, models=arguments.models, key_limits=own
    )
    return {"tenant_id": tenant_id, "role": arguments.operator, **minted, "expires_at": ends, "models": arguments.models, "limits": own}


def _duration(option: str, text: str) -> timedelta:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise InvalidRequest(f"{option} {text!r}: a number and one of s, m, h, d is expected, such as 1h")
    return timedelta(seconds=int(match[1]) * UNITS[match[2]])


async def rotate_key(pool: Pool, home: Home, arguments: argparse.Namespace) -> Result:
    now = datetime.now(UTC)
    ends = now + _duration("--overlap", arguments.overlap)
    old = await tenants.find_key(pool, arguments.key_id)
    if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
        raise InvalidRequest(f"key {old.id} was revoked or has expired; make a new one: tutelage keys create TENANT")
    # a key handed on is never more than it was: the same models, the same limits, the same end
    minted = await _mint(
        pool, home.secret("pepper"), old.tenant_id, old.role, expires_at=old.expires_at, models=old.models, key_limits=old.limits
    )
    ends = min(ends, old.expires_at or ends)
    await tenants.end_key(pool, old.id, at=ends, revoke=False)
    return {"tenant_id": old.tenant_id, **minted, "old_key_id": old.id, "old_key_ends": ends.isoformat()}


async def revoke_key(pool: Pool, _home: Home, arguments: argparse.Namespace) -> Result:
    key = await tenants.end_key(pool, arguments.key_id, at=datetime.now(UTC), revoke=True)
    return {"key_id": key.id, "revoked_at": str(key.revoked_at)}


async def list_keys(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    return [{k: v for k, v in asdict(key).items() if k != "hash"} for key in await tenants.list_keys(pool)]


async def list_students(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    shown = ("tenant_id", "domain", "student", "version", "status", "digest", "mlflow_version", "bento", "reason")
    return [{name: row[name] for name in shown} for row in await registry.list_versions(pool)]


async def list_promotions(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    return await registry.list_promotions(pool)


async def list_gaps(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    return await registry.last_gaps(pool)


async def list_usage(pool: Pool, _home: Home, _arguments: argparse.Namespace) -> Result:
    return await interactions.usage(pool, None)


async def status(pool: Pool, home: Home, _arguments: argparse.Namespace) -> Result:
    """One record: what runs, who answers which domain, the newest gaps, what was spent."""
    running = [name for name in processes.names(home) if processes.find(home, name)] + ["postgres"]
    champions = [
        {"tenant_id": c.tenant_id, "domain": c.domain, "student": c.student, "version": c.version, "tier": c.tier}
        for c in await registry.champions(pool)
    ]
    return {
        "home": str(home.root),
        "running": ", ".join(running),
        "tiers": champions,
        "students": await list_students(pool, home, _arguments),
        "gaps": await registry.last_gaps(pool),
        "spend": await interactions.spend(pool, None),
    }


async def _mint(
    pool: Pool,
    pepper: str,
    tenant_id: str | None,
    role: str | None,
    *,
    expires_at: datetime | None = None,
    models: Sequence[str] | None = None,
    key_limits: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    minted = keys.mint(pepper)
    await tenants.add_key(pool, Key(minted.id, tenant_id, role, minted.hash, expires_at, None, models, key_limits or {}))
    return {"key_id": minted.id, "key": minted.text}


OPERATIONS: dict[str, Callable[[Pool, Home, argparse.Namespace], Awaitable[Result]]] = {
    "create_tenant": create_tenant,
    "tenants": list_tenants,
    "change_tenant": change_tenant,
    "create_key": create_key,
    "rotate_key": rotate_key,
    "revoke_key": revoke_key,
    "keys": list_keys,
    "students": list_students,
    "promotions": list_promotions,
    "gaps": list_gaps,
    "usage": list_usage,
    "status": status,
}
