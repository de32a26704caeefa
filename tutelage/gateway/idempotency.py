"""Idempotency keys: a request sent twice is answered once. The same key and parameters get the same bytes back, streams included.

Only whole successful replies are kept; a request that failed frees its key. It refuses to know how a request is answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from tutelage.errors import InvalidRequest, Unavailable
from tutelage.stores import replies
from tutelage.stores.database import Pool
from tutelage.stores.replies import Held, StoredReply
from tutelage.tasks import end

log = logging.getLogger(__name__)

LONGEST_KEY = 255
FORGET_SECONDS = 3600.0
OUTAGE = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


def fingerprint(route: str, parameters: Any) -> bytes:
    """What two requests must have in common to count as one: the route and every parameter, in whatever order."""
    return hashlib.sha256(json.dumps([route, parameters], sort_keys=True).encode()).digest()


class Idempotency:
    """Claims keys in PostgreSQL, keeps them while a request is answered and frees them when it fails."""

    def __init__(self, pool: Pool, *, lease_seconds: float) -> None:
        self._pool = pool
        self._lease = lease_seconds
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        await end(self._sweeper)

    async def claim(self, tenant_id: str, text: str, *, route: str, parameters: Any) -> Held | StoredReply:
        """The right to answer, or the reply of the first time.

        Raises:
            InvalidRequest: the key is empty or too long.
            IdempotencyConflict, IdempotencyMismatch: it is in use, or was used for another request.
            Unavailable: the database cannot be asked; answering anyway might answer twice.
        """
        if not 0 < len(text) <= LONGEST_KEY:
            raise InvalidRequest(f"Idempotency-Key has {len(text)} characters; allowed are 1 to {LONGEST_KEY}", param="Idempotency-Key")
        try:
            return await replies.claim(
                self._pool,
                replies.reply_key(tenant_id, text),
                fingerprint=fingerprint(route, parameters),
                holder=uuid.uuid4().hex,
                seconds=self._lease,
            )
        except OUTAGE as broken:
            raise Unavailable("whether this Idempotency-Key was used cannot be looked up; try again shortly") from broken

    @asynccontextmanager
    async def holding(self, held: Held) -> AsyncIterator[None]:
        """Keep the right while the body runs; afterwards the key is free unless the reply was kept."""
        renewal = asyncio.create_task(self._renew(held))
        try:
            yield
        finally:
            renewal.cancel()
            # shielded: a client that hangs up must not leave its key held until the lease ends
            await asyncio.shield(self._release(held))

    async def _renew(self, held: Held) -> None:
        while True:
            await asyncio.sleep(held.seconds / 3)
            try:
                await replies.renew(self._pool, held)
            except OUTAGE as broken:
                log.warning("an idempotency key could not be renewed: %r", broken)

    async def _release(self, held: Held) -> None:
        try:
            await replies.release(self._pool, held)
        except OUTAGE as broken:
            log.warning("an idempotency key was not freed, its lease will end: %r", broken)

    async def _sweep(self) -> None:
        while True:
            try:
                await replies.forget_old(self._pool)
            except OUTAGE as broken:
                log.warning("old replies were not forgotten: %r", broken)
            await asyncio.sleep(FORGET_SECONDS)
