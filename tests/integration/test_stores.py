"""The store on a real PostgreSQL: what is acknowledged is there, and the ledger moves by compare-and-set."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from tutelage.errors import InvalidRequest, NotFound, PromotionConflict, Unavailable
from tutelage.records import Attempt, Feedback, Interaction, Tenant
from tutelage.stores import interactions, registry, tenants
from tutelage.stores.database import Pool, migrate, open_pool
from tutelage.stores.registry import Decision, Pointer

TENANT = Tenant("ten_a", "acme", "pro")


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database_url, size=4)
    await tenants.create_tenant(pool, TENANT)
    yield pool
    await pool.close()


def interaction(number: int, **changes: Any) -> Interaction:
    attempt = Attempt("acme-sums", "student", "d1", "5", 0.3, 0.7, False, "below 0.85", 3)
    facts: dict[str, Any] = {
        "request_id": f"r{number}", "tenant_id": TENANT.id, "key_id": "k", "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "messages": [{"role": "user", "content": f"question {number}"}], "prompt_hash": b"h", "answer": "4", "model": "teacher",
        "tier": "teacher", "route": "cascade", "reason": "below 0.85", "cache": "miss", "domain": "sums", "given_domain": None,
        "confidence": None, "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 1, "tokens_estimated": False,
        "cost_microusd": 30, "latency_ms": 12, "attempts": (attempt,),
    }  # fmt: skip
    return Interaction(**(facts | changes))


async def test_concurrent_interactions_are_written_together_and_all_are_there_when_acknowledged(pool: Pool) -> None:
    recorder = interactions.Recorder(pool, flush_seconds=0.002, batch_rows=50, deadline_seconds=5)
    recorder.start()
    await asyncio.gather(*(recorder.record(interaction(n)) for n in range(120)))
    await recorder.stop()

    rows = await interactions.read_interactions(pool, TENANT.id, limit=1000)
    assert {row["request_id"] for row in rows} == {f"r{n}" for n in range(120)}
    assert all(row["attempts"] == [Attempt("acme-sums", "student", "d1", "5", 0.3, 0.7, False, "below 0.85", 3)] for row in rows)
    transactions = await pool.fetchval("select count(distinct xmin::text) from interactions")
    assert transactions < 40, "120 concurrent answers should share a few commits"


async def test_a_request_given_up_for_lost_that_is_answered_after_all_is_on_the_bill_once_as_it_was(pool: Pool) -> None:
    lost = {"tenant_id": TENANT.id, "key_id": "k", "at": datetime(2026, 1, 1, tzinfo=UTC), "tokens": 900, "cost_microusd": 70}
    assert await interactions.add_lost(pool, request_id="r1", **lost) == (900, 70)
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=10, deadline_seconds=5)
    recorder.start()
    await asyncio.gather(recorder.record(interaction(1)), recorder.record(interaction(2)))
    assert await interactions.add_lost(pool, request_id="r1", **lost) == (8, 30)
    await recorder.stop()
    rows = await pool.fetch("select request_id, cost_microusd from interactions order by request_id")
    assert [tuple(row) for row in rows] == [("r1", 30), ("r2", 30)]


async def test_an_answer_that_cannot_be_recorded_is_refused_and_the_next_one_is_not(pool: Pool) -> None:
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=1, deadline_seconds=5)
    recorder.start()
    await recorder.record(interaction(1))
    with pytest.raises(Unavailable):
        await recorder.record(interaction(1))  # the same id again violates the primary key
    await recorder.record(interaction(2))
    await recorder.stop()

    assert await pool.fetchval("select count(*) from interactions") == 2


async def test_feedback_reaches_only_an_interaction_of_the_same_tenant(pool: Pool) -> None:
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=1, deadline_seconds=5)
    recorder.start()
    await recorder.record(interaction(1))
    await recorder.stop()
    await tenants.create_tenant(pool, Tenant("ten_b", "other", "free"))

    await interactions.add_feedback(pool, Feedback("r1", TENANT.id, 0.0, "5", None))
    await interactions.add_feedback(pool, Feedback("r1", TENANT.id, 1.0, "4", "changed my mind"))
    with pytest.raises(NotFound):
        await interactions.add_feedback(pool, Feedback("r1", "ten_b", 1.0, None, None))

    (row,) = await interactions.read_interactions(pool, TENANT.id, limit=10)
    assert (row["feedback_score"], row["feedback_label"]) == (1.0, "4")


async def test_of_two_writers_that_read_the_same_end_of_the_ledger_one_wins(pool: Pool) -> None:
    await registry.open_cycle(pool, "c1", TENANT.id)
    for _ in range(2):
        await registry.spawn(pool, tenant_id=TENANT.id, domain="sums", student="acme-sums", cycle_id="c1", folder="/s/v{version}")

    def decide(version: int) -> Any:
        champion = Pointer(1, "acme-sums", version, "ta")
        decision = Decision(TENANT.id, "sums", "promote", "acme-sums", version, champion, "better", {"n": 40})
        return registry.decide(pool, decision, expected=0)

    results = await asyncio.gather(decide(1), decide(2), return_exceptions=True)

    assert sum(isinstance(r, PromotionConflict) for r in results) == 1
    (winner,) = [r for r in results if isinstance(r, Pointer)]
    assert await registry.pointer(pool, TENANT.id, "sums") == winner
    with pytest.raises(PromotionConflict):
        await decide(2)


async def test_a_tenant_name_is_taken_once(pool: Pool) -> None:
    with pytest.raises(InvalidRequest, match="acme"):
        await tenants.create_tenant(pool, Tenant("ten_x", "acme", "free"))


async def test_what_changes_routing_moves_the_epoch(pool: Pool) -> None:
    before = await pool.fetchval("select value from epochs")
    await registry.save_domains(pool, TENANT.id, [{"name": "sums"}])
    assert await pool.fetchval("select value from epochs") == before + 1


async def test_migrating_twice_changes_nothing(pool: Pool, database_url: str) -> None:
    await asyncio.to_thread(migrate, database_url)
    assert [t.name for t in await tenants.list_tenants(pool)] == ["acme"]


async def test_commits_wait_for_the_disk(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        assert [await connection.fetchval(f"show {s}") for s in ("synchronous_commit", "fsync")] == ["on", "on"]
    finally:
        await connection.close()
