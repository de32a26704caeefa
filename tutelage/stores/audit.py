"""The audit chains: one a tenant, and one without a tenant for what operators do to the installation. Rows are appended by the database's
own `audit_append`, in the transaction of what they tell of; here they are asked for, read back and checked.

It refuses to know who signs a chain's head (`heads.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from tutelage.records import Interaction
from tutelage.stores.database import Pool

OPERATOR = ""  # the chain of what belongs to no tenant
PIECE = 500  # links read at a time: a worker that checks a chain answers requests in between
CHECK_SECONDS = 3600.0
FIELDS = ("tenant_id", "sequence", "at", "kind", "actor", "action", "subject", "detail")


@dataclass(frozen=True)
class Link:
    """One row of a chain. `hash` covers the link before it and every other field."""

    tenant_id: str
    sequence: int
    at: str
    kind: str
    actor: str
    action: str
    subject: str
    detail: str
    hash: bytes

    def expected(self, previous: bytes) -> bytes:
        """SHA-256 of the previous hash and the fields, parted by unit separators: what `audit_append` computes."""
        return hashlib.sha256(previous + "\x1f".join(str(getattr(self, name)) for name in FIELDS).encode()).digest()


@dataclass(frozen=True)
class Head:
    """The end of a chain."""

    tenant_id: str
    sequence: int
    hash: bytes


@dataclass(frozen=True)
class Break:
    """The first thing found wrong in a chain, or between a chain and the ledger."""

    tenant_id: str
    sequence: int | None
    reason: str


def detail_of(interaction: Interaction, body_digest: str | None) -> str:
    """What a request's link tells of it: never its text."""
    told = {
        "model": interaction.model,
        "tier": interaction.tier,
        "route": interaction.route,
        "cache": interaction.cache,
        "prompt_tokens": interaction.prompt_tokens,
        "completion_tokens": interaction.completion_tokens,
        "tokens_estimated": interaction.tokens_estimated,
        "cost_microusd": interaction.cost_microusd,
        "finish_reason": interaction.finish_reason,
        "body": body_digest,
    }
    return orjson.dumps(told).decode()


async def append(
    connection: Any, *, tenant_id: str | None, actor: str, action: str, detail: Mapping[str, Any], kind: str = "admin", subject: str = ""
) -> int:
    """Tell what `actor` does, in the transaction in which it is done; the link's sequence. `detail` never holds a secret or a text."""
    told = json.dumps(dict(detail), ensure_ascii=False, sort_keys=True, default=str)
    statement = "select audit_append($1, clock_timestamp(), $2, $3, $4, $5, $6)"
    return int(await connection.fetchval(statement, tenant_id or OPERATOR, kind, actor, action, subject, told))


async def heads(pool: Pool | Any) -> list[Head]:
    rows = await pool.fetch("select tenant_id, sequence, hash from audit_heads where sequence > 0 order by tenant_id")
    return [Head(**row) for row in rows]


async def newest(pool: Pool, tenant_id: str, *, limit: int, before: int | None = None) -> list[dict[str, Any]]:
    """The newest links of a chain, newest first; `before` a sequence, for the next page."""
    rows = await pool.fetch(
        "select * from audit where tenant_id = $1 and ($3::bigint is null or sequence < $3) order by sequence desc limit $2",
        tenant_id,
        limit,
        before,
    )
    return [{**row, "detail": json.loads(row["detail"]), "hash": row["hash"].hex()} for row in rows]


async def links(pool: Pool | Any, tenant_id: str) -> AsyncIterator[Link]:
    """A whole chain in its order, a piece at a time."""
    last = 0
    while True:
        rows = await pool.fetch(
            "select * from audit where tenant_id = $1 and sequence > $2 order by sequence limit $3", tenant_id, last, PIECE
        )
        for row in rows:
            yield Link(**row)
        if len(rows) < PIECE:
            return
        last = rows[-1]["sequence"]


async def check_chain(
    pool: Pool | Any, head: Head | None, tenant_id: str, exported: Mapping[int, bytes], seen: Callable[[int], None]
) -> Break | None:
    """The first break of a chain: a link that does not follow, an end that was cut off, or another past than was `exported`
    (hashes by sequence). `seen` is told of every link."""
    previous, sequence = b"", 0
    async for link in links(pool, tenant_id):
        sequence += 1
        if link.sequence != sequence:
            return Break(tenant_id, sequence, f"link {sequence} is missing; the next one is {link.sequence}")
        if link.hash != link.expected(previous):
            return Break(tenant_id, sequence, "the link does not follow from what is before it: it, or one before it, was changed")
        if exported.get(sequence, link.hash) != link.hash:
            return Break(tenant_id, sequence, "an exported head says otherwise: the chain was written anew")
        previous = link.hash
        seen(1)
    last = max(exported, default=0)
    if sequence < last:
        return Break(tenant_id, sequence + 1, f"the chain ends at {sequence}, but its head was exported at {last}: its end was cut off")
    if head is None or head.sequence < sequence or (head.sequence == sequence and head.hash != previous):
        return Break(tenant_id, sequence, f"the stored head is at {head.sequence if head else 0}, the chain at {sequence}")
    if head.sequence > sequence:
        return Break(tenant_id, sequence + 1, f"the chain ends at {sequence}, its head says {head.sequence}: its end was cut off")
    return None


async def verify(
    pool: Pool, exported: Mapping[str, Mapping[int, bytes]], *, tenant_id: str | None = None, seen: Callable[[int], None] = lambda _: None
) -> tuple[int, Break | None]:
    """How many links were checked, and the first break of any chain, or of one tenant's, or between a chain and the ledger.

    All is read as it was at one moment. `exported` must have been read before: a head cannot be newer than that moment.
    """
    checked = 0

    def count(links: int) -> None:
        nonlocal checked
        checked += links
        seen(links)

    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        known = {head.tenant_id: head for head in await heads(connection)}
        found = await connection.fetch("select distinct tenant_id from audit")
        chains = sorted({*known, *exported, *(row["tenant_id"] for row in found)}) if tenant_id is None else [tenant_id]
        for chain in chains:
            broken = await check_chain(connection, known.get(chain), chain, exported.get(chain, {}), count)
            if broken is not None:
                return checked, broken
        return checked, await check_ledger(connection, tenant_id)


async def count_links(pool: Pool, tenant_id: str | None = None) -> int:
    """Of one tenant's chain or of all, as their heads say: how much `verify` has before it."""
    counted = await pool.fetchval(
        "select coalesce(sum(sequence), 0)::bigint from audit_heads where $1::text is null or tenant_id = $1", tenant_id
    )
    return int(counted)


async def check_ledger(pool: Pool | Any, tenant_id: str | None = None) -> Break | None:
    """The first row of the ledger, or of one tenant's, without its link, link without its row, or pair that tells of another cost."""
    row = await pool.fetchrow(
        """
        select coalesce(i.tenant_id, a.tenant_id) as tenant_id, a.sequence, coalesce(i.request_id, a.subject) as request_id,
            case when a.subject is null then 'is in the ledger and not in the chain'
                 when i.request_id is null then 'is in the chain and not in the ledger'
                 else 'costs ' || i.cost_microusd || ' micro-dollars in the ledger and ' || (a.detail::json ->> 'cost_microusd')
                      || ' in the chain' end as told
        from (select * from interactions where $1::text is null or tenant_id = $1) i
        full join (
            select distinct on (tenant_id, subject) tenant_id, subject, sequence, detail from audit
            where kind = 'request' and ($1::text is null or tenant_id = $1)
            order by tenant_id, subject, sequence desc
        ) a on a.tenant_id = i.tenant_id and a.subject = i.request_id
        where i.request_id is null or a.subject is null or i.cost_microusd <> (a.detail::json ->> 'cost_microusd')::bigint
        limit 1
        """,
        tenant_id,
        timeout=CHECK_SECONDS,
    )
    return None if row is None else Break(row["tenant_id"], row["sequence"], f"request {row['request_id']} {row['told']}")
