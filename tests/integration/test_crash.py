"""SIGKILL to PostgreSQL in the middle of traffic: what was acknowledged is there afterwards, and the store comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import UTC, datetime

import pytest

from tutelage.errors import Unavailable
from tutelage.fleet import engines
from tutelage.records import Interaction, Tenant
from tutelage.settings import Home
from tutelage.stores import tenants
from tutelage.stores.database import open_pool
from tutelage.stores.interactions import Recorder

pytestmark = pytest.mark.slow
WRITERS = 8


def interaction(request_id: str) -> Interaction:
    return Interaction(
        request_id=request_id, tenant_id="ten_a", key_id="k", created_at=datetime(2026, 1, 1, tzinfo=UTC), messages=[], prompt_hash=b"",
        answer="4", model="big", tier="teacher", route="always-teacher", reason="", cache="miss", domain=None, given_domain=None,
        confidence=None, finish_reason="stop", prompt_tokens=1, completion_tokens=1, tokens_estimated=False, cost_microusd=1, latency_ms=1,
    )  # fmt: skip


async def traffic_until_the_database_dies(url: str, postmaster: int) -> tuple[set[str], int]:
    """Writers that record one interaction after another until one is refused; what was acknowledged, and how many were refused."""
    pool = await open_pool(url, size=2)
    await tenants.create_tenant(pool, Tenant("ten_a", "acme", "pro"))
    recorder = Recorder(pool, flush_seconds=0.001, batch_rows=50, deadline_seconds=5)
    recorder.start()
    acknowledged: set[str] = set()
    enough = asyncio.Event()

    async def writer(name: int) -> None:
        for number in range(100_000):
            await recorder.record(interaction(f"{name}-{number}"))
            acknowledged.add(f"{name}-{number}")
            if len(acknowledged) >= 200:
                enough.set()

    running = [asyncio.create_task(writer(n)) for n in range(WRITERS)]
    await asyncio.wait_for(enough.wait(), 30)
    os.kill(postmaster, signal.SIGKILL)
    ends = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 30)
    pool.terminate()
    return acknowledged, sum(isinstance(end, Unavailable) for end in ends)


async def recorded(url: str) -> set[str]:
    pool = await open_pool(url, size=1)
    try:
        return {row["request_id"] for row in await pool.fetch("select request_id from interactions")}
    finally:
        await pool.close()


def test_every_acknowledged_interaction_survives_sigkill_and_the_rest_was_refused(home: Home) -> None:
    try:
        url = engines.start_database(home)
        postmaster = engines.postmaster(home)
        assert postmaster is not None
        acknowledged, refused = asyncio.run(traffic_until_the_database_dies(url, postmaster))
        assert refused == WRITERS

        again = engines.start_database(home)
        assert acknowledged <= asyncio.run(recorded(again))
        assert len(acknowledged) >= 200
    finally:
        engines.stop(home)
