"""Interactions and feedback: written together every few milliseconds, each writer released once its row is durable.

It refuses to know what an answer is worth; it keeps what was said.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any, NamedTuple

import asyncpg
import orjson

from tutelage.errors import IdempotencyConflict, NotFound, Unavailable
from tutelage.records import Attempt, Feedback, Interaction
from tutelage.stores import audit, bodies, outcomes, replies
from tutelage.stores.database import Pool
from tutelage.stores.replies import Held, StoredReply
from tutelage.tasks import end

log = logging.getLogger(__name__)

TAKEN_OVER = "another request with this Idempotency-Key took over; send it again to get its reply"
MOST_QUEUED = 20_000
CROWD = 4  # rows in the last batch from which the next one waits a little, so that more go together
RECORD = "select record_interactions($1::text::jsonb)"
LEDGER = (
    "request_id", "tenant_id", "key_id", "created_at", "model", "tier", "route", "reason", "cache", "domain", "given_domain", "confidence",
    "finish_reason", "prompt_tokens", "completion_tokens", "tokens_estimated", "cost_microusd", "latency_ms", "endpoint", "strategy",
    "propensity", "explored", "policy_version", "similarity",
)  # fmt: skip
LEDGER_OF = attrgetter(*LEDGER)
ATTEMPT_COLUMNS = ("model", "tier", "digest", "answer", "score", "confidence", "accepted", "reason", "cost_microusd")
REFUSED = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)


class _Entry(NamedTuple):
    """One interaction that waits to be durable, with the reply to keep if its request holds an idempotency key; `until` is loop time."""

    interaction: Interaction
    kept: tuple[Held, StoredReply] | None
    done: asyncio.Future[None]
    until: float


class Recorder:
    """Group commit: what queues up while a batch is being written goes in the next, in one statement with its links in the audit chains.

    `synchronous_commit` stays on, so `record` returns only when the row survives a power cut.
    """

    def __init__(self, pool: Pool, *, flush_seconds: float, batch_rows: int, deadline_seconds: float) -> None:
        self._pool = pool
        self._flush = flush_seconds
        self._batch = batch_rows
        self._deadline = deadline_seconds
        self._queue: deque[_Entry] = deque()
        self._came = asyncio.Event()  # set while something is queued
        self._done = asyncio.Event()  # set while nothing is queued or being written
        self._done.set()
        self._connection: Any = None  # one of its own: what a pool does at every return costs as much as the statement
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write what is queued, then end."""
        if self._task:
            await self._done.wait()
            await end(self._task)
        await self._let_go()

    async def record(self, interaction: Interaction, kept: tuple[Held, StoredReply] | None = None) -> None:
        """Returns when the interaction, and the reply to keep, are durable; gives up within twice the deadline.

        Raises:
            Unavailable: the database did not take it in time.
            IdempotencyConflict: the right to answer has passed to another request; nothing was recorded.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        try:
            if len(self._queue) >= MOST_QUEUED:
                raise OSError(f"{MOST_QUEUED} interactions wait to be written")
            self._queue.append(_Entry(interaction, kept, done, loop.time() + self._deadline))
            self._came.set()
            self._done.clear()
            await done
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as broken:
            raise Unavailable("the answer could not be recorded durably, so it is not given; try again shortly") from broken

    async def _run(self) -> None:
        last = 0
        while True:
            await self._came.wait()
            await asyncio.sleep(self._flush if last >= CROWD else 0)
            batch = [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
            if not self._queue:
                self._came.clear()
            last = len(batch)
            now = asyncio.get_running_loop().time()
            _tell([entry for entry in batch if entry.until <= now], TimeoutError("the database was too slow"))
            # a caller that gave up was told so: writing its row now would record an answer nobody got
            await self._settle([entry for entry in batch if not entry.done.done()])
            if not self._queue:
                self._done.set()

    async def _settle(self, batch: list[_Entry]) -> None:
        """Write a batch and tell every waiter how it went."""
        try:
            lost = await self._write(batch)
        except REFUSED as refused:
            if len(batch) > 1:  # one of them is at fault: the others must not suffer for it
                for entry in batch:
                    await self._settle([entry])
                return
            log.error("interaction %s cannot be recorded: %r", batch[0].interaction.request_id, refused)
            _tell(batch, refused)
        except Exception as broken:  # whatever it was, every waiter must hear of it
            log.warning("recording %d interactions failed: %r", len(batch), broken)
            await self._let_go()
            _tell(batch, broken if isinstance(broken, OSError | asyncpg.PostgresError) else OSError(repr(broken)))
        else:
            _tell(lost, IdempotencyConflict(TAKEN_OVER, retry_after=1))
            _tell(batch, None)

    async def _write(self, batch: Sequence[_Entry]) -> list[_Entry]:
        """Write all in one transaction, but for those whose idempotency key has passed to another request: they are returned."""
        if not batch:
            return []
        async with asyncio.timeout(self._deadline):
            return await self._write_in_time(batch)

    async def _write_in_time(self, batch: Sequence[_Entry]) -> list[_Entry]:
        if self._connection is None:
            self._connection = await self._pool.acquire()
        if not any(entry.kept for entry in batch):
            await self._connection.execute(RECORD, as_json([entry.interaction for entry in batch]))
            return []
        async with self._connection.transaction():
            lost = [entry for entry in batch if entry.kept and not await replies.keep(self._connection, *entry.kept)]
            await self._connection.execute(RECORD, as_json([entry.interaction for entry in batch if entry not in lost]))
        return lost

    async def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await self._pool.release(connection, timeout=1)


def _tell(entries: Sequence[_Entry], failed: Exception | None) -> None:
    for entry in entries:
        if entry.done.done():
            continue
        if failed is None:
            entry.done.set_result(None)
        else:
            entry.done.set_exception(failed)


def as_json(interactions: Sequence[Interaction]) -> str:
    """Interactions as `record_interactions` reads them. PostgreSQL keeps no NUL in text: one becomes U+FFFD."""
    text = orjson.dumps([_entry(interaction) for interaction in interactions])
    if b"\\u0000" in text:
        text = orjson.dumps(_without_nul(orjson.loads(text)))
    return text.decode()


def _entry(interaction: Interaction) -> dict[str, Any]:
    told: dict[str, Any] = dict(zip(LEDGER, LEDGER_OF(interaction), strict=True))
    told["prompt_hash"] = rf"\x{interaction.prompt_hash.hex()}"
    told["embedding"] = None if interaction.embedding is None else rf"\x{interaction.embedding.hex()}"
    told["attempts"] = [{name: getattr(attempt, name) for name in ATTEMPT_COLUMNS} for attempt in interaction.attempts]
    if interaction.messages is None:
        told["detail"] = audit.detail_of(interaction, None)
        return told
    salt = os.urandom(16)
    told |= {"messages": interaction.messages, "answer": interaction.answer, "salt": salt.hex()}
    told["detail"] = audit.detail_of(interaction, bodies.digest(salt, interaction.messages, interaction.answer))
    return told


def _without_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, list):
        return [_without_nul(part) for part in value]
    if isinstance(value, dict):
        return {_without_nul(key): _without_nul(part) for key, part in value.items()}
    return value


async def add_feedback(pool: Pool, feedback: Feedback, kept: tuple[Held, StoredReply] | None = None) -> None:
    """Add it, and keep the reply of a request that holds an idempotency key.

    Raises:
        NotFound: the tenant has no such interaction (another tenant's looks the same as none).
        IdempotencyConflict: the right to answer has passed to another request; nothing was added.
    """
    async with pool.acquire() as connection, connection.transaction():
        created = await connection.fetchval(
            "insert into feedback (request_id, tenant_id, score, label, comment) "
            "select request_id, tenant_id, $3, $4, $5 from interactions where request_id = $1 and tenant_id = $2 returning id",
            _without_nul(feedback.request_id),
            feedback.tenant_id,
            feedback.score,
            _without_nul(feedback.label),
            _without_nul(feedback.comment),
        )
        if created is None:
            raise NotFound(
                f"no interaction {feedback.request_id!r}; use the x-request-id of a reply to this tenant",
                param="request_id",
            )
        await outcomes.add_feedback(connection, feedback)
        if kept and not await replies.keep(connection, *kept):
            raise IdempotencyConflict(TAKEN_OVER, retry_after=1)


async def add_attempt(pool: Pool, request_id: str, position: int, attempt: Attempt) -> None:
    """One more try at a request that was answered, made beside it."""
    places = ", ".join(f"${place}" for place in range(1, len(ATTEMPT_COLUMNS) + 3))
    await pool.execute(
        f"insert into attempts (request_id, position, {', '.join(ATTEMPT_COLUMNS)}) values ({places})",  # noqa: S608 - constants
        request_id,
        position,
        *(getattr(attempt, column) for column in ATTEMPT_COLUMNS),
    )


async def add_lost(
    pool: Pool, *, request_id: str, tenant_id: str, key_id: str, at: datetime, tokens: int, cost_microusd: int
) -> tuple[int, int]:
    """Put a request that nobody finished on the bill, unless its interaction is there; the tokens and micro-dollars on the bill."""
    told = {"tokens": tokens, "cost_microusd": cost_microusd, "route": "lost", "finish_reason": "lost", "body": None}
    async with pool.acquire() as connection, connection.transaction():
        added = await connection.fetchval(
            """
            insert into interactions (request_id, tenant_id, key_id, created_at, prompt_hash, model, tier, route, reason,
                cache, finish_reason, prompt_tokens, completion_tokens, tokens_estimated, cost_microusd, latency_ms)
            values ($1, $2, $3, $4, '', 'unknown', 'teacher', 'lost', 'its worker died; billed at what was reserved',
                'bypass', 'lost', $5, 0, true, $6, 0)
            on conflict (request_id) do nothing returning request_id
            """,
            request_id,
            tenant_id,
            key_id,
            at,
            tokens,
            cost_microusd,
        )
        if added is not None:
            await audit.append(
                connection, tenant_id=tenant_id, actor=key_id, action="chat", kind="request", subject=request_id, detail=told
            )
    row = await pool.fetchrow(
        "select prompt_tokens + completion_tokens as tokens, cost_microusd from interactions where request_id = $1", request_id
    )
    return (tokens, cost_microusd) if row is None else (row["tokens"], row["cost_microusd"])


async def read_interactions(
    pool: Pool,
    tenant_id: str,
    *,
    limit: int,
    since: datetime | None = None,
    for_training: bool = False,
    request_ids: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The newest `limit` chat interactions of a tenant (of those requests) whose bodies are kept, oldest first, each with its latest
    feedback (`score`, `label`) and its attempts; `for_training`: none of a tenant that opted out."""
    rows = await pool.fetch(
        """
        select i.*, f.score as feedback_score, f.label as feedback_label
        from (select interactions.*, messages, answer from interactions join bodies using (request_id)
              where interactions.tenant_id = $1 and endpoint = 'chat' and ($3::timestamptz is null or interactions.created_at >= $3)
              and (not $4 or exists (select 1 from tenants where id = $1 and training = 'on'))
              and ($5::text[] is null or request_id = any($5))
              order by interactions.created_at desc, request_id limit $2) i
        left join lateral (select score, label from feedback where request_id = i.request_id order by id desc limit 1) f on true
        order by i.created_at, i.request_id
        """,
        tenant_id,
        limit,
        since,
        for_training,
        None if request_ids is None else list(request_ids),
    )
    tried = await pool.fetch(
        f"select request_id, {', '.join(ATTEMPT_COLUMNS)} from attempts where request_id = any($1) order by request_id, position",  # noqa: S608
        [row["request_id"] for row in rows],
    )
    attempts: dict[str, list[Attempt]] = {}
    for row in tried:
        attempts.setdefault(row["request_id"], []).append(Attempt(**{c: row[c] for c in ATTEMPT_COLUMNS}))
    return [{**row, "attempts": attempts.get(row["request_id"], [])} for row in rows]


async def set_routing(pool: Pool, rows: Sequence[tuple[str, str | None, bytes]]) -> None:
    """Write (request_id, domain, embedding) found after the fact, by the evolution cycle."""
    await pool.executemany("update interactions set domain = $2, embedding = $3 where request_id = $1", rows)


async def spend(pool: Pool, tenant_id: str | None) -> list[dict[str, Any]]:
    """Requests and micro-dollars by tenant, tier and model; `tenant_id` None means all tenants."""
    rows = await pool.fetch(
        """
        select tenant_id, tier, model, count(*) filter (where endpoint <> 'shadow')::int as requests,
               count(*) filter (where cache like 'hit%')::int as cached,
               sum(cost_microusd)::bigint as cost_microusd
        from interactions where $1::text is null or tenant_id = $1
        group by tenant_id, tier, model order by tenant_id, tier, model
        """,
        tenant_id,
    )
    return [dict(row) for row in rows]


async def used(pool: Pool, tenant_id: str, key_id: str | None, *, day: datetime, month: datetime) -> tuple[int, int]:
    """Queries since `day` and micro-dollars since `month`, of a tenant or of one of its keys."""
    row = await pool.fetchrow(
        """
        select count(*) filter (where created_at >= $3 and endpoint <> 'shadow')::bigint as queries,
               coalesce(sum(cost_microusd), 0)::bigint as cost
        from interactions where tenant_id = $1 and ($2::text is null or key_id = $2) and created_at >= least($3::timestamptz, $4)
        """,
        tenant_id,
        key_id,
        day,
        month,
    )
    return (0, 0) if row is None else (int(row["queries"]), int(row["cost"]))
