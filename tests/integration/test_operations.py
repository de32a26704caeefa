"""What operators change: tenants' limits and state, keys' scopes; each is there for the gateway's next snapshot."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tutelage.errors import InvalidRequest, NotFound
from tutelage.operations import OPERATIONS, add_tenant
from tutelage.settings import Home
from tutelage.stores import tenants
from tutelage.stores.database import Pool, open_pool


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
