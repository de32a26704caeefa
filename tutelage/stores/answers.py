"""Answers on record that may be given in context: which domains the gap ledger calls knowledge, and their accepted answers.

It refuses to know how they are found again (`routing/recall.py`) and who is given them.
"""

from __future__ import annotations

from typing import Any

from tutelage.evolution.evidence import Tally
from tutelage.stores.database import Pool


async def knowledge(pool: Pool) -> dict[str, dict[str, Tally]]:
    """By tenant and domain, of those that the newest cycle which looked at them calls knowledge: how often the answer to the most similar
    other request was right."""
    rows = await pool.fetch(
        "select * from (select distinct on (g.tenant_id, g.domain) g.tenant_id, g.domain, g.detail from gaps g "
        "join cycles c on c.id = g.cycle_id order by g.tenant_id, g.domain, c.started_at desc) newest where detail ->> 'kind' = 'knowledge'"
    )
    found: dict[str, dict[str, Tally]] = {}
    for row in rows:
        found.setdefault(row["tenant_id"], {})[row["domain"]] = Tally(**row["detail"]["recalled"])
    return found


async def accepted(pool: Pool, tenant_id: str, domain: str, *, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` requests of a domain with the answer that was accepted, oldest first: messages, answer, embedding. That is a
    user's own, or the teacher's whole one that no user found wrong; none that came from the cache."""
    rows = await pool.fetch(
        """
        select * from (
            select i.request_id, i.created_at, b.messages, coalesce(f.label, b.answer) as answer, i.embedding
            from interactions i join bodies b using (request_id)
            left join lateral (select score, label from feedback where request_id = i.request_id order by id desc limit 1) f on true
            where i.tenant_id = $1 and i.domain = $2 and i.endpoint = 'chat' and i.cache not like 'hit%' and i.embedding is not null
                and (f.label is not null or (i.tier = 'teacher' and coalesce(i.finish_reason, 'stop') = 'stop'
                     and coalesce(f.score, 1) >= 0.5))
            order by i.created_at desc, i.request_id limit $3
        ) newest order by created_at, request_id
        """,
        tenant_id,
        domain,
        limit,
    )
    return [dict(row) for row in rows]
