"""Watches how much each tenant keeps of its prompts and answers, so that nothing more is kept of one that has as much as it may.

It refuses to erase anything and to refuse a request: a full store costs a tenant what could be learned, never an answer.
"""

from __future__ import annotations

import asyncio
import logging

from tutelage.gateway.snapshot import Watcher, full
from tutelage.stores import tenants
from tutelage.stores.database import Pool
from tutelage.tasks import end

log = logging.getLogger(__name__)


class StorageWatcher:
    """Looks every `seconds`: that long a tenant may go beyond its limit, at the rate at which it is recorded."""

    def __init__(self, pool: Pool, watcher: Watcher, *, seconds: float) -> None:
        self._pool = pool
        self._watcher = watcher
        self._seconds = seconds
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end(self._task)

    async def look(self) -> None:
        """Have the snapshot read again when a tenant has filled its storage, or has room once more."""
        stored = await tenants.stored_bytes(self._pool)
        snapshot = self._watcher.current
        changed = [tenant for tenant in snapshot.tenants.values() if full(tenant, stored) != snapshot.full(tenant)]
        for tenant in changed:
            told = "keeps as much as it may: no more prompts and answers are kept" if full(tenant, stored) else "may keep more again"
            log.warning("tenant %s (%s) %s", tenant.name, tenant.id, told)
        if changed:
            self._watcher.read_again()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self.look()
            except Exception as failed:  # the next look tells
                log.warning("stored bytes not looked at: %r", failed)
