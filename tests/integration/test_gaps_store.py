"""The gap ledger on a real PostgreSQL: what an interaction reveals is there as soon as it is durable."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from flows.traffic import recalled
from tutelage import operations
from tutelage.evolution.evidence import Tally
from tutelage.evolution.gaps import EvolveSettings, measure
from tutelage.records import Attempt, Feedback, Interaction, Tenant
from tutelage.settings import Home
from tutelage.stores import gaps, interactions, registry, tenants
from tutelage.stores.database import Pool, open_pool

TENANT = Tenant("ten_a", "acme", "pro")


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database_url, size=2)
    await tenants.create_tenant(pool, TENANT)
    yield pool
    await pool.close()


def interaction(number: int, **changes: Any) -> Interaction:
    facts: dict[str, Any] = {
        "request_id": f"r{number}", "tenant_id": TENANT.id, "key_id": "k", "created_at": datetime.now(UTC) - timedelta(hours=12),
        "messages": [{"role": "user", "content": f"question {number}"}], "prompt_hash": b"h", "answer": "4", "model": "teacher",
        "tier": "teacher", "route": "cascade", "reason": "", "cache": "miss", "domain": "sums", "given_domain": None,
        "confidence": None, "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 1, "tokens_estimated": False,
        "cost_microusd": 30, "latency_ms": 12, "attempts": (),
    }  # fmt: skip
    return Interaction(**(facts | changes))


async def record(pool: Pool, rows: list[Interaction]) -> None:
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=50, deadline_seconds=10)
    recorder.start()
    for row in rows:
        await recorder.record(row)
    await recorder.stop()


async def test_requests_failures_escalations_and_money_are_counted_by_domain(pool: Pool) -> None:
    attempt = Attempt("acme-sums", "student", "d1", "5", 0.3, 0.7, False, "below 0.85", 3)
    await record(
        pool,
        [
            interaction(1, attempts=(attempt,)),
            interaction(2),
            interaction(3, tier="student"),
            interaction(4, tier="student"),
            interaction(5, cache="hit-exact"),
            interaction(6, domain="dates"),
            interaction(7, domain=None),
        ],
    )
    await interactions.add_feedback(pool, Feedback("r4", TENANT.id, 0.0, "5", None))
    dates, sums = await gaps.traffic(pool, TENANT.id, rows=100, since={}, recalled={"dates": Tally(3)})

    assert (sums.known, sums.requests, sums.failed, sums.escalated, sums.cost_microusd) == (4, 4, 3, 1, 120)
    assert sums.days == pytest.approx(0.5, abs=0.01)
    assert (dates.requests, dates.recalled) == (1, Tally(3))


async def test_what_a_student_answers_that_became_a_teacher_is_no_gap(pool: Pool) -> None:
    sure = Attempt("acme-sums", "teacher", "d1", "4", 0.3, 0.9, True, "0.90 reaches 0.85", 3)
    unsure = Attempt("acme-sums", "teacher", "d1", "5", 0.3, 0.7, False, "below 0.85", 3)
    await record(pool, [interaction(1, model="acme-sums", attempts=(sure,)), interaction(2, attempts=(unsure,)), interaction(3)])
    (sums,) = await gaps.traffic(pool, TENANT.id, rows=100, since={}, recalled={})

    assert (sums.requests, sums.failed, sums.escalated) == (3, 2, 1)


async def test_only_what_came_after_the_newest_student_is_a_gap_still(pool: Pool) -> None:
    await record(pool, [interaction(1, created_at=datetime.now(UTC) - timedelta(days=2)), interaction(2)])
    (sums,) = await gaps.traffic(pool, TENANT.id, rows=100, since={"sums": datetime.now(UTC) - timedelta(days=1)}, recalled={})

    assert (sums.known, sums.requests) == (2, 1)


async def test_the_listing_shows_a_gap_at_once_and_what_a_cycle_measured_beside_it(pool: Pool, home: Home) -> None:
    await record(pool, [interaction(number) for number in range(120)])
    await registry.open_cycle(pool, "c1", TENANT.id)
    found = await gaps.traffic(pool, TENANT.id, rows=1000, since={}, recalled={"sums": Tally(99, 0, 1)})
    await gaps.keep(pool, "c1", TENANT.id, measure(found, EvolveSettings(), tried={}))
    (row,) = await operations.OPERATIONS["gaps"](pool, home, argparse.Namespace())  # type: ignore[misc]

    assert (row["domain"], row["requests"], row["decision"], row["kind"]) == ("sums", 120, "train", "knowledge")
    assert json.loads(json.dumps(row, default=str))["failure_95"][1] == 1.0


async def test_training_of_today_is_counted_against_the_budget(pool: Pool) -> None:
    await registry.open_cycle(pool, "c1", TENANT.id)
    await registry.spawn(pool, tenant_id=TENANT.id, domain="sums", student="acme-sums", cycle_id="c1", folder="/s")
    assert await gaps.trained_today(pool, TENANT.id) == 0
    await registry.complete_version(pool, "acme-sums", 1, evidence={"core_seconds": 40.5})

    assert await gaps.trained_today(pool, TENANT.id) == 40.5


def test_the_baseline_answers_with_the_most_similar_other_requests_answer() -> None:
    def row(vector: list[float], answer: str, **changes: Any) -> dict[str, Any]:
        return {
            "domain": "faq", "tier": "teacher", "finish_reason": "stop", "cache": "miss", "feedback_label": None, "answer": answer,
            "messages": [{"role": "user", "content": "?"}], "embedding": np.array(vector, dtype="f4").tobytes(),
        } | changes  # fmt: skip

    rows = [row([1, 0], "Paris"), row([0.99, 0.14], "paris."), row([0, 1], "42"), row([0.05, 1], "43"), row([1, 0], "x", tier="student")]
    assert recalled(rows) == {"faq": Tally(2, 0, 2)}
