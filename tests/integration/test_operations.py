"""What operators change: tenants' limits and state, keys' scopes; each is there for the gateway's next snapshot."""

from __future__ import annotations

import asyncio
import base64
import getpass
import json
from argparse import Namespace
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tutelage.errors import InvalidRequest, NotFound, PlanLimitReached
from tutelage.operations import OPERATIONS, add_tenant
from tutelage.records import Interaction, Key
from tutelage.settings import Home
from tutelage.stores import audit, interactions, registry, tenants
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.interactions import Recorder


@pytest.fixture
async def pool(database_url: str, home: Home) -> AsyncIterator[Pool]:
    pool = await open_pool(database_url, size=2)
    await add_tenant(pool, home.secret("pepper"), name="acme", tier="free")
    yield pool
    await pool.close()


def change(**given: Any) -> Namespace:
    return Namespace(**{"name": "acme", "tier": None, "status": None, "limit": None, "on_disconnect": None, **given})


def key(**given: Any) -> Namespace:
    return Namespace(**{"tenant": "acme", "operator": None, "models": None, "expires": None, "limit": None, **given})


async def test_agreed_limits_stand_beside_the_plan_and_add_up(pool: Pool, home: Home) -> None:
    await OPERATIONS["change_tenant"](pool, home, change(limit=["queries_per_day=7", "concurrent=none"]))
    changed = await OPERATIONS["change_tenant"](pool, home, change(limit=["requests_per_minute=9"], tier="pro"))
    assert isinstance(changed, dict)
    limits = changed["limits"]
    assert (limits["queries_per_day"], limits["concurrent"], limits["requests_per_minute"]) == (7, None, 9)
    assert changed["tier"] == "pro"


async def test_a_wrong_limit_changes_nothing(pool: Pool, home: Home) -> None:
    for wrong in ("queries=7", "concurrent=0", "queries_per_day=many", "concurrent"):
        with pytest.raises(InvalidRequest):
            await OPERATIONS["change_tenant"](pool, home, change(limit=[wrong], status="suspended"))
    tenant = await tenants.find_tenant(pool, "acme")
    assert (dict(tenant.limits), tenant.status) == ({}, "active")
    with pytest.raises(NotFound):
        await OPERATIONS["change_tenant"](pool, home, change(name="nobody", status="suspended"))


async def test_a_rotated_key_keeps_its_scopes_and_limits(pool: Pool, home: Home) -> None:
    made = await OPERATIONS["create_key"](pool, home, key(models=["auto"], expires="90d", limit=["concurrent=2"]))
    assert isinstance(made, dict)
    rotated = await OPERATIONS["rotate_key"](pool, home, Namespace(key_id=made["key_id"], overlap="1h"))
    assert isinstance(rotated, dict)
    stored = {k.id: k for k in await tenants.list_keys(pool)}
    new, old = stored[rotated["key_id"]], stored[made["key_id"]]
    assert (list(new.models or ()), dict(new.limits)) == (["auto"], {"concurrent": 2}) == (list(old.models or ()), dict(old.limits))
    assert old.expires_at is not None
    assert old.expires_at < datetime.now(UTC) + timedelta(hours=2)
    assert new.expires_at is not None
    assert timedelta(days=89) < new.expires_at - datetime.now(UTC) < timedelta(days=91)


async def test_a_revoked_key_makes_no_new_one(pool: Pool, home: Home) -> None:
    made = await OPERATIONS["create_key"](pool, home, key())
    assert isinstance(made, dict)
    await OPERATIONS["revoke_key"](pool, home, Namespace(key_id=made["key_id"]))
    with pytest.raises(InvalidRequest, match="revoked"):
        await OPERATIONS["rotate_key"](pool, home, Namespace(key_id=made["key_id"], overlap="1h"))


async def test_a_tenant_chooses_what_is_kept_and_for_how_long(pool: Pool, home: Home) -> None:
    changed = await OPERATIONS["change_tenant"](pool, home, change(bodies="redacted", retention_days="30", limit=["models=5"]))
    assert isinstance(changed, dict)
    assert (changed["bodies"], changed["retention_days"], changed["limits"]["models"]) == ("redacted", 30, 5)
    changed = await OPERATIONS["change_tenant"](pool, home, change(retention_days="none"))
    assert isinstance(changed, dict)
    assert changed["retention_days"] is None
    for wrong in ("0", "-1", "a week", "100000"):
        with pytest.raises(InvalidRequest, match="retention"):
            await OPERATIONS["change_tenant"](pool, home, change(retention_days=wrong))


async def test_what_is_done_by_hand_is_told_with_whose_hand_it_was(pool: Pool, home: Home) -> None:
    made = await OPERATIONS["create_key"](pool, home, key(routes=["chat"], role="viewer"))
    assert isinstance(made, dict)
    await OPERATIONS["revoke_key"](pool, home, Namespace(key_id=made["key_id"]))
    await OPERATIONS["create_key"](pool, home, key(tenant=None, operator="billing"))
    tenant = await tenants.find_tenant(pool, "acme")
    revoked, created = (await audit.newest(pool, tenant.id, limit=10))[:2]
    assert (revoked["action"], created["action"], created["detail"]["routes"]) == ("key.revoke", "key.create", ["chat"])
    (operator,) = await audit.newest(pool, audit.OPERATOR, limit=10)
    assert operator["detail"]["role"] == "billing"
    assert {link["actor"] for link in (revoked, created, operator)} == {f"cli:{getpass.getuser()}"}


async def test_a_tenant_has_no_more_students_than_its_plan_allows(pool: Pool, home: Home) -> None:
    tenant = await tenants.find_tenant(pool, "acme")
    await registry.open_cycle(pool, "c1", tenant.id)

    async def spawn(name: str) -> int:
        return await registry.spawn(pool, tenant_id=tenant.id, domain=name, student=name, cycle_id="c1", folder="/s/v{version}")

    told = await asyncio.gather(*(spawn(f"s{n}") for n in range(5)), return_exceptions=True)
    refused = [one for one in told if isinstance(one, PlanLimitReached)]
    assert (len(refused), [one for one in told if one == 1]) == (2, [1, 1, 1])
    assert "3 of 3 students" in str(refused[0])
    assert "--limit models=4" in str(refused[0])
    known = await pool.fetchval("select name from students limit 1")
    assert await spawn(known) == 2, "the next version of a student is no new student"
    await OPERATIONS["change_tenant"](pool, home, change(tier="pro"))
    assert await spawn("s9") == 1


async def test_deleting_by_hand_leaves_a_chain_that_holds(pool: Pool, home: Home) -> None:
    deleted = await OPERATIONS["delete_tenant"](pool, home, Namespace(name="acme"))
    assert isinstance(deleted, dict)
    with pytest.raises(NotFound):
        await OPERATIONS["create_key"](pool, home, key())
    assert await tenants.list_tenants(pool) == []
    assert all(k.revoked_at is not None for k in await tenants.list_keys(pool))
    with pytest.raises(NotFound):
        await tenants.add_key(pool, Key("late", deleted["tenant_id"], None, b"h", None, None))
    verified = await OPERATIONS["verify_audit"](pool, home, verify())
    assert isinstance(verified, dict)
    assert (verified["whole"], verified["links"]) == (True, 4)


async def test_erasing_by_hand_says_exactly_what(pool: Pool, home: Home) -> None:
    def erase(**given: Any) -> Namespace:
        return Namespace(**{"tenant": "acme", "request": None, "before": None, "all": False, **given})

    for wrong in (erase(), erase(all=True, request="r"), erase(before="yesterday")):
        with pytest.raises(InvalidRequest, match="--before"):
            await OPERATIONS["erase"](pool, home, wrong)
    told = await OPERATIONS["erase"](pool, home, erase(before="2026-11-01"))
    assert isinstance(told, dict)
    assert told["interactions_erased"] == 0


def verify(**given: Any) -> Namespace:
    return Namespace(**{"tenant": None, "heads": None, "json": True, **given})


async def test_a_tenant_that_opted_out_is_learned_from_by_nobody(pool: Pool, home: Home, tmp_path: Path) -> None:
    tenant = await tenants.find_tenant(pool, "acme")
    recorder = Recorder(pool, flush_seconds=0, batch_rows=10, deadline_seconds=5)
    recorder.start()
    embedding = np.ones(4, np.float32).tobytes()
    told = {"model": "teacher", "tier": "teacher", "route": "teacher", "reason": "x", "cache": "miss", "domain": "sums"}
    cost = {"prompt_tokens": 1, "completion_tokens": 1, "tokens_estimated": False, "cost_microusd": 1, "latency_ms": 1}
    messages = [{"role": "user", "content": "1 + 1?"}]
    unknown = {"given_domain": None, "confidence": None, "finish_reason": "stop", "embedding": embedding}
    who = {"request_id": "r1", "tenant_id": tenant.id, "key_id": "k", "created_at": datetime.now(UTC), "prompt_hash": b"h"}
    await recorder.record(Interaction(**who, messages=messages, answer="2", **told, **unknown, **cost))  # type: ignore[arg-type]
    await recorder.stop()
    file = tmp_path / "lessons.jsonl"
    asked = Namespace(tenant="acme", data=file, domain=None)
    assert await OPERATIONS["lessons"](pool, home, asked) == {"rows": 1}
    row = json.loads(file.read_text())
    assert row["messages"][-1] == {"role": "assistant", "content": "2"}
    assert np.frombuffer(base64.b64decode(row["metadata"]["embedding"]), np.float16).tolist() == [1.0] * 4
    changed = await OPERATIONS["change_tenant"](pool, home, change(training="off"))
    assert isinstance(changed, dict) and changed["training"] == "off"
    with pytest.raises(InvalidRequest, match="nothing learned"):
        await OPERATIONS["lessons"](pool, home, asked)
    assert await interactions.read_interactions(pool, tenant.id, limit=10, for_training=True) == []
    assert len(await interactions.read_interactions(pool, tenant.id, limit=10)) == 1
