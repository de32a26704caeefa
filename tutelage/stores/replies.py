"""Replies kept by the client's idempotency key for a day, so that a retry gets the same bytes and nothing is asked or billed twice.

A key is held by one request at a time, for a few seconds at once: a holder that dies frees it by not renewing. It refuses to
know what a reply says.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from tutelage.errors import IdempotencyConflict, IdempotencyMismatch
from tutelage.stores.database import Pool

KEPT_HOURS = 24


@dataclass(frozen=True)
class ReplyKey:
    """Whose request: the client's key is kept as a digest only."""

    tenant_id: str
    digest: bytes


@dataclass(frozen=True)
class Held:
    """The right to answer one request; it ends after `seconds` unless renewed."""

    key: ReplyKey
    holder: str
    seconds: float


@dataclass(frozen=True)
class StoredReply:
    """A whole reply as it went out: a stream's body is all of its events."""

    headers: dict[str, str]
    media_type: str
    body: bytes


def reply_key(tenant_id: str, text: str) -> ReplyKey:
    return ReplyKey(tenant_id, hashlib.sha256(text.encode()).digest())


async def claim(pool: Pool, key: ReplyKey, *, fingerprint: bytes, holder: str, seconds: float) -> Held | StoredReply:
    """The right to answer, or the reply that the same request got within the last day.

    Raises:
        IdempotencyMismatch: the key was used with another request (`fingerprint` differs).
        IdempotencyConflict: the same request is being answered now.
    """
    while True:
        taken = await pool.fetchval(
            """
            insert into replies (tenant_id, key_digest, fingerprint, holder, held_until)
            values ($1, $2, $3, $4, now() + $5 * interval '1 second')
            on conflict (tenant_id, key_digest) do update
            set fingerprint = excluded.fingerprint, holder = excluded.holder, held_until = excluded.held_until,
                created_at = now(), headers = null, media_type = null, body = null
            where replies.created_at < now() - $6 * interval '1 hour' or (replies.body is null and replies.held_until < now())
            returning holder
            """,
            key.tenant_id,
            key.digest,
            fingerprint,
            holder,
            seconds,
            float(KEPT_HOURS),
        )
        if taken is not None:
            return Held(key, holder, seconds)
        row = await pool.fetchrow(
            "select fingerprint, headers, media_type, body, extract(epoch from held_until - now()) as remaining "
            "from replies where tenant_id = $1 and key_digest = $2",
            key.tenant_id,
            key.digest,
        )
        if row is not None:  # otherwise its holder gave up between the two statements: the key is free
            return _known(row, fingerprint)


def _known(row: Any, fingerprint: bytes) -> StoredReply:
    if row["fingerprint"] != fingerprint:
        raise IdempotencyMismatch("this Idempotency-Key was used with another request; send a new key with a new request")
    if row["body"] is None:
        wait = max(1, math.ceil(row["remaining"]))
        raise IdempotencyConflict("the same request is being answered now; send it again to get its reply", retry_after=wait)
    return StoredReply(row["headers"], row["media_type"], row["body"])


async def renew(pool: Pool, held: Held) -> None:
    await pool.execute(
        "update replies set held_until = now() + $4 * interval '1 second' "
        "where tenant_id = $1 and key_digest = $2 and holder = $3 and body is null",
        held.key.tenant_id,
        held.key.digest,
        held.holder,
        held.seconds,
    )


async def keep(connection: Any, held: Held, reply: StoredReply) -> bool:
    """Store the reply, in the caller's transaction; false when the right has passed to another request."""
    kept = await connection.fetchval(
        "update replies set headers = $4, media_type = $5, body = $6 "
        "where tenant_id = $1 and key_digest = $2 and holder = $3 and body is null returning holder",
        held.key.tenant_id,
        held.key.digest,
        held.holder,
        reply.headers,
        reply.media_type,
        reply.body,
    )
    return kept is not None


async def release(pool: Pool, held: Held) -> None:
    """Free the key of a request that failed, so that a retry is answered anew; a kept reply stays."""
    await pool.execute(
        "delete from replies where tenant_id = $1 and key_digest = $2 and holder = $3 and body is null",
        held.key.tenant_id,
        held.key.digest,
        held.holder,
    )


async def forget_old(pool: Pool) -> None:
    await pool.execute("delete from replies where created_at < now() - $1 * interval '1 hour'", float(KEPT_HOURS))
