"""Cycles that begin by themselves: counts what every tenant has asked since its last cycle, and begins the next one when it is due.

    python -m flows.timer [--every SECONDS] [--config DIR]

One cycle at a time for the whole installation, at low priority and on one thread, so that requests come first. Where this home's Prefect
server and its worker run (`tutelage ui`), an event asks them for the cycle; otherwise it is a process of the timer's own. What is due is
`tutelage.evolution.timing`'s rule. It needs no Prefect itself, and what has died it begins again: a cycle is counted in the database.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from flows import beside
from flows.workshop import tell
from tutelage.evolution.gaps import EvolveSettings
from tutelage.evolution.timing import due
from tutelage.fleet import consoles, processes
from tutelage.settings import Home, load
from tutelage.stores import cycles
from tutelage.stores.database import Pool, open_pool

log = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
PATIENCE_SECONDS = 300.0  # so long a cycle that was asked of Prefect may wait for its worker before it is asked for again
EVENT = "tutelage.cycle.due"
NAME = "cycle"  # of the process, in this home
NICENESS = 10


class Timer:
    """What this process has begun or asked for. `clock`: seconds, for the patience with Prefect."""

    def __init__(self, home: Home, config_dir: Path, *, clock: Any = time.monotonic) -> None:
        self._home, self._config, self._clock = home, config_dir, clock
        self._child: Any = None
        self._asked: dict[str, float] = {}

    async def look(self, pool: Pool, *, now: datetime) -> str | None:
        """Begin the cycle that has been due for longest, unless one is under way; the tenant whose it is."""
        if self._child is not None and self._child.poll() not in (None, 0):
            tell("timer", f"a cycle failed; read {self._home.logs / f'{NAME}.log'}")
        if self._child is not None and self._child.poll() is not None:
            self._child = None
        if processes.find(self._home, NAME) is not None:  # also one that an earlier timer began
            return None
        settings = load(EvolveSettings, self._config)
        for tenant_id, name, seen in await cycles.seen(pool, interval=settings.evolution_interval):
            decision = due(seen, settings, now=now)
            if decision.due and self._begin(tenant_id, name, decision.reason):
                return tenant_id
        return None

    def close(self) -> None:
        """End the cycle under way; it is begun again by the next timer."""
        processes.stop(self._home, NAME)

    def _begin(self, tenant_id: str, name: str, reason: str) -> bool:
        api = consoles.prefect_api(self._home)
        if api is None:
            tell("timer", f"a cycle of {name}: {reason}")
            command = processes.python("-m", "flows.evolve", "--tenant", tenant_id, "--config", str(self._config))
            self._child = processes.start(self._home, NAME, command, environment={"OMP_NUM_THREADS": "1"})
            return True
        if self._clock() - self._asked.get(tenant_id, -PATIENCE_SECONDS) < PATIENCE_SECONDS:
            return False
        self._asked[tenant_id] = self._clock()
        tell("timer", f"a cycle of {name} is asked of {api}: {reason}")
        emit(api, tenant_id, name, reason)
        return True


def emit(api: str, tenant_id: str, name: str, reason: str) -> None:
    """Tell Prefect that a tenant's cycle is due; its automation runs the deployment. Plain HTTP, for importing Prefect takes seconds."""
    event = {
        "id": str(uuid.uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": EVENT,
        "resource": {"prefect.resource.id": f"tutelage.tenant.{tenant_id}", "prefect.resource.name": name},
        "payload": {"tenant": tenant_id, "reason": reason},
    }  # fmt: skip
    httpx.post(f"{api}/events", json=[event], timeout=10).raise_for_status()


async def serve(home: Home, config_dir: Path, database_url: str, every: float | None) -> None:
    """Look until cancelled; at low priority, and so is everything that is started."""
    os.nice(NICENESS)
    timer = Timer(home, config_dir)
    pool = await open_pool(database_url, size=1)
    try:
        await beside.looking(lambda: timer.look(pool, now=datetime.now(UTC)), every=every)
    finally:
        timer.close()
        await pool.close()


if __name__ == "__main__":
    sys.exit(beside.command("timer", "Begin evolution cycles when they are due.", serve, every=EVERY_SECONDS, once=False))
