"""What a worker is doing just now, told to its metrics every so often: with several workers, whoever answers /metrics sees only what the
others have written down. It refuses to know what the numbers mean to anybody.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from tutelage.fleet.endpoint import ReplicaHealth
from tutelage.tasks import end

log = logging.getLogger(__name__)


class Gauges:
    """`state` is the app's: its turns, configuration and models are read every `seconds`."""

    def __init__(self, state: Any, *, seconds: float) -> None:
        self._state = state
        self._seconds = seconds
        self._models: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end(self._task)

    def set(self) -> None:
        state, metrics = self._state, self._state.metrics
        metrics.running.set(state.turns.running)
        metrics.waiting.set(state.turns.waiting)
        metrics.faulty.set(int(state.configuration.fault is not None))
        health = {entry.name: backend.health() for entry, backend in state.dispatch.models.configured}
        if state.has_tier:
            health["tier"] = state.dispatch.models.adapter("tier").health()
        for name in self._models - set(health):  # a model that is not configured any more is left alone by nobody
            metrics.breakers.labels(name).set(0)
        self._models |= set(health)
        for name, replicas in health.items():
            metrics.breakers.labels(name).set(int(not callable_now(replicas)))

    async def _run(self) -> None:
        while True:
            try:
                self.set()
            except Exception as failed:  # metrics must never end a worker
                log.warning("gauges not set: %r", failed)
            await asyncio.sleep(self._seconds)


def callable_now(replicas: list[ReplicaHealth]) -> bool:
    """Whether any replica may be called; a model without replicas always may."""
    return not replicas or any(replica.state in ("closed", "half-open") for replica in replicas)
