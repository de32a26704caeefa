"""Labels of would-be semantic hits: how probable it was that a kept answer is right, and whether it was. No text is in them.

It refuses to know what follows from them (`routing/budget.py`, `routing/pairs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tutelage.stores.database import Pool

MOST_READ = 20_000  # at once


class PairLabel(NamedTuple):
    """`traits`: as `routing/pairs.py` lists them."""

    tenant_id: str
    probability: float
    right: bool
    traits: tuple[float, ...]


async def add(pool: Pool, labels: Sequence[PairLabel]) -> None:
    """All or none; of a tenant that was deleted meanwhile, none."""
    await pool.executemany(
        'insert into semantic_labels (tenant_id, probability, "right", traits) '
        "select $1, $2, $3, $4 where exists (select 1 from tenants where id = $1 and status <> 'deleted')",
        [(label.tenant_id, label.probability, label.right, list(label.traits)) for label in labels],
    )


async def read(pool: Pool, *, after: int, newest: int) -> tuple[int, list[PairLabel]]:
    """Labels with an id above `after`, oldest first, of each tenant at most the `newest`; and the highest id. One whose transaction ends
    after that of a higher id may be missed: it counts when the worker starts again."""
    rows = await pool.fetch(
        """
        select * from (
            select id, tenant_id, probability, "right", traits, row_number() over (partition by tenant_id order by id desc) as place
            from semantic_labels where id > $1
        ) numbered where place <= $2 order by id limit $3
        """,
        after,
        newest,
        MOST_READ,
    )
    found = [PairLabel(row["tenant_id"], row["probability"], row["right"], tuple(row["traits"])) for row in rows]
    return (rows[-1]["id"] if rows else after), found


async def forget(pool: Pool, tenant_id: str, *, newest: int) -> None:
    """All but the newest of a tenant."""
    await pool.execute(
        "delete from semantic_labels where tenant_id = $1 and id <= "
        "(select id from semantic_labels where tenant_id = $1 order by id desc offset $2 limit 1)",
        tenant_id,
        newest,
    )
