"""Estimates of how well each model answers a tenant's prompts: what they are learned from, and the learned weights themselves.

It refuses to know how they are learned and asked (`routing/estimates.py`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from tutelage.stores.database import Pool


async def judged(pool: Pool, tenant_id: str, *, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` prompts with what the answers of whole models to them were worth: request_id, messages, domain, embedding, and
    `values` by model. Students' tries are left out: a version says nothing of the next."""
    rows = await pool.fetch(
        """
        select i.request_id, b.messages, i.domain, i.embedding, o.values
        from (
            select request_id, max(id) as last, jsonb_object_agg(model, value) as values
            from (select request_id, model, max(id) as id, avg(value) as value from outcomes
                  where tenant_id = $1 and digest is null group by request_id, model) each
            group by request_id
        ) o
        join interactions i using (request_id) join bodies b using (request_id)
        where i.embedding is not null
        order by o.last desc limit $2
        """,
        tenant_id,
        limit,
    )
    return [dict(row) for row in rows]


async def keep(pool: Pool, tenant_id: str, content: bytes) -> None:
    await pool.execute(
        "insert into estimates (tenant_id, content) values ($1, $2) "
        "on conflict (tenant_id) do update set content = excluded.content, learned_at = excluded.learned_at",
        tenant_id,
        content,
    )


async def learned(pool: Pool) -> dict[str, datetime]:
    """When the estimates of each tenant were learned."""
    return {row["tenant_id"]: row["learned_at"] for row in await pool.fetch("select tenant_id, learned_at from estimates")}


async def read(pool: Pool, tenant_id: str) -> bytes | None:
    content = await pool.fetchval("select content from estimates where tenant_id = $1", tenant_id)
    return None if content is None else bytes(content)
