"""Routing policies of tenants: numbered versions, each with its reason and its evidence; the last one holds. Nothing is ever changed,
so that every decision on record can be explained: going back is a new version that says what an old one said.

It refuses to know what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import asyncpg

from tutelage.errors import Conflict, NotFound
from tutelage.stores import audit
from tutelage.stores.database import Pool
from tutelage.stores.tenants import bump

COLUMNS = "tenant_id, version, created_at, actor, reason, settings, evidence, reverts_to"


async def active(pool: Pool) -> dict[str, dict[str, Any]]:
    """The policy that holds, by tenant; tenants without one are routed as configured."""
    rows = await pool.fetch(f"select distinct on (tenant_id) {COLUMNS} from policies order by tenant_id, version desc")  # noqa: S608
    return {row["tenant_id"]: dict(row) for row in rows}


async def history(pool: Pool, tenant_id: str) -> list[dict[str, Any]]:
    """Every version of a tenant's policy, newest first."""
    rows = await pool.fetch(f"select {COLUMNS} from policies where tenant_id = $1 order by version desc", tenant_id)  # noqa: S608
    return [dict(row) for row in rows]


async def find(pool: Pool, tenant_id: str, version: int) -> dict[str, Any]:
    """Raises NotFound, telling what there is."""
    for row in (rows := await history(pool, tenant_id)):
        if row["version"] == version:
            return row
    known = ", ".join(str(row["version"]) for row in rows) or "none: the tenant is routed as configured"
    raise NotFound(f"no policy version {version}; known: {known}")


async def append(
    pool: Pool,
    tenant_id: str,
    settings: Mapping[str, Any],
    *,
    reason: str,
    evidence: Mapping[str, Any],
    actor: str,
    expected: int,
    reverts_to: int | None = None,
) -> dict[str, Any]:
    """The next version, if the last one is still `expected` (0: none); every gateway knows within its snapshot's age.

    Raises:
        Conflict: somebody else was first; look and decide again.
    """
    told = {"version": expected + 1, "settings": dict(settings), "reason": reason, "reverts_to": reverts_to}
    try:
        async with pool.acquire() as connection, connection.transaction():
            # the primary key is the compare-and-set: two writers that read the same end cannot both append
            row = await connection.fetchrow(
                f"insert into policies (tenant_id, version, actor, reason, settings, evidence, reverts_to) "  # noqa: S608 - constants
                f"select $1, $2, $3, $4, $5, $6, $7 where $2 - 1 = (select coalesce(max(version), 0) from policies where tenant_id = $1) "
                f"returning {COLUMNS}",
                tenant_id,
                expected + 1,
                actor,
                reason,
                dict(settings),
                dict(evidence),
                reverts_to,
            )
            if row is None:
                raise asyncpg.UniqueViolationError
            await audit.append(connection, tenant_id=tenant_id, actor=actor, action="policy.change", subject=tenant_id, detail=told)
            await bump(connection)
    except asyncpg.UniqueViolationError:
        raise Conflict(f"the policy moved since version {expected}; look at it and decide again") from None
    return dict(row)
