"""The Python API on a real PostgreSQL and Valkey: the same gateway, tenants and rules, inside a program."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import FakeModelServer

from tutelage import APIGateway, DistributedOrchestrator, MultiTenantManager, Request
from tutelage.errors import Conflict, Forbidden, IdempotencyMismatch, InvalidRequest, NotFound
from tutelage.fleet import engines
from tutelage.settings import CHECKOUT, Home
from tutelage.stores import tenants
from tutelage.stores.database import open_pool


@pytest.fixture
def teacher() -> Iterator[FakeModelServer]:
    with FakeModelServer("4") as server:
        yield server


@pytest.fixture
def environment(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str, teacher: FakeModelServer, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """A home whose stores are this test's own."""
    home.models.joinpath("encoder").symlink_to(encoder)
    price = {"input_per_mtok": 2.5, "output_per_mtok": 10.0}
    entry = {"name": "big", "kind": "openai", "base_url": f"{teacher.url}/v1", "price": price}
    (home.folder("config") / "models.yaml").write_text(yaml.safe_dump({"models": [entry]}))
    told = {"TUTELAGE_HOME": str(home.root), "TUTELAGE_DATABASE_URL": database_url, "TUTELAGE_VALKEY_URL": servers.valkey_url}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return told


@pytest.fixture
async def inside(environment: dict[str, str]) -> AsyncIterator[tuple[APIGateway, MultiTenantManager]]:
    with DistributedOrchestrator() as orchestrator:
        manager = MultiTenantManager(orchestrator)
        async with APIGateway(orchestrator, manager) as gateway:
            yield gateway, manager
        await asyncio.to_thread(manager.close)


def test_the_program_of_the_docs_runs(environment: dict[str, str]) -> None:
    program = (CHECKOUT / "docs/python.md").read_text().split("```python")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ["4", "big", "miss"]


async def test_an_answer_tells_where_it_came_from_and_is_given_again_from_the_cache(inside: Any, teacher: FakeModelServer) -> None:
    gateway, manager = inside
    tenant = manager.create_tenant("acme", tier="pro")
    first = await gateway.handle_request(Request("one", tenant.tenant_id, "Name the capital of France."))
    again = await gateway.handle_request(Request("two", tenant.tenant_id, "Name the capital of France."))
    assert (first.answer, first.model, first.tier, first.cache) == ("4", "big", "teacher", "miss")
    assert first.cost_usd > 0
    assert (again.cache, again.cost_usd) == ("hit-exact", 0)
    assert len(teacher.requests) == 1
    assert first.to_dict()["completion"]["choices"][0]["message"]["content"] == "4"


async def test_a_request_sent_again_under_its_id_is_answered_once_and_a_changed_one_is_refused(
    inside: Any, teacher: FakeModelServer
) -> None:
    gateway, manager = inside
    tenant = manager.create_tenant("acme")
    asked = Request("same", tenant.tenant_id, "What is 2 + 2?", metadata={"cache": "bypass"})
    first, second = await gateway.handle_request(asked), await gateway.handle_request(asked)
    assert first.interaction_id == second.interaction_id
    assert len(teacher.requests) == 1
    with pytest.raises(IdempotencyMismatch):
        await gateway.handle_request(Request("same", tenant.tenant_id, "What is 3 + 3?", metadata={"cache": "bypass"}))


async def test_without_caching_every_request_is_asked(environment: dict[str, str], teacher: FakeModelServer) -> None:
    async with APIGateway(enable_caching=False) as gateway:
        tenant = gateway.tenants.create_tenant("acme")
        for number in range(2):
            reply = await gateway.handle_request(Request(f"n{number}", tenant.tenant_id, "Name the capital of France."))
            assert reply.cache == "bypass"
    assert len(teacher.requests) == 2


async def test_errors_are_those_of_the_one_tree(inside: Any) -> None:
    gateway, manager = inside
    tenant = manager.create_tenant("acme")
    with pytest.raises(Conflict):
        manager.create_tenant("acme")
    with pytest.raises(InvalidRequest, match="gold"):
        manager.create_tenant("other", tier="gold")
    with pytest.raises(NotFound, match="ten_nobody"):
        await gateway.handle_request(Request("r", "ten_nobody", "Hello?"))
    with pytest.raises(InvalidRequest, match="temperature"):
        await gateway.handle_request(Request("r2", tenant.tenant_id, "Hello?", metadata={"temperature": 9}))


async def test_a_suspended_tenant_is_refused_and_one_made_elsewhere_is_answered(inside: Any, environment: dict[str, str]) -> None:
    gateway, manager = inside
    with DistributedOrchestrator() as elsewhere:
        tenant = MultiTenantManager(elsewhere).create_tenant("acme")
    assert (await gateway.handle_request(Request("r", tenant.tenant_id, "What is 2 + 2?"))).answer == "4"
    pool = await open_pool(environment["TUTELAGE_DATABASE_URL"], size=1)
    await tenants.change(pool, tenant.tenant_id, {"status": "suspended"}, actor="test")
    await asyncio.sleep(1)
    with pytest.raises(Forbidden, match="suspended"):
        await gateway.handle_request(Request("r3", tenant.tenant_id, "What is 2 + 2?"))
    await asyncio.to_thread(manager.close)
    keys = [key for key in await tenants.list_keys(pool) if key.tenant_id == tenant.tenant_id]
    await pool.close()
    assert sorted(key.revoked_at is not None for key in keys) == [False, True]
