"""A gateway without governance (`bare: true` in gateway.yaml): the same pipeline with parts that do nothing, to measure what governance
costs. Nothing is limited, cached or recorded. It refuses to be useful for anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from tutelage.gateway.admission import Admission, Estimate, Meter, Party
from tutelage.gateway.cache import Cache, CacheKey, Entry, Looking, Servable
from tutelage.gateway.exchange import Asked, Outcome, Placed
from tutelage.gateway.shadows import Shadows
from tutelage.gateway.snapshot import TenantView
from tutelage.records import Interaction
from tutelage.stores.interactions import Recorder
from tutelage.stores.replies import Held, StoredReply


class NoLimits(Admission):
    """Lets every request run."""

    def __init__(self) -> None:
        self.workers = 1

    def meter(self, request_id: str, parties: Sequence[Party], reserved: Estimate) -> Meter:
        return Meter(request_id, tuple(parties), datetime.now(UTC), reserved)

    async def grant(self, meter: Meter) -> None:
        """Nothing is limited."""

    def end(self, meter: Meter) -> None:
        """Nothing was taken."""

    async def start(self) -> None:
        """Nobody is counted."""

    async def close(self) -> None:
        """Nothing is open."""


class NoLedger(Recorder):
    """Records nothing."""

    def __init__(self) -> None:
        """Nothing is needed."""

    def start(self) -> None:
        """Nothing is written."""

    async def stop(self) -> None:
        """Nothing is queued."""

    async def record(self, interaction: Interaction, kept: tuple[Held, StoredReply] | None = None) -> None:
        """Forgets it."""


class NoShadows(Shadows):
    """Looks into nothing."""

    def __init__(self) -> None:
        self._running = set()

    def consider(self, asked: Asked, view: TenantView, placed: Placed, given: Outcome) -> None:
        """Learns nothing."""


class NoCache(Cache):
    """Never has an answer."""

    def __init__(self) -> None:
        """Nothing is needed."""

    def begin(self, key: CacheKey) -> None:
        return None

    async def find(self, key: CacheKey, *, servable: Servable, counted: bool = True, looking: Looking | None = None) -> None:
        return None

    def keep(self, key: CacheKey, entry: Entry) -> None:
        """Keeps nothing."""

    async def close(self) -> None:
        """Nothing is open."""
