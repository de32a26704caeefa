"""Who runs a cycle, on a real PostgreSQL: one process at a time, and what a killed one leaves is given up by the next."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tutelage.errors import CycleRunning
from tutelage.records import Interaction, Tenant
from tutelage.settings import CHECKOUT
from tutelage.stores import cycles, gaps, interactions, registry, tenants
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.registry import Decision, Pointer

TENANT = Tenant("ten_a", "acme", "pro")
HOLDER = """
import asyncio, sys
from tutelage.stores import cycles, registry
from tutelage.stores.database import open_pool
async def hold():
    pool = await open_pool(sys.argv[1], size=2)
    async with cycles.alone(pool, "ten_a"):
        await registry.open_cycle(pool, "killed", "ten_a")
        print("held", flush=True)
        await asyncio.sleep(60)
asyncio.run(hold())
"""


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database_url, size=4)
    await tenants.create_tenant(pool, TENANT)
    yield pool
    await pool.close()


async def held(pool: Pool) -> bool:
    ((_, _, seen),) = await cycles.seen(pool, interval=100)
    return seen.running


async def record(pool: Pool, number: int, *, tenant: str = "ten_a", at: datetime | None = None, **changes: Any) -> None:
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=50, deadline_seconds=10)
    recorder.start()
    facts: dict[str, Any] = {
        "tenant_id": tenant, "key_id": "k", "created_at": at or datetime.now(UTC), "messages": [{"role": "user", "content": "?"}],
        "prompt_hash": b"h", "answer": "4", "model": "teacher", "tier": "teacher", "route": "cascade", "reason": "", "cache": "miss",
        "domain": "sums", "given_domain": None, "confidence": None, "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 1,
        "tokens_estimated": False, "cost_microusd": 30, "latency_ms": 12,
    }  # fmt: skip
    for name in range(number):
        await recorder.record(Interaction(**(facts | {"request_id": f"{tenant}-{id(facts)}-{name}"} | changes)))
    await recorder.stop()


async def test_a_tenant_has_one_cycle_at_a_time_and_another_tenant_its_own(pool: Pool) -> None:
    await tenants.create_tenant(pool, Tenant("ten_b", "bolt", "pro"))
    async with cycles.alone(pool, TENANT.id), cycles.alone(pool, "ten_b"):
        with pytest.raises(CycleRunning, match="wait for it to end"):
            async with cycles.alone(pool, TENANT.id):
                pass

    async with cycles.alone(pool, TENANT.id) as cut_off:
        assert cut_off == []


async def test_what_a_killed_cycle_left_is_given_up_by_the_next(pool: Pool, database_url: str) -> None:
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, database_url, cwd=CHECKOUT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"held\n"
    assert await held(pool)
    for name in ("judged", "taught", "serving", "refused"):
        await registry.spawn(pool, tenant_id=TENANT.id, domain=name, student=name, cycle_id="killed", folder="/s")
    await registry.complete_version(pool, "judged", 1, status="ta")
    await registry.complete_version(pool, "refused", 1, status="refused")
    await registry.complete_version(pool, "serving", 1, status="ta", digest="d", calibrator={})
    serves = Decision(TENANT.id, "serving", "promote", "serving", 1, Pointer(1, "serving", 1, "ta"), "good", {})
    await registry.decide(pool, serves, expected=0)
    holder.kill()
    await holder.wait()

    async with cycles.alone(pool, TENANT.id) as cut_off:
        assert cut_off == ["killed"]
    versions = await registry.list_versions(pool)
    assert {v["student"]: v["status"] for v in versions} == {
        "judged": "abandoned", "taught": "abandoned", "serving": "ta", "refused": "refused",
    }  # fmt: skip
    assert set(gaps.newest(versions, TENANT.id)) == {"serving", "refused"}, "what an abandoned version learned from may be learned again"


async def test_whoever_loses_the_lock_with_its_connection_stops(pool: Pool) -> None:
    begun = asyncio.Event()

    async def cycle() -> None:
        async with cycles.alone(pool, TENANT.id):
            begun.set()
            await asyncio.sleep(30)

    running = asyncio.create_task(cycle())
    await begun.wait()
    await pool.execute("select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and classid = $1", cycles.LOCK)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 5)


async def test_interactions_are_counted_since_the_last_finished_cycle_began_by_tenant(pool: Pool) -> None:
    await tenants.create_tenant(pool, Tenant("ten_b", "bolt", "pro"))
    await record(pool, 3, at=datetime.now(UTC) - timedelta(hours=1))
    await registry.open_cycle(pool, "c1", TENANT.id)
    await registry.close_cycle(pool, "c1", status="finished", summary={})
    await record(pool, 4)
    await record(pool, 2, endpoint="embeddings", messages=None)
    await registry.open_cycle(pool, "c2", TENANT.id)
    await registry.close_cycle(pool, "c2", status="failed", summary={})
    await record(pool, 9, tenant="ten_b")
    found = {name: seen for _, name, seen in await cycles.seen(pool, interval=7)}

    assert (found["acme"].fresh, found["acme"].failures, found["acme"].cut_off) == (4, 1, False)
    assert (found["bolt"].fresh, found["bolt"].failures) == (7, 0), "no further than the interval"


async def test_a_cycle_that_nobody_runs_any_more_counts_as_cut_off(pool: Pool) -> None:
    await registry.open_cycle(pool, "c1", TENANT.id)
    ((_, _, seen),) = await cycles.seen(pool, interval=100)

    assert (seen.cut_off, seen.running, seen.failures) == (True, False, 1)


async def test_tenants_that_nothing_may_be_learned_from_have_no_cycles(pool: Pool) -> None:
    await tenants.change_tenant(pool, TENANT.id, "training", "off")

    assert await cycles.seen(pool, interval=100) == []
