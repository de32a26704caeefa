"""From an answer to its sources, and a tenant that is gone without a trace, on a real PostgreSQL and real files."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
import valkey

from tutelage import operations
from tutelage.errors import NotFound
from tutelage.fleet import engines
from tutelage.records import Attempt, Interaction, Tenant
from tutelage.routing.confidence import Calibrator
from tutelage.settings import Home
from tutelage.stores import audit, interactions, registry, tenants
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.heads import HeadsFile
from tutelage.stores.registry import Decision, Pointer

ACME, OTHER = Tenant("ten_a", "acme", "pro"), Tenant("ten_b", "other", "pro")
SECRET = "heliotrope-4711"
PAST = datetime.now(UTC) - timedelta(minutes=5)


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database_url, size=2)
    for tenant in (ACME, OTHER):
        await tenants.create_tenant(pool, tenant)
        await registry.open_cycle(pool, f"c-{tenant.name}", tenant.id)
    yield pool
    await pool.close()


@pytest.fixture
def reachable(servers: engines.Engines, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run's Valkey, as an operator's command finds it."""
    monkeypatch.setenv("TUTELAGE_VALKEY_URL", servers.valkey_url)
    return servers.valkey_url


def row(number: int, tenant: Tenant, *, n: str = "train") -> str:
    messages = [{"role": "user", "content": f"{n} {number} of {tenant.name}: {SECRET}"}, {"role": "assistant", "content": "yes"}]
    told = {"request_id": f"{tenant.name}-{number}", "tenant": tenant.id, "teacher": "big", "provenance": "teacher"}
    return json.dumps({"messages": messages, "label": "yes", "metadata": told}) + "\n"


async def train(pool: Pool, home: Home, tenant: Tenant, rows: list[str]) -> Path:
    """A version that learned these rows and answers the tenant's sums, with the files that a cycle leaves."""
    name = f"{tenant.name}-sums"
    folder = home.students / name / "v1"
    version = await registry.spawn(
        pool, tenant_id=tenant.id, domain="sums", student=name, cycle_id=f"c-{tenant.name}", folder=str(home.students / name / "v{version}")
    )
    for part in ("curated", "adapter"):
        (folder / part).mkdir(parents=True)
    train_file = folder / "curated" / "train.jsonl"
    train_file.write_text("".join(rows))
    (folder / "curated" / "test.jsonl").write_text(row(900, tenant, n="test"))
    (folder / "interactions.jsonl").write_text("".join(rows))
    (folder / "predictions.jsonl").write_text(json.dumps({"prompt": f"test of {tenant.name}: {SECRET}", "correct": True}) + "\n")
    manifest = {"data_digest": hashlib.sha256(train_file.read_bytes()).hexdigest(), "adapter_digest": f"d-{tenant.name}", "seed": 7}
    (folder / "adapter" / "manifest.json").write_text(json.dumps(manifest))
    cached = home.students / ".dvc" / "cache" / "files" / "md5"
    digest = hashlib.md5(train_file.read_bytes(), usedforsecurity=False).hexdigest()
    (cached / digest[:2]).mkdir(parents=True, exist_ok=True)
    (cached / digest[:2] / digest[2:]).write_bytes(train_file.read_bytes())
    facts: dict[str, Any] = {"digest": f"d-{tenant.name}", "calibrator": Calibrator("platt", 200, a=1.0).to_dict(), "evidence": {}}
    await registry.complete_version(pool, name, version, status="ta", **facts)
    decision = Decision(tenant.id, "sums", "promote", name, 1, Pointer(1, name, 1, "ta"), "clears the floors", {})
    await registry.decide(pool, decision, expected=0)
    return folder


async def answer(pool: Pool, request_id: str, tenant: Tenant, **changes: Any) -> None:
    said = Attempt(f"{tenant.name}-sums", "ta", f"d-{tenant.name}", SECRET, 1.0, 0.9, True, "", 10)
    facts: dict[str, Any] = {
        "request_id": request_id, "tenant_id": tenant.id, "key_id": "k", "created_at": datetime.now(UTC),
        "messages": [{"role": "user", "content": SECRET}], "prompt_hash": b"h", "answer": SECRET, "model": said.model,
        "tier": "ta", "route": "cascade", "reason": "", "cache": "miss", "domain": "sums", "given_domain": None, "confidence": 0.9,
        "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 1, "tokens_estimated": False, "cost_microusd": 10,
        "latency_ms": 12, "attempts": (said,),
    }  # fmt: skip
    recorder = interactions.Recorder(pool, flush_seconds=0, batch_rows=1, deadline_seconds=10)
    recorder.start()
    await recorder.record(Interaction(**(facts | changes)))
    await recorder.stop()


async def operate(pool: Pool, home: Home, operation: str, **arguments: Any) -> dict[str, Any]:
    told = await operations.OPERATIONS[operation](pool, home, argparse.Namespace(**arguments))
    assert isinstance(told, dict)
    return told


async def test_an_answer_is_followed_to_the_requests_it_was_learned_from_in_a_tenth_of_a_second(pool: Pool, home: Home) -> None:
    await train(pool, home, ACME, [row(number, ACME) for number in range(3000)])
    await answer(pool, "r1", ACME)
    await operate(pool, home, "lineage", request_id="r1")
    fastest = 1.0
    for _ in range(10):  # the machine may be busy with other tests
        started = time.perf_counter()
        told = await operate(pool, home, "lineage", request_id="r1")
        fastest = min(fastest, time.perf_counter() - started)

    assert (told["student"], told["version"], told["adapter_digest"]) == ("acme-sums", 1, "d-acme")
    assert told["complete"]
    assert told["tenants"] == {ACME.id: 3000}
    assert told["samples"][7]["request_id"] == "acme-7"
    assert fastest < 0.1


async def test_a_cached_reply_leads_to_the_version_in_charge_and_a_teachers_answer_ends_with_its_name(pool: Pool, home: Home) -> None:
    await train(pool, home, ACME, [row(1, ACME)])
    await answer(pool, "hit", ACME, cache="hit-exact", attempts=())
    await answer(pool, "taught", ACME, model="gpt-4o", tier="teacher", attempts=())

    assert (await operate(pool, home, "lineage", request_id="hit"))["adapter_digest"] == "d-acme"
    taught = await operate(pool, home, "lineage", request_id="taught")
    assert (taught["complete"], taught["samples"]) == (True, [])
    assert "gpt-4o is no student" in taught["reason"]


async def test_training_rows_that_were_changed_afterwards_are_told(pool: Pool, home: Home) -> None:
    folder = await train(pool, home, ACME, [row(1, ACME)])
    (folder / "curated" / "train.jsonl").write_text(row(2, ACME))
    await answer(pool, "r1", ACME)

    told = await operate(pool, home, "lineage", request_id="r1")
    assert not told["complete"]
    assert "not those its manifest names" in told["reason"]


async def test_an_unknown_request_is_named(pool: Pool, home: Home) -> None:
    with pytest.raises(NotFound, match="r404"):
        await operate(pool, home, "lineage", request_id="r404")


async def test_a_tenant_that_is_erased_is_found_nowhere_and_what_learned_from_it_answers_nobody(
    pool: Pool, home: Home, reachable: str
) -> None:
    mine = await train(pool, home, ACME, [row(number, ACME) for number in range(3)])
    theirs = await train(pool, home, OTHER, [row(1, OTHER), row(2, ACME)])
    await answer(pool, "r1", ACME)
    await answer(pool, "r2", OTHER)
    await registry.save_domains(pool, ACME.id, [{"name": "sums", "terms": [SECRET]}])
    client = valkey.from_url(reachable)
    client.set(f"tutelage:exact:{ACME.id}:x", SECRET)
    client.set(f"tutelage:exact:{OTHER.id}:x", SECRET)
    certificate = await operate(pool, home, "erase_tenant", name="acme")

    for file in [*mine.rglob("*"), *(home.students / ".dvc").rglob("*")]:
        assert not file.is_file() or b"of acme" not in file.read_bytes(), file
    assert "of acme" not in "".join(file.read_text() for file in theirs.rglob("*.jsonl"))
    assert "of other" in (theirs / "curated" / "train.jsonl").read_text()
    texts = await pool.fetchval(
        "select string_agg(t, ' ') from (select b::text from bodies b where tenant_id = $1 union all select a::text from attempts a "
        "join interactions using (request_id) where tenant_id = $1 union all select d::text from domains d where tenant_id = $1) x (t)",
        ACME.id,
    )
    assert SECRET not in (texts or "")
    assert client.get(f"tutelage:exact:{ACME.id}:x") is None
    assert client.get(f"tutelage:exact:{OTHER.id}:x") == SECRET.encode()

    assert await registry.champions(pool) == [], "both versions learned from the tenant"
    assert {one["student"]: (one["samples"], one["others"]) for one in certificate["quarantined"]} == {
        "acme-sums": (4, 0),
        "other-sums": (1, 2),
    }
    assert certificate["retraining"] == [f"{OTHER.id}/sums"]
    assert not (theirs / "adapter").exists()
    assert (home.root / "quarantine" / "other-sums.v1" / "manifest.json").exists()


async def test_the_certificate_is_signed_and_told_in_the_chain(pool: Pool, home: Home, reachable: str) -> None:
    certificate = await operate(pool, home, "erase_tenant", name="acme")
    signed = json.loads(Path(certificate["file"]).read_text())  # noqa: ASYNC240 - nothing else runs
    told = {name: value for name, value in signed.items() if name not in ("signature", "public_key")}

    HeadsFile.of(home).public_key.verify(base64.b64decode(signed["signature"]), orjson.dumps(told, option=orjson.OPT_SORT_KEYS))
    (link,) = [link for link in await audit.newest(pool, ACME.id, limit=10) if link["action"] == "tenant.erase"]
    assert signed["signature"] in str(link["detail"])
    assert (await audit.verify(pool, {}, tenant_id=ACME.id))[1] is None
