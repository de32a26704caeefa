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


async def keep(pool: Pool, tenant_id: str, domain: str, canaries: Sequence[Canary]) -> None:
    """These and no others."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("delete from canaries where tenant_id = $1 and domain = $2", tenant_id, domain)
        await connection.executemany(
            "insert into canaries (tenant_id, domain, key, embedding, quarter) values ($1, $2, $3, $4, $5)",
            [(tenant_id, domain, canary.key, canary.embedding.tobytes(), canary.quarter) for canary in canaries],
        )
