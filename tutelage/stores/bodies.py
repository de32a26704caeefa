"""What was asked and answered, apart from the ledger: kept by each tenant's policy, for as long as it says, and erased without a trace in
the bill or the chain. It refuses to know how text is redacted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import datetime
from typing import Any

import orjson

from tutelage.stores import audit
from tutelage.stores.database import Pool
from tutelage.stores.tenants import bump
from tutelage.tasks import end

log = logging.getLogger(__name__)


def digest(salt: bytes, messages: Any, answer: str) -> str:
    """SHA-256 of a body. The salt is kept with the body: once both are erased, the digest in the chain can be guessed from no text."""
    return hashlib.sha256(salt + orjson.dumps([messages, answer], option=orjson.OPT_SORT_KEYS)).hexdigest()


async def erase(pool: Pool, tenant_id: str, *, actor: str, request_id: str | None = None, before: datetime | None = None) -> int:
    """Erase the bodies of one request, or of all `before` then, or all: texts, attempts' answers, embeddings, kept replies and what could
    be guessed from. How many interactions it was; told in the chain."""
    chosen = "tenant_id = $1 and ($2::text is null or request_id = $2) and ($3::timestamptz is null or created_at < $3)"
    async with pool.acquire() as connection, connection.transaction():
        rows = await connection.fetch(
            f"""
            update interactions i set embedding = null, prompt_hash = '' where {chosen} and (
                prompt_hash <> '' or embedding is not null or exists (select 1 from bodies b where b.request_id = i.request_id)
            ) returning request_id
            """,  # noqa: S608 - a constant
            tenant_id,
            request_id,
            before,
        )
        ids = [row["request_id"] for row in rows]
        await connection.execute("delete from bodies where request_id = any($1)", ids)
        await connection.execute("update attempts set answer = '' where request_id = any($1)", ids)
        await connection.execute("update feedback set label = null, comment = null where request_id = any($1)", ids)
        # a kept reply does not know its interaction: those of the time go too, and a retry is answered anew
        replies = "delete from replies where tenant_id = $1 and body is not null and ($2::timestamptz is null or created_at < $2)"
        await connection.execute(replies, tenant_id, before)
        await connection.execute(
            "delete from estimates where tenant_id = $1", tenant_id
        )  # learned from what is erased; the next cycle's are not
        await connection.execute("update tenants set erasures = erasures + 1 where id = $1", tenant_id)  # the cache is another one now
        await bump(connection)
        detail = {"interactions": len(ids), "request_id": request_id, "before": before}
        await audit.append(connection, tenant_id=tenant_id, actor=actor, action="erase", kind="erasure", detail=detail)
    return len(ids)


async def sweep(pool: Pool) -> int:
    """Erase what is older than its tenant's `retention_days`, and all that a deleted tenant left; how many interactions it was."""
    erased = 0
    for row in await pool.fetch(
        "select id, case when status = 'deleted' then now() else now() - retention_days * interval '1 day' end as before "
        "from tenants where retention_days is not null or status = 'deleted'"
    ):
        old = "select 1 from bodies where tenant_id = $1 and created_at < $2 limit 1"
        if await pool.fetchval(old, row["id"], row["before"]):
            erased += await erase(pool, row["id"], actor="retention", before=row["before"])
    return erased


class Sweeper:
    """Sweeps every `seconds`."""

    def __init__(self, pool: Pool, *, seconds: float) -> None:
        self._pool = pool
        self._seconds = seconds
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end(self._task)

    async def _run(self) -> None:
        while True:
            try:
                await sweep(self._pool)
            except Exception as failed:  # the next sweep tries again
                log.warning("old bodies not swept: %r", failed)
            await asyncio.sleep(self._seconds)
