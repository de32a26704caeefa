"""Canaries in a cycle: no training can read them, and a student that seems to know the judged items alone is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.gate import _leaked, _too_good
from flows.students import Student
from flows.traffic import export
from flows.workshop import Cycle
from tutelage.evolution.canaries import drawn, key_of
from tutelage.records import Interaction, Tenant
from tutelage.settings import CHECKOUT
from tutelage.stores import bodies, canaries, interactions, tenants
from tutelage.stores.database import Pool, open_pool

TENANT = Tenant("ten_a", "acme", "pro")
PROMPTS = [f"question {number}" for number in range(300)]


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    """300 requests of one domain, each with an embedding of its own; the last is almost the first canary."""
    pool = await open_pool(database_url, size=2)
    await tenants.create_tenant(pool, TENANT)
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=100, deadline_seconds=20)
    recorder.start()
    rng = np.random.default_rng(0)
    first = next(place for place, prompt in enumerate(PROMPTS) if drawn(key_of(prompt)))
    vectors = rng.normal(size=(len(PROMPTS) + 1, 32)).astype("f4")
    vectors[-1] = vectors[first] + 1e-3
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for prompt, vector in zip([*PROMPTS, "almost the same"], vectors, strict=True):
        await recorder.record(interaction(prompt, vector.tobytes()))
    await recorder.stop()
    yield pool
    await pool.close()


def interaction(prompt: str, embedding: bytes) -> Interaction:
    facts: dict[str, Any] = {
        "request_id": prompt, "tenant_id": TENANT.id, "key_id": "k", "created_at": datetime.now(UTC),
        "messages": [{"role": "user", "content": prompt}], "prompt_hash": b"h", "answer": "4", "model": "big", "tier": "teacher",
        "route": "cascade", "reason": "", "cache": "miss", "domain": "sums", "given_domain": None, "confidence": None,
        "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 1, "tokens_estimated": False, "cost_microusd": 30,
        "latency_ms": 12, "embedding": embedding,
    }  # fmt: skip
    return Interaction(**facts)


def prompts(file: Path) -> set[str]:
    return {json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()}


async def test_canaries_and_what_is_almost_one_are_in_no_file_that_training_reads(pool: Pool, database_url: str, tmp_path: Path) -> None:
    cycle = Cycle("c1", TENANT.id, TENANT.name, tmp_path, CHECKOUT / "configs", database_url)
    assert await export(cycle, "sums", tmp_path / "v1" / "interactions.jsonl") == 301
    exported, held = prompts(tmp_path / "v1" / "interactions.jsonl"), prompts(tmp_path / "v1" / "canaries.jsonl")

    assert held == {prompt for prompt in PROMPTS if drawn(key_of(prompt))}
    assert held
    assert exported == {*PROMPTS} - held
    await export(cycle, "sums", tmp_path / "v2" / "interactions.jsonl")
    assert prompts(tmp_path / "v2" / "canaries.jsonl") == held, "the same in the next cycle"
    assert {canary.key for canary in await canaries.read(pool, TENANT.id, "sums")} == {key_of(prompt) for prompt in held}


async def test_canaries_are_asked_when_the_window_has_left_them_behind_and_never_once_erased(
    pool: Pool, database_url: str, tmp_path: Path
) -> None:
    await export(Cycle("c1", TENANT.id, TENANT.name, tmp_path, CHECKOUT / "configs", database_url), "sums", tmp_path / "v1" / "i.jsonl")
    held = prompts(tmp_path / "v1" / "canaries.jsonl")
    (tmp_path / "evolve.yaml").write_text("window_rows: 20")
    later = Cycle("c2", TENANT.id, TENANT.name, tmp_path, tmp_path, database_url)

    assert await export(later, "sums", tmp_path / "v2" / "i.jsonl") == 20
    assert prompts(tmp_path / "v2" / "canaries.jsonl") == held

    gone = min(held)
    await bodies.erase(pool, TENANT.id, actor="test", request_id=gone)
    await export(later, "sums", tmp_path / "v3" / "i.jsonl")
    assert prompts(tmp_path / "v3" / "canaries.jsonl") == held - {gone}


def test_a_student_that_knows_the_judged_items_and_not_the_canaries_is_not_believed() -> None:
    report = {"n": 110, "correct": 110, "canaries": {"n": 18, "correct": 8}}

    assert "8 of 18" in (_too_good(report) or "")
    assert _too_good(report | {"canaries": {"n": 18, "correct": 17}}) is None
    assert _too_good(report | {"canaries": {"n": 0, "correct": 0}}) is None


def test_judged_prompts_among_the_training_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "curated").mkdir()
    row = {"messages": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]}
    other = {"messages": [{"role": "user", "content": "3 + 3"}, {"role": "assistant", "content": "6"}]}
    (tmp_path / "curated" / "test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "curated" / "train.jsonl").write_text(json.dumps(other) + "\n")
    student = Student("acme-sums", 1, "sums", tmp_path)
    assert _leaked(student) is None

    (tmp_path / "curated" / "train.jsonl").write_text(json.dumps(other) + "\n" + json.dumps(row) + "\n")
    assert _leaked(student) == "1 of 1 held-out prompts were trained on"
