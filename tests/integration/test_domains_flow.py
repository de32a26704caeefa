"""A cycle sorts what was asked into domains on a real PostgreSQL, and encodes nothing that was encoded before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import traffic
from flows.workshop import Cycle
from tutelage.records import Interaction, Tenant
from tutelage.settings import CHECKOUT
from tutelage.stores import interactions, tenants
from tutelage.stores.database import Pool, open_pool

TENANT = Tenant("ten_a", "acme", "pro")
KINDS = ("What is the capital of", "Add up")
CENTRES = np.eye(2, 32, dtype="f4")


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database_url, size=2)
    await tenants.create_tenant(pool, TENANT)
    yield pool
    await pool.close()


async def record(pool: Pool, first: int, count: int) -> None:
    """So many requests, of both kinds in turn, which nobody has encoded."""
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=100, deadline_seconds=20)
    recorder.start()
    for number in range(first, first + count):
        prompt = f"{KINDS[number % 2]} {number}"
        facts: dict[str, Any] = {
            "request_id": f"r{number}", "tenant_id": TENANT.id, "key_id": "k", "created_at": datetime.now(UTC),
            "messages": [{"role": "user", "content": prompt}], "prompt_hash": b"h", "answer": "4", "model": "big", "tier": "teacher",
            "route": "cascade", "reason": "", "cache": "miss", "domain": None, "given_domain": None, "confidence": None,
            "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 1, "tokens_estimated": False, "cost_microusd": 30,
            "latency_ms": 12, "embedding": None,
        }  # fmt: skip
        await recorder.record(Interaction(**facts))
    await recorder.stop()


def encode(_cycle: Cycle, prompts: list[str]) -> Any:
    """Near its kind's centre."""
    rng = np.random.default_rng(len(prompts))
    vectors = CENTRES[[KINDS.index(prompt.rsplit(" ", 1)[0]) for prompt in prompts]] + rng.normal(scale=0.05, size=(len(prompts), 32))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("f4")


async def test_a_later_cycle_encodes_only_what_came_since(
    pool: Pool, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def counted(cycle: Cycle, prompts: list[str]) -> Any:
        encoded.append(len(prompts))
        return encode(cycle, prompts)

    monkeypatch.setattr(traffic, "_embed", counted)
    cycle = Cycle("c1", TENANT.id, TENANT.name, tmp_path, CHECKOUT / "configs", database_url)
    await record(pool, 0, 120)
    assert await traffic.find_domains.fn(cycle) == 120
    await record(pool, 120, 40)
    assert await traffic.find_domains.fn(cycle) == 160

    assert encoded == [120, 40]
    rows = await interactions.read_interactions(pool, TENANT.id, limit=1000)
    domains = [{row["domain"] for row in rows if row["messages"][0]["content"].startswith(kind)} for kind in KINDS]
    assert [len(names) for names in domains] == [1, 1]
    assert domains[0] != domains[1]
    assert all(len(row["embedding"]) == 4 * 32 for row in rows)
