"""The audit chain on a real PostgreSQL: every request has one link, every change to the past is found, erasing breaks nothing."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.errors import AuditBroken, Unavailable
from tutelage.records import Attempt, Interaction, Tenant
from tutelage.settings import Home
from tutelage.stores import audit, bodies, interactions, tenants
from tutelage.stores.audit import Break
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.heads import HeadsExporter, HeadsFile

NOW = datetime(2026, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
A, B = Tenant("ten_a", "acme", "pro"), Tenant("ten_b", "bolt", "free")


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    opened = await open_pool(database_url)
    for tenant in (A, B):  # without a link of their own, so that the tests count only theirs
        await opened.execute("insert into tenants (id, name, tier) values ($1, $2, $3)", tenant.id, tenant.name, tenant.tier)
    yield opened
    await opened.close()


def interaction(tenant: Tenant = A, **changes: Any) -> Interaction:
    values: dict[str, Any] = {
        "request_id": uuid.uuid4().hex,
        "tenant_id": tenant.id,
        "key_id": "k1",
        "created_at": NOW,
        "messages": [{"role": "user", "content": "Who is Böb?"}],
        "prompt_hash": b"\x01" * 32,
        "answer": "nobody",
        "model": "big",
        "tier": "teacher",
        "route": "direct",
        "reason": "",
        "cache": "miss",
        "domain": None,
        "given_domain": None,
        "confidence": None,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "tokens_estimated": False,
        "cost_microusd": 7,
        "latency_ms": 5,
        "embedding": b"\x00\x01",
    }
    return Interaction(**(values | changes))


def recorder(pool: Pool) -> interactions.Recorder:
    made = interactions.Recorder(pool, flush_seconds=0.001, batch_rows=50, deadline_seconds=10)
    made.start()
    return made


async def record(pool: Pool, *rows: Interaction) -> None:
    writing = recorder(pool)
    await asyncio.gather(*(writing.record(row) for row in rows))
    await writing.stop()


async def check(pool: Pool, exported: dict[str, dict[int, bytes]] | None = None) -> Break | None:
    """The first break of any chain or of the ledger."""
    return (await audit.verify(pool, exported or {}))[1]


async def tamper(pool: Pool, *statements: str) -> None:
    """As somebody with all rights in the database would."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("set local session_replication_role = replica")
        for statement in statements:
            await connection.execute(statement)


async def test_every_recorded_request_has_one_link_that_tells_its_cost_and_none_of_its_text(pool: Pool) -> None:
    row = interaction(cost_microusd=42)
    await record(pool, row)
    (link,) = await audit.newest(pool, A.id, limit=10)
    assert (link["subject"], link["actor"], link["detail"]["cost_microusd"]) == (row.request_id, "k1", 42)
    assert "nobody" not in str(link)
    assert "Böb" not in str(link)
    assert await check(pool) is None


async def test_workers_that_record_for_the_same_tenants_at_once_make_one_unbroken_chain_each(pool: Pool, database_url: str) -> None:
    other = await open_pool(database_url)
    writers = [recorder(pool), recorder(other), recorder(other)]
    rows = [interaction((A, B)[n % 2], cost_microusd=n) for n in range(300)]
    await asyncio.gather(*(writers[n % 3].record(row) for n, row in enumerate(rows)))
    for writer in writers:
        await writer.stop()
    await other.close()
    assert await check(pool) is None
    counted = await pool.fetch("select tenant_id, sequence from audit_heads order by tenant_id")
    assert [(r["tenant_id"], r["sequence"]) for r in counted if r["tenant_id"].startswith("ten_")] == [("ten_a", 150), ("ten_b", 150)]
    assert await pool.fetchval("select sum(cost_microusd) from interactions") == sum(range(300))


async def test_an_interaction_of_nobody_is_refused_and_those_beside_it_are_recorded(pool: Pool) -> None:
    writing = recorder(pool)
    stranger = Tenant("ten_nobody", "nobody", "free")
    told = await asyncio.gather(*(writing.record(interaction(tenant)) for tenant in (A, stranger, B, stranger)), return_exceptions=True)
    await writing.stop()
    assert [type(one) for one in told] == [type(None), Unavailable, type(None), Unavailable]
    assert await pool.fetch("select tenant_id from interactions order by tenant_id") == [(A.id,), (B.id,)]
    assert await pool.fetchval("select count(*) from bodies") == 2
    assert await pool.fetchval("select count(*) from audit_heads where tenant_id = $1", stranger.id) == 0
    assert await check(pool) is None


MUTATIONS = {
    "a changed row": ["update audit set detail = replace(detail, '\"cost_microusd\":7', '\"cost_microusd\":1') where sequence = 3"],
    "a row taken out": ["delete from audit where sequence = 3"],
    "two rows swapped": [
        "update audit set sequence = -3 where sequence = 3",
        "update audit set sequence = 3 where sequence = 4",
        "update audit set sequence = 4 where sequence = -3",
    ],
    "a forged hash": ["update audit set hash = sha256('x') where sequence = 3"],
    "an end cut off": ["delete from audit where sequence > 3"],
    "an end cut off, head and all": [
        "delete from interactions where request_id in (select subject from audit where sequence > 3)",
        "delete from audit where sequence > 3",
        "update audit_heads h set sequence = 3, hash = (select hash from audit a where a.tenant_id = h.tenant_id and sequence = 3)",
    ],
    "a bill made smaller": ["update interactions set cost_microusd = 1 where request_id = (select subject from audit where sequence = 3)"],
    "a bill taken out": ["delete from interactions where request_id = (select subject from audit where sequence = 3)"],
    "a bill that was never recorded": [
        'insert into interactions select (jsonb_populate_record(i, \'{"request_id": "forged"}\')).* from interactions i limit 1'
    ],
}


@pytest.mark.parametrize("mutation", MUTATIONS)
async def test_every_change_to_the_past_is_found(pool: Pool, home: Home, mutation: str) -> None:
    for _ in range(6):
        await record(pool, interaction())
    file = HeadsFile.of(home)
    assert await HeadsExporter(pool, file, seconds=60).export() == 1
    assert await check(pool, file.read()) is None
    await tamper(pool, *MUTATIONS[mutation])
    assert await check(pool, file.read()) is not None


async def test_a_chain_that_is_written_anew_differs_from_its_exported_head(pool: Pool, home: Home) -> None:
    await record(pool, interaction(cost_microusd=7))
    file = HeadsFile.of(home)
    await HeadsExporter(pool, file, seconds=60).export()
    await tamper(pool, "delete from audit", "delete from audit_heads", "delete from interactions")
    await record(pool, interaction(cost_microusd=1))
    broken = await check(pool, file.read())
    assert broken is not None
    assert "written anew" in broken.reason


async def test_workers_that_export_in_turn_write_each_head_once_and_mend_what_a_crash_left(pool: Pool, home: Home) -> None:
    file = HeadsFile.of(home)
    one, other = HeadsExporter(pool, file, seconds=60), HeadsExporter(pool, file, seconds=60)
    await record(pool, interaction())
    assert (await one.export(), await other.export()) == (1, 0)
    with file.path.open("ab") as crashed:
        crashed.write(b'{"tenant_id": "ten_a", "seq')
    await record(pool, interaction())
    assert (await other.export(), await one.export()) == (1, 0)
    assert sorted(file.read()[A.id]) == [1, 2]
    assert file.newest()[A.id]["sequence"] == 2


async def test_a_head_with_another_signature_is_refused(pool: Pool, home: Home) -> None:
    await record(pool, interaction())
    file = HeadsFile.of(home)
    await HeadsExporter(pool, file, seconds=60).export()
    file.path.write_text(file.path.read_text().replace('"sequence":1', '"sequence":2'))
    with pytest.raises(AuditBroken, match=r"heads\.jsonl:1"):
        file.read()


async def test_the_database_itself_lets_nobody_change_the_chain_or_the_bill(pool: Pool) -> None:
    await record(pool, interaction())
    for statement in (
        "delete from audit", "update audit set actor = 'nobody'", "truncate audit",
        "delete from interactions", "update interactions set cost_microusd = 0", "update interactions set tenant_id = 'ten_b'",
    ):  # fmt: skip
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await pool.execute(statement)
    await interactions.set_routing(pool, [((await audit.newest(pool, A.id, limit=1))[0]["subject"], "sums", b"\x02")])
    assert await check(pool) is None


async def test_erasing_leaves_the_bill_and_the_chain_and_nothing_of_the_text(pool: Pool) -> None:
    kept = interaction(B)
    gone = interaction(attempts=(Attempt("s", "student", None, "a secret try", 0.1, 0.2, False, "", 3),))
    await record(pool, gone, kept)
    assert await bodies.erase(pool, A.id, actor="cli:me") == 1
    assert await bodies.erase(pool, A.id, actor="cli:me") == 0
    assert await check(pool) is None
    left = await pool.fetchrow("select * from interactions where request_id = $1", gone.request_id)
    assert (left["cost_microusd"], left["embedding"], left["prompt_hash"]) == (7, None, b"")
    assert await pool.fetchval("select answer from attempts") == ""
    assert [row["request_id"] for row in await pool.fetch("select request_id from bodies")] == [kept.request_id]
    assert await interactions.read_interactions(pool, A.id, limit=10) == []
    assert (await audit.newest(pool, A.id, limit=1))[0]["kind"] == "erasure"


async def test_what_is_older_than_its_tenant_keeps_is_swept_away(pool: Pool) -> None:
    await tenants.change_tenant(pool, A.id, "retention_days", 30)
    now = datetime.now(UTC)
    old, new = interaction(created_at=now - timedelta(days=31)), interaction(created_at=now - timedelta(days=29))
    await record(pool, old, new, interaction(B, created_at=now - timedelta(days=400)))
    assert await bodies.sweep(pool) == 1
    assert {row["request_id"] for row in await pool.fetch("select request_id from bodies where tenant_id = 'ten_a'")} == {new.request_id}
    assert await pool.fetchval("select count(*) from bodies where tenant_id = 'ten_b'") == 1
    assert await check(pool) is None


async def test_a_row_that_cannot_be_recorded_does_not_take_its_neighbours_with_it(pool: Pool) -> None:
    good, bad, twice = interaction(), interaction(tenant_id="ten_unknown"), interaction()  # type: ignore[arg-type]
    await record(pool, twice)
    writing = recorder(pool)
    told = await asyncio.gather(*(writing.record(row) for row in (good, bad, twice, interaction())), return_exceptions=True)
    await writing.stop()
    assert [type(one) for one in told] == [type(None), Unavailable, Unavailable, type(None)]
    assert await pool.fetchval("select count(*) from interactions") == 3
    assert await check(pool) is None


async def test_a_nul_in_a_prompt_is_recorded_as_what_can_be_kept(pool: Pool) -> None:
    await record(pool, interaction(answer="a\0b", messages=[{"role": "user", "content": "\\u0000 \0"}]))
    row = await pool.fetchrow("select messages, answer from bodies")
    assert (row["answer"], row["messages"][0]["content"]) == ("a\ufffdb", "\\u0000 \ufffd")
    assert await check(pool) is None


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["record", "lost", "late", "erase", "admin"]), st.sampled_from([A, B]), st.integers(0, 10**12)),
        max_size=12,
    )
)
def test_after_any_operations_the_chain_holds_and_costs_what_the_ledger_costs(database_url: str, operations: list[Any]) -> None:
    async def run() -> tuple[Break | None, int, int]:
        pool = await open_pool(database_url, size=3)
        await pool.execute(
            "insert into tenants (id, name, tier) values ('ten_a', 'acme', 'pro'), ('ten_b', 'bolt', 'free') on conflict do nothing"
        )
        for verb, tenant, cost in operations:
            row = interaction(tenant, cost_microusd=cost)
            if verb in ("lost", "late"):
                await interactions.add_lost(
                    pool, request_id=row.request_id, tenant_id=tenant.id, key_id="k", at=NOW, tokens=9, cost_microusd=cost + 5
                )
            if verb in ("record", "late"):
                await record(pool, row)
            if verb == "erase":
                await bodies.erase(pool, tenant.id, actor="cli:me")
            if verb == "admin":
                async with pool.acquire() as connection, connection.transaction():
                    await audit.append(connection, tenant_id=tenant.id, actor="op", action="tenant.change", detail={"tier": "pro"})
        last = """
            select coalesce(sum((detail::json ->> 'cost_microusd')::bigint), 0) from (
                select distinct on (tenant_id, subject) detail from audit where kind = 'request' order by tenant_id, subject, sequence desc
            ) newest
        """
        sums = [int(await pool.fetchval(q)) for q in ("select coalesce(sum(cost_microusd), 0) from interactions", last)]
        broken = await check(pool)
        await pool.close()
        return broken, sums[0], sums[1]

    broken, billed, chained = asyncio.run(run())
    assert broken is None
    assert billed == chained
