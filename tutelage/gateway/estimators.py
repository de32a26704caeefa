"""What a worker knows, before a call, of how well each model answers: the estimates that the last cycles learned, one a tenant.

It refuses to know how they are learned and what follows from them.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import MutableMapping
from datetime import datetime
from pathlib import Path

from tutelage.routing.estimates import Estimator, QualityModel
from tutelage.stores import estimates
from tutelage.stores.database import Pool
from tutelage.tasks import end

log = logging.getLogger(__name__)


class Estimators:
    """Keeps `held` as the database says, looking every `seconds`; requests use what is held meanwhile."""

    def __init__(self, pool: Pool, held: MutableMapping[str, Estimator], *, seconds: float) -> None:
        self._pool = pool
        self._held = held
        self._seconds = seconds
        self._known: dict[str, datetime] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end(self._task)

    async def look(self) -> None:
        """Take what was learned since the last look, let go what is gone."""
        learned = await estimates.learned(self._pool)
        for tenant_id in self._known.keys() - learned.keys():
            del self._known[tenant_id]
            self._held.pop(tenant_id, None)
        for tenant_id, at in learned.items():
            if self._known.get(tenant_id) == at:
                continue
            content = await estimates.read(self._pool, tenant_id)
            if content is not None:
                self._held[tenant_id] = await asyncio.to_thread(_loaded, content)
            self._known[tenant_id] = at

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception as failed:  # what is held serves until the next look
                log.warning("estimates not read: %r", failed)
            await asyncio.sleep(self._seconds)


def _loaded(content: bytes) -> QualityModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "estimates.safetensors"
        path.write_bytes(content)
        return QualityModel.load(path)
