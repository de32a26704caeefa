"""The canaries of each domain: keys and embeddings, never a text. It refuses to choose them."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.evolution.canaries import Canary
from tutelage.stores.database import Pool


async def read(pool: Pool, tenant_id: str, domain: str) -> list[Canary]:
    import numpy as np

    rows = await pool.fetch(
        "select key, embedding, quarter from canaries where tenant_id = $1 and domain = $2 order by key", tenant_id, domain
    )
    return [Canary(row["key"], np.frombuffer(row["embedding"], "f4"), row["quarter"]) for row in rows]


async def requests(pool: Pool, tenant_id: str, domain: str, canaries: Sequence[Canary]) -> list[str]:
    """The requests they came from, however long ago: found by their embeddings, for a key tells nothing. What was erased is not found."""
    found = await pool.fetch(
        "select request_id from interactions join bodies using (request_id) "
        "where interactions.tenant_id = $1 and domain = $2 and endpoint = 'chat' and embedding = any($3::bytea[])",
        tenant_id,
        domain,
        [canary.embedding.tobytes() for canary in canaries],
    )
    return [row["request_id"] for row in found]


async def keep(pool: Pool, tenant_id: str, domain: str, canaries: Sequence[Canary]) -> None:
    """These and no others."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("delete from canaries where tenant_id = $1 and domain = $2", tenant_id, domain)
        await connection.executemany(
            "insert into canaries (tenant_id, domain, key, embedding, quarter) values ($1, $2, $3, $4, $5)",
            [(tenant_id, domain, canary.key, canary.embedding.tobytes(), canary.quarter) for canary in canaries],
        )
